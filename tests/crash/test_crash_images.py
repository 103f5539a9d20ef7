"""Thousands of crashes in and behind each operation; with them, in recovery from some."""

import random

import pytest

from vfsmap.testing.crash import PROMISES, pairs
from vfsmap.testing.hunt import Hunter, Tally
from vfsmap.testing.workload import Workload, file_operations


@pytest.mark.parametrize(
    ("medium", "every", "least"), [("flush", 16, 1500), ("sync", 4, 1000), ("store-tiny", 4, 1000)]
)
def test_no_operation_loses_anything_in_thousands_of_crashes(
    medium: str, every: int, least: int
) -> None:
    tally = Tally()
    hunter = Hunter(medium, tally, second=2, every=every)
    for name in file_operations():
        hunter.run(Workload(medium, (name,)))
    assert tally.failures == []
    assert tally.images >= least
    assert tally.second > 0


def test_a_drawn_share_of_the_pairs_of_operations_loses_nothing() -> None:
    tally = Tally()
    hunters = {medium: Hunter(medium, tally, every=16) for medium in PROMISES}
    for row in random.Random(1).sample(list(pairs(random.Random(1))), 90):
        hunters[row.medium].run(row)
    assert tally.failures == []
    assert tally.images >= 1500
