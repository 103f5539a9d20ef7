"""How many bytes of files can be mapped in huge pages."""

from pathlib import Path

import pytest

from vfsmap.fs import ROOT, FileSystem
from vfsmap.fs.coverage import coverage, mappable, within
from vfsmap.pool import Pool
from vfsmap.units import KIB, MIB, PMD, Extent


@pytest.mark.parametrize(
    ("extents", "size", "huge"),
    [
        ([], 4 * MIB, 0),
        ([Extent(0, 2 * MIB, 4 * MIB)], 4 * MIB, 4 * MIB),
        ([Extent(0, 2 * MIB, 4 * MIB)], 3 * MIB, 3 * MIB),  # its tail lies in a unit of its own
        ([Extent(0, 2 * MIB, 3 * MIB)], 3 * MIB, 2 * MIB),  # its tail does not
        ([Extent(0, 2 * MIB + 4 * KIB, 4 * MIB)], 4 * MIB, 0),
        ([Extent(MIB, 3 * MIB, 4 * MIB)], 5 * MIB, 2 * MIB),  # only one whole unit of the file
        ([Extent(0, 2 * MIB, MIB), Extent(MIB, 3 * MIB, MIB)], 2 * MIB, 2 * MIB),  # in two records
        ([Extent(0, 2 * MIB, MIB), Extent(MIB, 8 * MIB, MIB)], 2 * MIB, 0),
        ([Extent(2 * MIB, 0, 2 * MIB)], 4 * MIB, 2 * MIB),  # behind a hole
        ([Extent(0, 2 * MIB, 4 * MIB)], 2 * MIB, 2 * MIB),  # what lies behind the end is no file's
    ],
)
def test_only_whole_units_of_file_and_medium_count(
    extents: list[Extent], size: int, huge: int
) -> None:
    assert mappable(extents, size, PMD) == huge


def test_holes_and_what_lies_behind_the_end_are_not_bytes_of_a_file() -> None:
    assert within([Extent(0, 0, 8 * KIB), Extent(16 * KIB, 0, 8 * KIB)], 20 * KIB) == 12 * KIB


def test_a_file_system_adds_up_its_files(tmp_path: Path) -> None:
    with FileSystem.format(Pool.create(tmp_path / "pool", 32 * MIB)) as fs:
        free = coverage(fs).free
        small = fs.create(ROOT, b"small", 0o644, 0, 0).ino
        fs.write(small, 0, bytes(5000))
        large = fs.create(ROOT, b"large", 0o644, 0, 0).ino
        fs.write(large, 0, bytes(5 * MIB))
        with fs.pool.transaction() as tx:
            tx.allocate(4 * KIB)  # is no file's
        found = coverage(fs)
        assert (found.files, found.large, found.huge) == (5000 + 5 * MIB, 5 * MIB, 5 * MIB)
        assert found.free == fs.pool.space.free_bytes < free
        assert found.giant == found.free_giant == 0
        assert found.share == 1
        fs.unlink(ROOT, b"large")
        assert coverage(fs).large == 0
