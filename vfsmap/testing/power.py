"""What a medium can hold after a power cut: a model that is fed the recorded events.

On a medium of CPU caches the unit is the line of 64 bytes: a line that was stored to may have been
written back at any time, and each of its words may have any value that it had since it was durable.
On a page cache the unit is the page of 4 KiB, written back at any time, and torn between its
sectors of 512 bytes.  A punched range holds zeros or what it held, page by page, until the file
system below has been told to remember.

A :data:`choice <PowerModel.choices>` names one of the states: ``n`` nothing that is not durable,
``a`` all of it, ``m5`` the parts of this bit mask, ``r7`` a part here and half a part there, drawn
with this seed.
"""

import hashlib
import random
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple, Self

from vfsmap.pmem import Commit
from vfsmap.testing.recording import (
    PAGE,
    Event,
    Fdatasync,
    Fence,
    Flush,
    Memory,
    Msync,
    Punch,
    Resize,
    Store,
)

LINE: Final = 64
WORD: Final = 8
SECTOR: Final = 512
_FEW: Final = 4
_MOST_GROUPS: Final = 1024

Piece = tuple[int, bytes]
"""Where bytes go, and the bytes."""


class Ranges:
    """Byte ranges of the pool that somebody may read."""

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Take ranges as start and length; they may overlap."""
        self._starts: list[int] = []
        self._ends: list[int] = []
        for start, length in sorted(ranges):
            if self._ends and start <= self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], start + length)
            else:
                self._starts.append(start)
                self._ends.append(start + length)

    def overlap(self, start: int, length: int) -> bool:
        """Tell whether any byte of the range is among them."""
        at = bisect_right(self._starts, start + length - 1) - 1
        return at >= 0 and self._ends[at] > start

    def clip(self, start: int, length: int) -> Iterator[tuple[int, int]]:
        """Yield the parts of a range that are among them, as start and length."""
        for first, last in zip(self._starts, self._ends, strict=True):
            a, b = max(start, first), min(start + length, last)
            if a < b:
                yield a, b - a


class Digest:
    """A memory's content as one number, kept up to date page by page."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.value = 0

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Take every change back when the block ends."""
        value, mark = self.value, self.memory.mark()
        try:
            yield
        finally:
            self.memory.rollback(mark)
            self.value = value

    def write(self, pieces: Iterable[Piece]) -> None:
        """Change the memory; the value follows."""
        pieces = list(pieces)
        pages = {
            page
            for offset, data in pieces
            for page in range(offset // PAGE, (offset + len(data) - 1) // PAGE + 1)
        }
        for page in pages:
            self.value ^= self._of(page)
        for offset, data in pieces:
            self.memory.write(offset, data)
        for page in pages:
            self.value ^= self._of(page)

    def _of(self, page: int) -> int:
        # a checksum would not do: it is blind to what carries one of the same kind
        content = self.memory.view[page * PAGE : (page + 1) * PAGE]
        salt = page.to_bytes(8, "little")
        return int.from_bytes(hashlib.blake2b(content, digest_size=8, salt=salt).digest(), "little")


class Part(NamedTuple):
    """Something that is not durable yet: stores to one unit, a punched range, a longer file."""

    pieces: list[Piece]
    tear: int
    """Bytes of which each group holds together when the part is torn."""
    size: int = 0


class PowerModel:
    """The durable content of a medium, and what may or may not have got there besides."""

    def __init__(self, durable: Digest, size: int, commit: Commit) -> None:
        """Start with a medium all of whose bytes are durable; it is changed as events go by."""
        self._durable = durable
        self.size = size
        self._page_cache = commit is Commit.SYNC
        self._unit = PAGE if self._page_cache else LINE
        self._dirty: dict[int, list[Piece]] = {}
        self._flushed: dict[int, int] = {}
        self._punched: list[tuple[int, int]] = []
        self._longer = 0

    def copy(self) -> Self:
        """Return a model in the same state, over the same durable content."""
        commit = Commit.SYNC if self._page_cache else Commit.FLUSH
        twin = type(self)(self._durable, self.size, commit)
        twin._dirty = {unit: list(pieces) for unit, pieces in self._dirty.items()}
        twin._flushed = dict(self._flushed)
        twin._punched = list(self._punched)
        twin._longer = self._longer
        return twin

    def feed(self, event: Event) -> None:
        """Do what an event does to the medium."""
        match event:
            case Store(offset, data):
                self._store(offset, data)
            case Flush(offset, length):
                for unit in self._units(offset, length):
                    self._flushed[unit] = len(self._dirty[unit])
            case Fence():
                flushed, self._flushed = self._flushed, {}
                for unit, count in flushed.items():
                    self._settle(unit, count)
            case Msync(offset, length):
                self._settle_file()
                self._settle_all(self._units(offset, length))
            case Fdatasync():
                self._settle_file()
                self._settle_all(list(self._dirty) if self._page_cache else [])
            case Punch(offset, length):
                # what was stored there before goes with the blocks that held it
                self._settle_all(self._units(offset, length))
                self._punched.append((offset, length))
            case Resize(size):
                self._longer = size

    def _units(self, offset: int, length: int) -> list[int]:
        """Return the dirty units of a range."""
        first, last = offset // self._unit, (offset + length - 1) // self._unit
        if last - first > len(self._dirty):
            return [unit for unit in self._dirty if first <= unit <= last]
        return [unit for unit in range(first, last + 1) if unit in self._dirty]

    def _store(self, offset: int, data: bytes) -> None:
        at, size = 0, self._unit
        while at < len(data):
            unit, inside = divmod(offset + at, size)
            piece = data[at : at + size - inside]
            self._dirty.setdefault(unit, []).append((offset + at, piece))
            at += len(piece)

    def _settle(self, unit: int, count: int | None = None) -> None:
        """Make the first stores to a unit, or all, durable."""
        pieces = self._dirty.pop(unit, [])
        self._flushed.pop(unit, None)
        count = len(pieces) if count is None else count
        self._durable.write(pieces[:count])
        for offset, data in pieces[:count]:
            self._keep_from_punches(offset, len(data))
        if pieces[count:]:
            self._dirty[unit] = pieces[count:]

    def _settle_all(self, units: list[int]) -> None:
        for unit in units:
            self._settle(unit)

    def _keep_from_punches(self, offset: int, length: int) -> None:
        """Forget that a range was punched: something newer is there."""
        if not any(at < offset + length and offset < at + size for at, size in self._punched):
            return
        rest = []
        for at, size in self._punched:
            for first, last in (
                (at, min(at + size, offset)),
                (max(at, offset + length), at + size),
            ):
                if first < last:
                    rest.append((first, last - first))
        self._punched = rest

    def _settle_file(self) -> None:
        self._durable.write((offset, bytes(length)) for offset, length in self._punched)
        self._punched.clear()
        if self._longer:
            self.size, self._longer = self._longer, 0

    # the states

    def parts(self, relevant: Ranges) -> list[Part]:
        """Return what is not durable yet and lies where somebody would read it."""
        parts = [
            Part([piece], PAGE)
            for offset, length in self._punched
            for piece in ((at, bytes(size)) for at, size in relevant.clip(offset, length))
        ]
        tear = SECTOR if self._page_cache else WORD
        for unit in sorted(self._dirty):
            if relevant.overlap(unit * self._unit, self._unit):
                parts.append(Part(self._dirty[unit], tear))
        if self._longer:
            parts.append(Part([], PAGE, self._longer))
        return parts

    def choices(self, parts: list[Part], samples: int, rng: random.Random) -> list[str]:
        """Return the states to try: all of them where that is few, else a bounded choice."""
        count = len(parts)
        if count == 0:
            return ["n"]
        everything = (1 << count) - 1
        if count <= _FEW:
            masks = list(range(1, everything))
        else:
            some = range(count) if count <= samples else rng.sample(range(count), samples)
            masks = [1 << at for at in some] + [everything & ~(1 << at) for at in some]
            masks += [1 << a | 1 << b for a, b in (rng.sample(range(count), 2) for _ in some)]
        seeds = [f"r{rng.getrandbits(32):x}" for _ in range(samples)]
        return ["n", "a", *(f"m{mask:x}" for mask in dict.fromkeys(masks)), *seeds]

    def state(self, parts: list[Part], choice: str) -> tuple[list[Piece], int]:
        """Return what a choice adds to the durable content, and how long it leaves the file."""
        kind, text = choice[0], choice[1:]
        pieces: list[Piece] = []
        size = self.size
        if kind == "r":
            rng = random.Random(text)
            for part in parts:
                pieces += self._drawn(part, rng)
                size = rng.choice((part.size, size)) if part.size else size
            return pieces, size
        mask = {"n": 0, "a": -1}[kind] if kind in "na" else int(text, 16)
        for at, part in enumerate(parts):
            if mask >> at & 1:
                pieces += part.pieces
                size = part.size or size
        return pieces, size

    def _drawn(self, part: Part, rng: random.Random) -> list[Piece]:
        """Return some of a part: none, all, the first stores, or words of different ages."""
        match rng.randrange(5):
            case 0:
                return []
            case 1:
                return part.pieces
            case 2:
                return part.pieces[: rng.randrange(len(part.pieces) + 1)]
            case _:
                return [torn for piece in part.pieces for torn in tear(piece, part.tear, rng)]


def pieces_of(event: Event) -> list[Piece]:
    """Return what an event changes in the eyes of processes."""
    if isinstance(event, Store):
        return [(event.offset, event.data)]
    if isinstance(event, Punch):
        return [(event.offset, bytes(event.length))]
    return []


def tear(piece: Piece, grain: int, rng: random.Random) -> Iterator[Piece]:
    """Yield some of the aligned groups of bytes that a store consists of.

    A group has ``grain`` bytes, a power of two, or as many more as keep them countable.
    """
    offset, data = piece
    while len(data) > _MOST_GROUPS * grain:
        grain *= 2
    share = rng.choice((0.2, 0.5, 0.8))
    at = start = 0
    while at < len(data):
        length = min(grain - (offset + at) % grain, len(data) - at)
        if rng.random() >= share:
            if start < at:
                yield offset + start, data[start:at]
            start = at + length
        at += length
    if start < at:
        yield offset + start, data[start:at]
