"""What docs/howto/seeing.md says of pictures and benchmarks is complete."""

import re
from pathlib import Path

from vfsmap_tools.bench.command import SCENARIOS
from vfsmap_tools.picture import KINDS

DOCUMENT = (Path(__file__).parents[2] / "docs/howto/seeing.md").read_text()


def test_it_names_every_kind_of_unit_with_its_character_and_meaning() -> None:
    for kind in KINDS:
        assert f"| `{kind.glyph}` | {kind.name} | {kind.about}" in DOCUMENT


def test_it_names_every_scenario() -> None:
    rows = re.findall(r"^\| (`[^|]*) \|", DOCUMENT.split("| scenario |")[1], re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == set(SCENARIOS)
