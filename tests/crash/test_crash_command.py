"""The command that hunts for crashes: what it covers, where it goes on, and what it sums up."""

import itertools
import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vfsmap.testing.crash import MEDIA, PROMISES, pairs, workloads
from vfsmap.testing.workload import all_operations, file_operations


def hunt(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vfsmap.testing.crash", "--jobs", "1", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_pairs_are_every_operation_behind_every_other_on_each_promise() -> None:
    found = [(row.medium, *row.operations) for row in pairs(random.Random(1))]
    names = all_operations()
    assert set(found) == set(itertools.product(PROMISES, names, names))
    assert len(set(found)) == len(found)
    assert {"compact", "resize", "seal", "unpin", "checkpoint", "arena", "object"} <= set(names)


def test_everything_begins_with_every_operation_alone_and_goes_on_with_pairs_and_triples() -> None:
    count = len(MEDIA) * len(file_operations())
    rows = list(itertools.islice(workloads(1), count + 100))
    assert {len(row.operations) for row in rows[:count]} == {1}
    behind = [len(row.operations) for row in rows[count:]]
    assert behind.count(2) == 50
    assert {1, 2, 3} == set(behind)  # a drawn row has one name
    assert rows == list(itertools.islice(workloads(1), count + 100))
    assert rows != list(itertools.islice(workloads(2), count + 100))


def test_a_hunt_goes_on_where_it_was_stopped_and_sums_up(tmp_path: Path) -> None:
    state = tmp_path / "state"
    options = ("--only", "pairs", "--minutes", 0, "--state", state)
    for turn in (1, 2):
        done = hunt(*options)
        assert done.returncode == 0, done
        assert f"{turn} of {sum(1 for _ in workloads(1, 'pairs'))} workloads" in done.stdout
        assert "0 failures" in done.stdout
        assert "in recovery" in done.stdout
        assert json.loads(state.read_text())["position"] == turn
    assert "belongs to --seed 1 --only pairs" in hunt("--seed", 2, *options).stderr


def test_an_interrupted_hunt_ends_what_it_is_at_and_sums_up(tmp_path: Path) -> None:
    state = tmp_path / "state"
    command = [sys.executable, "-m", "vfsmap.testing.crash", "--jobs", "2", "--state", str(state)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as hunter:
        assert hunter.stdout is not None
        assert "failures" in hunter.stdout.readline()
        hunter.send_signal(signal.SIGINT)
        said = hunter.stdout.read()
    assert hunter.returncode == 0
    assert "in recovery" in said
    assert json.loads(state.read_text())["images"] > 0


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("flush/create@5:n", 0, "nothing is lost"),
        ("flush/create@100000:n", 2, "no such crash"),
    ],
)
def test_one_crash_is_tried_again_by_its_name(name: str, code: int, said: str) -> None:
    done = hunt("--replay", name)
    assert done.returncode == code
    assert said in done.stdout + done.stderr
