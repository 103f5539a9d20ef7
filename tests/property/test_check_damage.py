"""Seeded damage to a pool's metadata: found, survived by every reader, and mended."""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple, TypeVar

import pytest

from vfsmap.errors import VfsmapError
from vfsmap.fs import FileSystem
from vfsmap.fs.check import check
from vfsmap.fs.repair import repair
from vfsmap.pool import Pool
from vfsmap.pool.layout import (
    BATCH,
    EXTENT,
    RECORD,
    SPACE,
    SUPERBLOCKS,
    USER_TAG,
    DirentRecord,
    ExtentRecord,
    InodeRecord,
    Root,
    SealRecord,
    Superblock,
    SymlinkRecord,
    TreeExtentRecord,
    XattrRecord,
)
from vfsmap.pool.scan import Scan, scan
from vfsmap.testing.damage import Damage, inflict
from vfsmap.testing.oracle import File, Snapshot, snapshot
from vfsmap.testing.recording import MEDIA, Memory, RecordingPmem
from vfsmap.testing.workload import POOL_SIZE, Context, base, deterministic, perform, steps
from vfsmap.testing.workload import parse as parse_workload
from vfsmap_tools.dump import describe

T = TypeVar("T")
FAST, SHARE, ALL = 400, 250, 10_000
KINDS = {
    kind.TAG: kind.__name__
    for kind in (
        Root,
        ExtentRecord,
        TreeExtentRecord,
        InodeRecord,
        DirentRecord,
        SymlinkRecord,
        XattrRecord,
        SealRecord,
    )
}


class Patient(NamedTuple):
    """A healthy pool, and all that is known of it."""

    content: bytes
    found: Scan
    whole: Snapshot
    earlier: frozenset[int]
    """If nobody closed it, the metadata of all states: the last batches may be lost unseen."""


@cache
def patients() -> tuple[Patient, ...]:
    """Return pools with much in the log, with a log that was just compacted, and a killed one."""
    rows = (
        "store/random:1:120",
        "store/random:2:150,compact,random:3:20",
        "store-tiny/random:4:60",
        "store/random:5:40,symlink,symlink-long,object,object,arena,seal,object-set,arena-write",
    )
    return *map(_patient, rows), _patient("store/random:6:80", killed=True)


def _patient(row: str, *, killed: bool = False) -> Patient:
    workload = parse_workload(row)
    earlier = set()
    with deterministic(tiny=workload.tiny):
        memory = Memory(base(workload.medium)[0])
        pmem = RecordingPmem(memory, POOL_SIZE, MEDIA["store"])
        fs = FileSystem(Pool(pmem))
        context = Context(fs, random.Random(row))
        for name in steps(workload)[:-1]:
            earlier.add(metadata(snapshot(fs)))
            perform(context, name)
        for ino in context.held:
            fs.drop(ino)
        whole = snapshot(fs)
        if not killed:
            fs.close()
    found = scan(RecordingPmem(memory, POOL_SIZE, MEDIA["store"]))
    assert check(found).findings == []
    assert len(whole.files) > 10
    earlier = {*earlier, metadata(whole)} if killed else set()
    return Patient(bytes(memory.view[:POOL_SIZE]), found, whole, frozenset(earlier))


def metadata(snap: Snapshot) -> int:
    """Return what tells a state from others, whatever the bytes of its files have become."""
    files = {ino: file._replace(content=b"", seal=b"") for ino, file in snap.files.items()}
    return Snapshot(snap.names, files).key


def areas(patient: Patient) -> list[tuple[int, int]]:
    """Return where the metadata lies; what holds most of it comes twice."""
    halves = patient.found.halves
    active = patient.found.superblock.active
    live = halves[active].start, patient.found.tail - halves[active].start
    return [(0, 512), (4096, 512), live, live, live, live, tuple(halves[1 - active])]


def survives(action: Callable[[], T]) -> T | None:
    """Return what an action returns, or nothing if it complains as it should."""
    try:
        return action()
    except VfsmapError:
        return None


def unhurt(patient: Patient, damage: Damage) -> Iterator[int]:
    """Yield the files no record and no byte of which the damage can have changed."""
    hurt_batches = {b.sequence for b in patient.found.batches if damage.hits(b.at, b.length)}
    hurt: set[int] = set()
    for oid, rec in patient.found.objects.items():
        tag = RECORD.unpack_from(rec)[1]
        owner = int.from_bytes(rec[RECORD.size : RECORD.size + 8], "little")
        if patient.found.objects.written[oid] in hurt_batches:
            hurt |= {oid, owner}
        if tag in SPACE and damage.hits(*EXTENT.unpack_from(rec, RECORD.size)[2:]):
            hurt |= {oid, owner}  # an arena has no owner, and is its extent
    yield from patient.whole.files.keys() - hurt


