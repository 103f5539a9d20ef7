"""What docs/howto/seeing.md says: its commands run, its tables are complete."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfsmap.testing.commands import Server, served_pool, vfsmap
from vfsmap.testing.media import tmpfs
from vfsmap_tools.bench.command import SCENARIOS
from vfsmap_tools.picture import KINDS

DOCUMENT = (Path(__file__).parents[2] / "docs/howto/seeing.md").read_text()
COMMANDS = re.findall(r"^\$ vfsmap (.*)$", DOCUMENT, re.MULTILINE)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with tmpfs(huge="always", size="200M") as place, served_pool(place, "64M") as served:
        yield served


def run(command: str, place: Path, directory: Path) -> None:
    words = shlex.split(command.replace("/mnt/pool", str(directory)))
    files = {"pool.svg": place / "pool.svg", "figures": place / "figures"}
    vfsmap(*(files.get(word, word) for word in words))


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith("bench")])
def test_its_commands_run(command: str, server: Server, tmp_path: Path) -> None:
    run(command, tmp_path, server.directory)
    assert (tmp_path / "pool.svg").exists() == ("--svg" in command)


@pytest.mark.slow
def test_its_benchmarks_run(tmp_path: Path) -> None:
    measure, page = (command for command in COMMANDS if command.startswith("bench"))
    words = [tmp_path / "figures" if word == "figures" else word for word in shlex.split(measure)]
    result = vfsmap(*words, check=False)
    assert result.returncode in (0, 1), result.stderr  # promises are for quiet machines
    run(page, tmp_path, tmp_path)
    assert (tmp_path / "figures" / "index.md").exists()


def test_it_names_every_kind_of_unit_with_its_character_and_meaning() -> None:
    for kind in KINDS:
        assert f"| `{kind.glyph}` | {kind.name} | {kind.about}" in DOCUMENT


def test_it_names_every_scenario() -> None:
    rows = re.findall(r"^\| (`[^|]*) \|", DOCUMENT.split("| scenario |")[1], re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == set(SCENARIOS)
