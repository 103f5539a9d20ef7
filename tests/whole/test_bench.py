"""Benchmarks as people call them, and what they ask kernel file systems."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vfsmap.testing.media import ext4_loop
from vfsmap.units import MIB
from vfsmap_tools.bench import page
from vfsmap_tools.bench.command import SCENARIOS
from vfsmap_tools.bench.fsmap import free_runs

HOME = Path(__file__).parents[2] / "docs" / "benchmarks"


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vfsmap_tools.cli", "bench", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_published_page_is_what_is_built_from_the_published_documents() -> None:
    results = page.found_in(HOME, SCENARIOS)
    if results:
        assert (HOME / "index.md").read_text() == page.text(results)
    for result in results:
        assert not result.quick
        for _, name in result.pictures():
            assert (HOME / name).exists()


def test_free_space_of_a_file_system_is_what_statvfs_counts() -> None:
    with ext4_loop("64M") as place:
        before = sum(length for _, length in free_runs(place))
        (place / "file").write_bytes(bytes(8 * MIB))
        os.sync()
        after = sum(length for _, length in free_runs(place))
        told = os.statvfs(place)
        assert after == told.f_bfree * told.f_frsize
        assert 0 <= before - after - 8 * MIB < MIB


def test_a_page_without_results_is_refused(tmp_path: Path) -> None:
    found = bench("--page", "--results", tmp_path)
    assert found.returncode == 2
    assert "vfsmap bench" in found.stderr


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_each_scenario_leaves_a_document_and_a_page(scenario: str, tmp_path: Path) -> None:
    found = bench("--quick", "--json", "--results", tmp_path, scenario)
    # promises are for quiet machines: whether they are kept is not for a test to say
    (answer,) = json.loads(found.stdout)
    assert answer["scenario"] == scenario
    assert found.returncode == (0 if answer["met"] else 1), found.stderr
    assert json.loads((tmp_path / f"{scenario}.json").read_text())["quick"] is True
    assert (tmp_path / "index.md").exists()
