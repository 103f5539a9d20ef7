"""Files that grow large come to lie in huge units, however they are written."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from vfsmap.fs import ROOT, FileSystem
from vfsmap.fs.coverage import coverage
from vfsmap.pool import Pool
from vfsmap.units import KIB, MIB, PMD


@pytest.fixture
def fs(tmp_path: Path) -> Iterator[FileSystem]:
    with FileSystem.format(Pool.create(tmp_path / "pool", 64 * MIB)) as made:
        yield made


def pattern(size: int) -> bytes:
    return b"".join(n.to_bytes(8, "little") for n in range(-(-size // 8)))[:size]


def appended(fs: FileSystem, step: int, size: int) -> int:
    """Make a file by appending pieces; its content is a pattern."""
    ino = fs.create(ROOT, b"%d" % step, 0o644, 0, 0).ino
    data = pattern(size)
    for at in range(0, size, step):
        fs.write(ino, at, data[at : at + step])
    return ino


@pytest.mark.parametrize("step", [5000, 4 * KIB, 130_990, 954_368, MIB, 2 * MIB - 1, 2 * MIB + 1])
def test_a_file_that_is_appended_to_is_huge_from_its_start(fs: FileSystem, step: int) -> None:
    ino = appended(fs, step, 4 * MIB)
    found = coverage(fs)
    assert found.large == found.huge == 4 * MIB
    assert bytes(fs.read(ino, 0, 4 * MIB)) == pattern(4 * MIB)


def test_a_file_whose_blocks_fill_the_first_unit_already_is_moved_when_it_grows(
    fs: FileSystem,
) -> None:
    ino = appended(fs, 5000, 2_095_000)  # its last block ends with the unit
    assert coverage(fs).large == 0
    blocks = fs.extents(ino)
    fs.write(ino, 2_095_000, b"x" * (PMD.size - 2_095_000))  # in place, but for the move
    assert coverage(fs).huge == PMD.size
    (extent,) = fs.extents(ino)
    assert extent.start % PMD.size == 0
    assert extent.start != blocks[0].start
    assert bytes(fs.read(ino, 0, 2_095_000)) == pattern(2_095_000)


def test_what_was_moved_gives_its_blocks_back_and_leaves_no_old_bytes(fs: FileSystem) -> None:
    free = fs.pool.space.free_bytes
    ino = appended(fs, 5000, 2_095_000)
    fs.write(ino, 3 * MIB, b"y")
    fs.pool.sync()  # blocks that are given up can be taken when that is durable
    used = sum(extent.length for extent in fs.extents(ino))
    assert free - fs.pool.space.free_bytes == used
    assert bytes(fs.read(ino, 2_095_000, 3 * MIB - 2_095_000)).strip(b"\0") == b""
    assert coverage(fs).huge >= 2_095_000


def test_a_unit_is_not_moved_again_when_a_file_that_was_cut_grows(fs: FileSystem) -> None:
    ino = appended(fs, MIB, 3 * MIB)
    before = fs.extents(ino)[0].start
    fs.setattr(ino, size=MIB + MIB // 2)
    fs.write(ino, MIB + MIB // 2, bytes(MIB))
    assert fs.extents(ino)[0].start == before
    assert coverage(fs).huge == coverage(fs).large


def test_a_lease_keeps_a_file_that_grows_large_where_it_is(fs: FileSystem) -> None:
    ino = appended(fs, 5000, 2_095_000)
    before = fs.extents(ino)[0].start
    pin = fs.pin(ino, 0, MIB, writable=False)
    fs.write(ino, 2_095_000, bytes(MIB))
    assert fs.extents(ino)[0].start == before
    fs.unpin(pin)


def test_without_a_unit_left_a_file_grows_where_it_is(fs: FileSystem) -> None:
    ino = appended(fs, 5000, 2_095_000)
    hog = fs.create(ROOT, b"hog", 0o644, 0, 0).ino
    fs.allocate(hog, 0, fs.pool.space.free_in_units(PMD))
    assert fs.pool.space.free_in_units(PMD) == 0
    fs.write(ino, 2_095_000, bytes(10_000))
    assert bytes(fs.read(ino, 0, 2_095_000)) == pattern(2_095_000)
