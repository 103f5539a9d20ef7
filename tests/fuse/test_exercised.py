"""A mounted pool beside a kernel's file system; for long: ``python -m vfsmap.testing.exercise``."""

import os
from pathlib import Path

import pytest

from vfsmap.testing.exercise import run
from vfsmap.testing.killing import MEDIA
from vfsmap.testing.twins import Differs, Order, Twins


@pytest.mark.parametrize("medium", MEDIA)
def test_several_processes_see_no_difference_from_a_file_system_of_the_kernel(medium: str) -> None:
    done, failures = run(medium, seed=500, operations=500, minutes=3)
    assert failures == []
    assert done == 2 * 500


@pytest.fixture
def twins(tmp_path: Path) -> Twins:
    """Two directories of the kernel's file system, the first of which stands for a pool."""
    for name in ("pool", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "same").write_bytes(b"same")
        (tmp_path / name / "different").write_bytes(f"in the {name}".encode())
    (tmp_path / "pool" / "alone").touch()
    return Twins(tmp_path / "pool", tmp_path / "other")


def test_the_same_answers_are_no_difference(twins: Twins) -> None:
    twins.obey(Order("open", (1, "same", os.O_RDWR)))
    twins.obey(Order("pwrite", (1, b"new", 2)))
    assert twins.obey(Order("pread", (1, 10, 0))) == b"sanew"
    twins.obey(Order("describe", ("same",)))
    twins.obey(Order("unlink", ("nowhere",)))
    twins.obey(Order("close", (1,)))


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        (Order("describe", ("different",)), "different from 0x7"),
        (Order("unlink", ("alone",)), "No such file"),
        (Order("mkdir", ("same",), 13), "Permission denied elsewhere|Errno 13|PermissionError"),
        (Order("compare", ()), "alone"),
    ],
)
def test_other_answers_are_a_difference(twins: Twins, order: Order, reason: str) -> None:
    with pytest.raises(Differs, match=reason):
        twins.obey(order)
