"""A repair that is cut off anywhere can be run again, and mends as much."""

import random
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from vfsmap.errors import VfsmapError
from vfsmap.fs import FileSystem
from vfsmap.fs.check import check
from vfsmap.fs.repair import repair
from vfsmap.pool import Pool
from vfsmap.pool.scan import scan
from vfsmap.testing.cuts import Left, crashes
from vfsmap.testing.damage import inflict
from vfsmap.testing.oracle import Snapshot, snapshot
from vfsmap.testing.recording import MEDIA, Memory, RecordingPmem
from vfsmap.testing.workload import POOL_SIZE, Context, base, deterministic, perform

DONE = "done"


class Mended(NamedTuple):
    """A repair: what it did to the medium, and what came of it."""

    content: bytes
    size: int
    pmem: RecordingPmem
    after: Snapshot


def damaged(medium: str, seed: int) -> tuple[bytes, int]:
    """Return a medium with a damaged pool on it, and how long it is."""
    content = bytearray(base(medium)[0])
    with deterministic():
        pmem = RecordingPmem(Memory(content), POOL_SIZE, MEDIA[medium])
        fs = FileSystem(Pool(pmem))
        context = Context(fs, random.Random(seed))
        for name in ("unlink-held", "append-block", "create-deep", "exchange-directories", "sync"):
            perform(context, name)
    found = scan(pmem)
    start = found.halves[found.superblock.active].start
    content = bytearray(pmem.view)
    areas = [(0, 512), (4096, 512), *3 * [(start, found.tail - start)]]
    damage = inflict(content, areas, random.Random(seed))
    return bytes(content), damage.size


def mended(medium: str, seed: int) -> Mended | None:
    """Damage a pool and repair it; None if that can't be done."""
    content, size = damaged(medium, seed)
    pmem = RecordingPmem(Memory(content), size, MEDIA[medium])
    with deterministic():
        try:
            repair(pmem)
        except VfsmapError:
            return None
    pmem.note(DONE)
    after = snapshot(FileSystem(Pool(RecordingPmem(pmem.memory, pmem.size, pmem.medium))))
    return Mended(content, size, pmem, after)


def problems(left: Left, whole: Mended) -> Iterator[str]:
    """Yield what is wrong when a repair that was cut off is run again."""
    pmem = RecordingPmem(left.memory, left.size, whole.pmem.medium)
    try:
        if DONE in left.marks:
            yield from (f"not durable: {finding}" for finding in check(scan(pmem)).findings)
        with deterministic():
            repair(pmem)
        yield from map(str, check(scan(pmem)).findings)
        if snapshot(FileSystem(Pool(pmem))) != whole.after:
            yield "it is mended in another way"
    except Exception as exc:
        yield f"{type(exc).__name__}: {exc}"


def lost(medium: str, seeds: range) -> list[str]:
    """Return the crashes of repairs after which a second repair does not do as well."""
    wrong, repairs = [], 0
    for seed in seeds:
        whole = mended(medium, seed)
        if whole is None:
            continue
        repairs += 1
        cuts = crashes(whole.pmem.events, whole.content, whole.size, whole.pmem.medium)
        wrong += [f"seed {seed} {left.name}: {p}" for left in cuts for p in problems(left, whole)]
    assert repairs > len(seeds) // 2
    return wrong


@pytest.mark.parametrize("medium", ["store", "flush", "sync"])
def test_a_repair_that_is_cut_off_anywhere_can_be_run_again(medium: str) -> None:
    assert lost(medium, range(6)) == []


@pytest.mark.slow
@pytest.mark.parametrize("medium", ["store", "flush", "sync", "hugetlb"])
def test_many_repairs_that_are_cut_off_anywhere_can_be_run_again(medium: str) -> None:
    assert lost(medium, range(100, 200)) == []
