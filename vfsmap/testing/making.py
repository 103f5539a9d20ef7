"""Making a pool where another one was, and every crash of that."""

from collections.abc import Iterator

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

_MADE = "made"


def making_lost(medium: str) -> list[str]:
    """Return the crashes that leave anything but the old file system, none, or the new one."""
    old = _found(Memory(base(medium)[0]), POOL_SIZE, medium)
    wrong = []
    for left in _formatted(medium):
        try:
            found = _found(left.memory, left.size, medium)
        except Exception as exc:
            wrong.append(f"{left.name}: {exc}")
            continue
        empty = found is not None and not found.names and len(found.files) == 1
        if not (empty or (_MADE not in left.marks and found in (None, old))):
            wrong.append(f"{left.name}: it is another one")
    return wrong


def _formatted(medium: str) -> Iterator[Left]:
    content = base(medium)[0]
    with deterministic():
        pmem = RecordingPmem(Memory(content), POOL_SIZE, MEDIA[medium])
        format_pmem(pmem)
        fs = FileSystem.format(Pool(pmem), uid=0, gid=0)
        pmem.note(_MADE)
        fs.close()
    return crashes(pmem.events, content, POOL_SIZE, MEDIA[medium])


def _found(memory: Memory, size: int, medium: str) -> Snapshot | None:
    """Return the file system that is there; None if it is no pool, or holds no file system."""
    pmem = RecordingPmem(memory, size, MEDIA[medium])
    try:
        pool = Pool(pmem)
        assert pool.failed is None, pool.failed
        assert check(scan(pmem)).findings == []
        return snapshot(FileSystem(pool))
    except (NotAPool, PoolDamaged):
        return None
