"""Crashes that once lost something, each by the promise that it broke."""

import pytest

from vfsmap.testing.hunt import Failure, Hunter, Tally
from vfsmap.testing.workload import Workload, parse


def failures(*names: str) -> list[Failure]:
    """Return what is lost in the last operation of each workload, also when recovery crashes."""
    found = []
    for name in names:
        workload = parse(name)
        tally = Tally()
        row = Workload(workload.medium, workload.operations, first=len(workload.operations) - 1)
        Hunter(workload.medium, tally, second=4, every=1).run(row)
        assert tally.images
        found += tally.failures
    return found


def test_the_holes_of_a_file_moved_to_a_unit_hold_no_old_bytes_after_a_power_cut() -> None:
    """On DAX, what the CPU flushed outlived the punch that the file system below forgot."""
    assert failures("flush/align-sparse,write-in-hole", "flush/align-sparse,allocate-hole") == []


@pytest.mark.parametrize("medium", ["flush", "sync"])
def test_a_pool_that_grew_opens_after_a_power_cut(medium: str) -> None:
    """On DAX, both superblocks named a size that the file system below forgot."""
    assert failures(f"{medium}/resize") == []


@pytest.mark.parametrize("medium", ["store", "flush", "sync", "hugetlb"])
def test_one_superblock_is_whole_while_recovery_mends_the_other(medium: str) -> None:
    """Recovery stored to the only copy that a torn switch had left."""
    assert failures(f"{medium}/compact") == []


def test_what_a_killed_writer_left_in_caches_is_durable_before_anything_follows_it() -> None:
    """A batch that recovery had read was lost in a power cut, but not the one behind it."""
    assert failures("flush/create", "flush/rename") == []
