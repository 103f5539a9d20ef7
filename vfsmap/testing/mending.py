"""Repairing damaged pools, and every crash of that: the repair is run again."""

import random
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from vfsmap.errors import VfsmapError
from vfsmap.fs import FileSystem
from vfsmap.fs.check import check
from vfsmap.fs.repair import repair
from vfsmap.pool import Pool
from vfsmap.pool.layout import MAGIC, SUPERBLOCKS
from vfsmap.pool.scan import scan
from vfsmap.pool.superblock import SIZE
from vfsmap.testing.cuts import Left, crashes
from vfsmap.testing.damage import inflict
from vfsmap.testing.oracle import Snapshot, snapshot
from vfsmap.testing.recording import MEDIA, Memory, RecordingPmem
from vfsmap.testing.workload import POOL_SIZE, Context, base, deterministic, perform

_DONE = "done"
_BEFORE = ("unlink-held", "append-block", "create-deep", "exchange-directories", "sync")


class _Mended(NamedTuple):
    """A repair: what there was, what it did to the medium, and what came of it."""

    content: bytes
    size: int
    pmem: RecordingPmem
    after: Snapshot


def mending_lost(medium: str, seeds: Iterable[int]) -> list[str]:
    """Return the crashes of repairs after which a second repair does not do as well."""
    wrong, repairs, hopeless = [], 0, 0
    for seed in seeds:
        whole = _mended(medium, seed)
        if whole is None:
            hopeless += 1
            continue
        repairs += 1
        cuts = crashes(whole.pmem.events, whole.content, whole.size, whole.pmem.medium)
        wrong += [f"seed {seed} {left.name}: {p}" for left in cuts for p in _problems(left, whole)]
    assert repairs >= hopeless
    return wrong


def _damaged(medium: str, seed: int) -> tuple[bytes, int]:
    """Return a medium with a damaged pool on it, and how long it is."""
    rng = random.Random(seed)
    with deterministic():
        pmem = RecordingPmem(Memory(base(medium)[0]), POOL_SIZE, MEDIA[medium])
        fs = FileSystem(Pool(pmem))
        context = Context(fs, rng)
        for name in _BEFORE:
            perform(context, name)
    found = scan(pmem)
    start = found.halves[found.superblock.active].start
    content = bytearray(pmem.view)
    if seed % 6 == 5:  # both copies of the superblock, each elsewhere
        for at, word in zip(SUPERBLOCKS, rng.sample(range(len(MAGIC), SIZE, 8), 2), strict=True):
            content[at + word] ^= 0xFF
        return bytes(content), POOL_SIZE
    areas = [(0, 512), (4096, 512), *3 * [(start, found.tail - start)]]
    damage = inflict(content, areas, rng)
    return bytes(content), damage.size


def _mended(medium: str, seed: int) -> _Mended | None:
    """Damage a pool and repair it; None if that can't be done."""
    content, size = _damaged(medium, seed)
    pmem = RecordingPmem(Memory(content), size, MEDIA[medium])
    with deterministic():
        try:
            repair(pmem)
        except VfsmapError:
            return None
    pmem.note(_DONE)
    after = snapshot(FileSystem(Pool(RecordingPmem(pmem.memory, pmem.size, pmem.medium))))
    return _Mended(content, size, pmem, after)


def _problems(left: Left, whole: _Mended) -> Iterator[str]:
    """Yield what is wrong when a repair that was cut off is run again."""
    pmem = RecordingPmem(left.memory, left.size, whole.pmem.medium)
    try:
        if _DONE in left.marks:
            yield from (f"not durable: {finding}" for finding in check(scan(pmem)).findings)
        with deterministic():
            repair(pmem)
        yield from map(str, check(scan(pmem)).findings)
        if snapshot(FileSystem(Pool(pmem))) != whole.after:
            yield "it is mended in another way"
    except Exception as exc:
        yield f"{type(exc).__name__}: {exc}"
