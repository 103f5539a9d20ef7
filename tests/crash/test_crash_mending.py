"""A repair that is cut off anywhere can be run again, and mends as much."""

import pytest

from vfsmap.testing.mending import mending_lost


@pytest.mark.parametrize("medium", ["store", "flush", "sync"])
def test_a_repair_that_is_cut_off_anywhere_can_be_run_again(medium: str) -> None:
    assert mending_lost(medium, range(6)) == []


@pytest.mark.slow
@pytest.mark.parametrize("medium", ["store", "flush", "sync", "hugetlb"])
def test_many_repairs_that_are_cut_off_anywhere_can_be_run_again(medium: str) -> None:
    assert mending_lost(medium, range(100, 200)) == []
