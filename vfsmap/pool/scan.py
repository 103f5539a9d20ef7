"""A pool read as far as it can be read: for checking, repairing and dumping, never for use.

Where opening a pool ends at the first damaged batch, a scan notes the gap and goes on behind it.
Nothing is stored to the medium.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from typing import Final, NamedTuple

from vfsmap.errors import NotAPool, PoolDamaged
from vfsmap.pmem import Pmem
from vfsmap.pool import superblock
from vfsmap.pool.layout import BATCH, SUPERBLOCKS, Superblock
from vfsmap.pool.log import LogHalf, Place

_MOST_DIFFERENCES: Final = 10
_LOOKS: Final = 20
_ANY_SIZE: Final = 1 << 64


class Batch(NamedTuple):
    """A whole batch of the active half."""

    sequence: int
    at: int
    length: int
    next_oid: int


class Gap(NamedTuple):
    """Batches that are not whole, though newer ones are, or though they once were durable."""

    at: int
    first: int
    """The sequence of the first batch that is missing."""
    missing: int

    def __str__(self) -> str:
        """Return what is missing."""
        what = f"batch {self.first}"
        if self.missing != 1:
            what = f"batches {self.first} to {self.first + self.missing - 1}"
        return f"{what} of the log, at {self.at:#x}, {'is' if self.missing == 1 else 'are'} damaged"


class Objects(dict[int, bytes]):
    """Objects and their records, and for each the sequence of the batch that it comes from."""

    def __init__(self) -> None:
        super().__init__()
        self.sequence = 0
        self.written: dict[int, int] = {}

    def __setitem__(self, oid: int, rec: bytes) -> None:
        super().__setitem__(oid, rec)
        self.written[oid] = self.sequence


@dataclass
class Scan:
    """What a pool holds, as far as that can be read."""

    size: int
    """Bytes of the file."""
    superblock: Superblock
    complaints: list[str]
    """About copies of the superblock that are not usable, or older than the other."""
    rebuilt: bool = False
    """Whether the superblock was put together from two damaged copies."""
    batches: list[Batch] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    nonsense: list[str] = field(default_factory=list)
    """Batches that are whole but hold something that is not a record."""
    objects: Objects = field(default_factory=Objects)
    next_oid: int = 1
    tail: int = 0

    @property
    def halves(self) -> list[Place]:
        """Where the two halves of the log lie; shorter where the file ends inside."""
        return [
            Place(half.start, max(0, min(half.length, self.size - half.start)))
            for half in self.superblock.halves
        ]

    @property
    def truncated(self) -> bool:
        """Tell whether the file has become shorter than the pool."""
        return self.size < int(self.superblock.size)

    @property
    def damaged(self) -> bool:
        """Tell whether a part of the log is missing."""
        return bool(self.gaps or self.nonsense)


def scan(pmem: Pmem) -> Scan:
    """Read a pool.

    Beside a writer it looks again until it has seen one finished state.

    Raises:
        NotAPool: it is none, or of a newer format.
        PoolDamaged: neither copy of the superblock can be used.
    """
    found = _scan_once(pmem)
    last: tuple[list[Gap], int] | None = None
    for _ in range(_LOOKS):
        settled = not found.damaged or last == (found.gaps, found.tail)
        # a writer that switched halves meanwhile may have overwritten what was just read
        if settled and _superblock(pmem)[0].epoch == found.superblock.epoch:
            break
        last = found.gaps, found.tail
        found = _scan_once(pmem)
    return found


def _scan_once(pmem: Pmem) -> Scan:
    sb, complaints, rebuilt = _superblock(pmem)
    found = Scan(len(pmem.view), sb, complaints, rebuilt)
    half = LogHalf(pmem, found.halves[sb.active], sb.generation, zlib.crc32(bytes(sb.uuid)))
    try:
        # by sequence, not by place: a sector that went astray may have taken batches along
        found.batches = sorted({batch.sequence: batch for batch in _batches(pmem, half)}.values())
    except PoolDamaged as exc:
        found.nonsense.append(str(exc))
    tail, sequence = half.place.start, 0
    for batch in found.batches:
        if batch.sequence != sequence:
            found.gaps.append(Gap(tail, sequence, batch.sequence - sequence))
        _replay(half, batch, found)
        tail, sequence = batch.at + batch.length, batch.sequence + 1
    if sequence < sb.batches:
        found.gaps.append(Gap(tail, sequence, int(sb.batches) - sequence))
    found.tail = tail
    found.next_oid = max(found.next_oid, max(found.objects, default=0) + 1)
    return found


def _batches(pmem: Pmem, half: LogHalf) -> Iterator[Batch]:
    """Yield the whole batches of a half, in the order in which they lie there."""
    at = half.place.start
    while True:
        half.tail, half.sequence = at, 0
        if batch := half.valid_batch(at, 0, newer=True):
            length, next_oid = batch
            sequence = BATCH.unpack_from(pmem.view, at)[3]
            yield Batch(sequence, at, length, next_oid)
            at += length
        elif newer := half.find_newer():
            at = newer[0]
        else:
            return


def _replay(half: LogHalf, batch: Batch, found: Scan) -> None:
    half.tail, half.sequence = batch.at, batch.sequence
    found.objects.sequence = batch.sequence
    found.next_oid = max(found.next_oid, batch.next_oid)
    try:
        half.replay_batch(batch.length, found.objects)
    except PoolDamaged as exc:
        found.nonsense.append(str(exc))


def _superblock(pmem: Pmem) -> tuple[Superblock, list[str], bool]:
    try:
        sb, complaints = superblock.load(pmem.view)
    except (NotAPool, PoolDamaged) as exc:
        merged = _merged(pmem)
        if merged is None:
            raise type(exc)(f"{pmem.path}: {exc}") from exc
        return merged, [str(exc)], True
    return sb, complaints, False


def _merged(pmem: Pmem) -> Superblock | None:
    """Return the superblock that both copies were, when each is damaged elsewhere.

    Where the copies differ, one of them is right; the checksum tells which.  A file that is too
    short for it is another matter.
    """
    copies = [bytes(pmem.view[at : at + superblock.SIZE]) for at in SUPERBLOCKS]
    if any(len(copy) < superblock.SIZE for copy in copies):
        return None
    words = range(0, superblock.SIZE, 8)
    differing = [at for at in words if copies[0][at : at + 8] != copies[1][at : at + 8]]
    if len(differing) > _MOST_DIFFERENCES:
        return None
    for count in range(len(differing) + 1):
        for chosen in combinations(differing, count):
            raw = bytearray(copies[0])
            for at in chosen:
                raw[at : at + 8] = copies[1][at : at + 8]
            if not superblock.problem(bytes(raw), _ANY_SIZE):
                return Superblock.from_buffer_copy(raw)
    return None
