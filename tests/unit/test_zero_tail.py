"""What lies behind a file's end is zeroed before a window shows it, and never too early."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from vfsmap.fs import ROOT, FileSystem
from vfsmap.pmem import Medium
from vfsmap.testing.daemon import daemon, make, map_it
from vfsmap.testing.pools import GROUPED, STORED, killed_fs, make_fs, scratch
from vfsmap.units import KIB, MIB


@pytest.fixture
def directory() -> Iterator[Path]:
    with scratch() as path:
        yield path


def behind_the_end(fs: FileSystem, ino: int) -> bytes:
    """Return what a file's last extent holds behind the file's end."""
    size = fs.get(ino).size
    (extent,) = fs.extents(ino)
    return bytes(fs.pool.pmem.view[extent.start + size : extent.start + extent.length])


@pytest.mark.parametrize("medium", [STORED, GROUPED], ids=["stored", "grouped"])
def test_a_cut_that_a_crash_undoes_has_cost_no_byte(directory: Path, medium: Medium) -> None:
    fs = make_fs(directory / "pool", 16 * MIB, medium)
    ino = make(fs, b"file", b"x" * 4 * KIB)
    fs.pool.sync()
    fs.setattr(ino, size=KIB)
    fs.zero_tail(ino)
    assert behind_the_end(fs, ino) == bytes(3 * KIB)
    fs = killed_fs(fs)
    content = bytes(fs.read(ino, 0, MIB))
    assert content in (b"x" * KIB, b"x" * 4 * KIB)
    fs.close()


def test_a_lease_right_after_a_cut_shows_zeros_and_waits_for_the_commit(directory: Path) -> None:
    fs = make_fs(directory / "pool", 16 * MIB, GROUPED)
    ino = make(fs, b"file", b"x" * 4 * KIB)
    fs.pool.sync()
    fs.setattr(ino, size=KIB)
    with daemon(fs, directory / "socket") as served, served.client() as client:
        map_it(client, path="/file")
        assert served.synced == 1
        map_it(client, path="/file")
        assert served.synced == 1  # it is known to be clean
    assert behind_the_end(fs, ino) == bytes(3 * KIB)
    assert fs.lookup(ROOT, b"file").size == KIB
    fs.close()
