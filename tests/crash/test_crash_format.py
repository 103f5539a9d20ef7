"""Making a pool, where another one was: crashes leave the old one, none, or the new one."""

from collections.abc import Iterator

import pytest

from vfsmap.errors import NotAPool, PoolDamaged
from vfsmap.fs import FileSystem
from vfsmap.fs.check import check
from vfsmap.pool import Pool
from vfsmap.pool.pool import format_pmem
from vfsmap.pool.scan import scan
from vfsmap.testing.cuts import Left, crashes
from vfsmap.testing.oracle import Snapshot, snapshot
from vfsmap.testing.recording import MEDIA, Memory, RecordingPmem
from vfsmap.testing.workload import POOL_SIZE, base, deterministic

MADE = "made"


def formatted(medium: str) -> Iterator[Left]:
    """Yield what crashes leave while a file system is made over one that was there."""
    content = base(medium)[0]
    with deterministic():
        pmem = RecordingPmem(Memory(content), POOL_SIZE, MEDIA[medium])
        format_pmem(pmem)
        fs = FileSystem.format(Pool(pmem), uid=0, gid=0)
        pmem.note(MADE)
        fs.close()
    return crashes(pmem.events, content, POOL_SIZE, MEDIA[medium])


def found_in(left: Left, medium: str) -> Snapshot | None:
    """Return the file system that is there, or None."""
    pmem = RecordingPmem(left.memory, left.size, MEDIA[medium])
    try:
        pool = Pool(pmem)
        assert check(scan(pmem)).findings == []
        assert pool.failed is None
        return snapshot(FileSystem(pool))
    except (NotAPool, PoolDamaged):  # no superblock, none that can be used, or no file system yet
        return None


def lost(medium: str) -> list[str]:
    """Return the crashes that leave anything but the old file system, none, or the new one."""
    old = snapshot(
        FileSystem(Pool(RecordingPmem(Memory(base(medium)[0]), POOL_SIZE, MEDIA[medium])))
    )
    wrong = []
    for left in formatted(medium):
        try:
            found = found_in(left, medium)
        except Exception as exc:
            wrong.append(f"{left.name}: {exc}")
            continue
        empty = found is not None and not found.names and len(found.files) == 1
        if not (empty or (MADE not in left.marks and found in (None, old))):
            wrong.append(f"{left.name}: it is another one")
    return wrong


@pytest.mark.parametrize("medium", ["store", "flush", "sync"])
def test_a_pool_that_is_made_over_another_is_the_old_one_none_or_empty(medium: str) -> None:
    assert lost(medium) == []
