"""Pools for tests: in memory, on a medium of any kind, killed and opened again at will."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from vfsmap.fs import FileSystem
from vfsmap.pmem import Commit, Medium, Pmem
from vfsmap.pool import Pool
from vfsmap.pool.pool import format_pmem
from vfsmap.units import KIB, MIB, PMD, Level

STORED: Final = Medium("tmpfs", Commit.STORE, 4 * KIB, "always")
FLUSHED: Final = Medium("flushed", Commit.FLUSH, 4 * KIB)
GROUPED: Final = Medium("page cache", Commit.SYNC, 4 * KIB)
HUGE: Final = Medium("hugetlbfs", Commit.STORE, 2 * MIB)


@contextmanager
def scratch() -> Iterator[Path]:
    """Yield a directory in memory."""
    with tempfile.TemporaryDirectory(prefix="vfsmap-", dir="/dev/shm") as name:
        yield Path(name)


def open_pmem(path: Path, medium: Medium = STORED, *, writable: bool = True) -> Pmem:
    """Open a file as if it lay on ``medium``; nobody is locked out."""
    flags = os.O_RDWR if writable else os.O_RDONLY
    fd = os.open(path, flags | os.O_CLOEXEC)
    return Pmem(fd, path, writable=writable, medium=medium)


def make_pool(
    path: Path, size: int, medium: Medium = STORED, *, level: Level = PMD, log: int = 0
) -> Pool:
    """Make an empty pool that behaves as on ``medium``; ``log`` is as in format_pmem()."""
    path.touch()
    os.truncate(path, size)
    pmem = open_pmem(path, medium)
    format_pmem(pmem, level=level, log=log)
    return Pool(pmem)


def make_fs(
    path: Path, size: int, medium: Medium = STORED, *, level: Level = PMD, log: int = 0
) -> FileSystem:
    """Make an empty file system in a pool of its own."""
    return FileSystem.format(make_pool(path, size, medium, level=level, log=log), uid=0, gid=0)


def killed(pool: Pool) -> Pool:
    """Open a pool again as after a SIGKILL of the process that had it open."""
    path, medium = pool.path, pool.pmem.medium
    pool.pmem.close()
    return Pool(open_pmem(path, medium))


def killed_fs(fs: FileSystem) -> FileSystem:
    """Open a file system again as after a SIGKILL, orphans and all."""
    reopened = FileSystem(killed(fs.pool))
    reopened.end_orphans()
    return reopened