def is_right(patient: Patient, opened: Snapshot | None, content: bytearray) -> bool:
    """Tell whether what was opened is what a pool holds that is called clean."""
    hurt = [
        content[b.at : b.at + b.length] != patient.content[b.at : b.at + b.length]
        for b in patient.found.batches
    ]
    if not (patient.earlier and hurt[-1]):
        return opened == patient.whole
    only_the_last = hurt == sorted(hurt)
    return only_the_last and opened is not None and metadata(opened) in patient.earlier


def bytes_of(file: File) -> tuple[bytes, ...]:
    return file.content, file.target, file.seal, *(v for pair in file.xattrs for v in pair)


def examine(seed: int) -> str:
    """Damage a pool, read it in every way, mend it; return how it went."""
    rng = random.Random(seed)
    patient = patients()[seed % len(patients())]
    content = bytearray(patient.content)
    damage = inflict(content, areas(patient), rng)
    memory = Memory(content)
    pmem = RecordingPmem(memory, damage.size, MEDIA["store"])
    read_only = RecordingPmem(memory, damage.size, MEDIA["store"], writable=False)
    opened = survives(lambda: snapshot(FileSystem(Pool(read_only))))
    found = survives(lambda: scan(pmem))
    if found is None:
        assert opened is None
        assert survives(lambda: repair(pmem)) is None
        return "hopeless"
    assert list(describe(found))
    report = check(found)
    if not found.objects:
        assert not report.clean
        assert survives(lambda: repair(pmem)) is None
        return "hopeless"
    if report.clean:
        assert is_right(patient, opened, content), f"seed {seed}: {damage} is called clean"
    repair(pmem)
    after = scan(pmem)
    assert check(after).findings == [], f"seed {seed}: {damage} is not mended"
    mended = snapshot(FileSystem(Pool(pmem)))
    for ino in unhurt(patient, damage):
        mine = mended.files.get(ino)
        assert mine is not None, f"seed {seed}: {damage} lost inode {ino}"
        assert bytes_of(mine) == bytes_of(patient.whole.files[ino]), f"seed {seed}: inode {ino}"
    return "clean" if report.clean else "mended"


def outcomes(seeds: range) -> dict[str, int]:
    counts = {"clean": 0, "mended": 0, "hopeless": 0}
    for seed in seeds:
        counts[examine(seed)] += 1
    return counts


def test_damaged_metadata_is_found_and_mended_and_hurts_nothing_else() -> None:
    counts = outcomes(range(FAST))
    assert counts["mended"] > FAST // 4
    assert counts["hopeless"] < FAST // 20


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, ALL, SHARE))
def test_ten_thousand_damages_are_found_and_mended(first: int) -> None:
    counts = outcomes(range(first, first + SHARE))
    assert counts["hopeless"] < SHARE // 10


# what the ten thousand hit


def parts(patient: Patient) -> Iterator[tuple[str, int, int]]:
    """Yield every part of the metadata by what it is, with where it starts and its length."""
    for copy in SUPERBLOCKS:
        for name, *_ in Superblock._fields_:
            field = getattr(Superblock, name)
            yield f"superblock's {name}", copy + field.offset, field.size
    batches = patient.found.batches
    for batch in batches:
        where = {batches[0]: "first", batches[-1]: "last"}.get(batch, "middle")
        yield f"{where} batch's header", batch.at, BATCH.size
        at = batch.at + BATCH.size
        while at < batch.at + batch.length:
            length, tag, _ = RECORD.unpack_from(patient.content, at)
            yield (
                "typed object" if tag & USER_TAG else KINDS.get(tag, "end of an object"),
                at,
                length,
            )
            at += length
    spare = patient.found.halves[1 - patient.found.superblock.active]
    yield "spare half", *spare


def test_the_ten_thousand_damages_change_every_kind_of_metadata_hundreds_of_times() -> None:
    sick = [(p, bytearray(p.content), list(parts(p))) for p in patients()]
    counts: Counter[str] = Counter()
    for seed in range(ALL):
        patient, content, known = sick[seed % len(sick)]
        damage = inflict(content, areas(patient), random.Random(seed))
        counts.update(
            {
                name
                for name, at, length in known
                if damage.hits(at, length)
                and content[at : at + length] != patient.content[at : at + length]
            }
        )
        for at, length in [*damage.ranges, (damage.size, len(content) - damage.size)]:
            content[at : at + length] = patient.content[at : at + length]
    print("", *(f"{count:6} {name}" for name, count in counts.most_common()), sep="\n")
    assert set(counts) >= {name for _, _, known in sick for name, _, _ in known}
    assert set(counts) >= {*KINDS.values(), "end of an object", "typed object"}
    assert min(counts.values()) >= 300
