"""What a window's page table will be, and why it is not better.

The plan is the window's layout put into the page-table model, one mmap call after the other; the
kernel's part, which entry it makes of what, is in three rules, each tried on Linux 6.18:

- a run of the medium is mapped by 2 MiB entries where address and offset agree, the call covers
  the whole unit, and the medium holds it in huge pages; else by 4 KiB;
- hugetlbfs and device-dax map whole pages of theirs, and nothing else;
- the first store to a private mapping copies 4 KiB, or a whole page of hugetlbfs; the huge entry
  around it goes, and what is touched of it later comes back in 4 KiB entries.

What a medium holds in huge pages follows from its policy; where that is not certain (a unit that
was split, a page cache), it is measured, and handed in.
"""

from collections.abc import Iterable, Iterator
from enum import Enum
from typing import Final, NamedTuple

from vfsmap.errors import Unsupported
from vfsmap.mapping.layout import Call, Layout, levels_of
from vfsmap.pgtable import X86_64, Bits, PageTable
from vfsmap.pmem.medium import Medium
from vfsmap.units import PMD, PTE, Level, align_down, align_up, format_size

_COPIES: Final = 1 << 50  # where the model puts private copies: beyond any medium's offsets
_ZEROS: Final = 1 << 51  # where it puts the zeros of holes
_HUGE_POLICIES: Final = ("always", "within_size")


class Reason(Enum):
    """Why entries are not of the largest level that the medium can have."""

    HOLE = "it is a hole, shown as zeros"
    COPY = "it is a private copy, and the kernel copies in small pages"
    UNSHARED = "a private copy in the same unit split the huge entry"
    LIMIT = "smaller entries were asked for"
    POLICY = "the huge-page policy of the tmpfs gives it small pages"
    CACHE = "the page cache holds it in small pages"
    SPLIT = "its unit is held in small pages: it was split, or written before the file was long"
    COLOUR = "its offsets in the file and in the pool do not agree as those of the rest do"
    SHORT = "the extent does not fill a whole unit there"
    END = "the file, or what was asked of it, ends inside the unit"


class Range(NamedTuple):
    """A part of a window whose entries are alike."""

    at: int
    """Bytes from the window's base."""
    length: int
    level: Level
    reason: Reason | None
    """Why not the largest level; None: it is."""


class Backing(NamedTuple):
    """A part of the medium that is held in pages of one level."""

    start: int
    length: int
    level: Level


class Plan:
    """A window's page table as it will be once each page was touched."""

    def __init__(
        self,
        layout: Layout,
        medium: Medium,
        *,
        private: bool = False,
        limit: Level | None = None,
        backing: Iterable[Backing] = (),
    ) -> None:
        """Plan a window; ``backing``, ascending, is what was measured of the medium."""
        self.layout = layout
        self.medium = medium
        self.private = private
        self.largest = levels_of(medium)[-1]
        self.limit = limit if limit is not None and limit.size < self.largest.size else None
        self._backing = tuple(backing)
        self._base = layout.level.size + layout.residue
        self._next_copy = _COPIES
        self._table = PageTable(X86_64)
        for call in layout.calls:
            self._map(call)

    def store(self, at: int, length: int) -> None:
        """Plan plain stores to a private window, ``at`` bytes from its base."""
        self._copy(at, length, PTE if self.medium.page_size == PTE.size else self.largest)

    def own(self, at: int, length: int, granularity: Level) -> None:
        """Plan an overlay of blocks of ``granularity``, ``at`` bytes from the window's base."""
        self._copy(at, length, granularity)

    def ranges(self) -> Iterator[Range]:
        """Yield the window's ranges in order, each with its reason where one is needed."""
        last: Range | None = None
        for part in self._parts():
            if last and part.at == last.at + last.length and part[2:] == last[2:]:
                last = last._replace(length=last.length + part.length)
                continue
            if last:
                yield last
            last = part
        if last:
            yield last

    def page_sizes(self) -> dict[int, int]:
        """Return the bytes that entries of each size will map, largest size first."""
        sizes = {PMD.size: 0, PTE.size: 0}
        for run in self._table.runs():
            sizes[run.level.size] = sizes.get(run.level.size, 0) + run.length
        return dict(sorted(sizes.items(), reverse=True))

    def require(self, level: Level) -> None:
        """Check that all of the window will be mapped by entries of ``level`` at least.

        Raises:
            Unsupported: it won't; the message says where, why, and what to do about it.
        """
        for part in self.ranges():
            if part.level.size < level.size:
                raise Unsupported(
                    f"{format_size(part.length)} at {max(part.at - self.layout.skip, 0):#x} of the "
                    f"window can't be mapped by {level}: {why(part.reason, self.medium)}"
                )

    def _map(self, call: Call) -> None:
        virtual = self._base + call.at
        bits = Bits.USER if self.private else Bits.USER | Bits.WRITE
        if call.start is None:
            self._table.map(virtual, _ZEROS, call.length, Bits.USER, PTE)
            return
        for part in self._backing_of(call.start, call.start + call.length):
            at = virtual + part.start - call.start
            level = min(part.level, self.limit or part.level, key=lambda v: v.size)
            self._table.map(at, part.start, part.length, bits, level)

    def _backing_of(self, start: int, end: int) -> Iterator[Backing]:
        """Yield how a part of the medium is held: as measured, else as its policy says."""
        usual = self.largest
        small = self.medium.name == "tmpfs" and self.medium.huge not in _HUGE_POLICIES
        if small or self.medium.name == "page cache":
            usual = PTE
        for part in self._backing:
            first, last = max(part.start, start), min(part.start + part.length, end)
            if first >= last:
                continue
            if first > start:
                yield Backing(start, first - start, usual)
            yield Backing(first, last - first, part.level)
            start = last
        if start < end:
            yield Backing(start, end - start, usual)

    def _copy(self, at: int, length: int, granularity: Level) -> None:
        size = granularity.size
        low, high = self._base, self._base + self.layout.length
        start = max(align_down(low + at, size), low)
        end = min(align_up(low + at + length, size), high)
        # a block that the window's end cuts short is made of small pages
        first = align_up(start, size)
        last = max(align_down(end, size), first)
        for left, right, level in (
            (start, min(first, end), PTE),
            (first, last, granularity),
            (max(last, start), end, PTE),
        ):
            if left < right:
                self._table.copy_on_write(left, right - left, self._allocate, level)

    def _allocate(self, length: int, align: int) -> int:
        place = align_up(self._next_copy, align)
        self._next_copy = place + length
        return place

    def _parts(self) -> Iterator[Range]:
        for number, call in enumerate(self.layout.calls):
            final = number == len(self.layout.calls) - 1
            for first, last, cause in self._causes(call, final):
                for run in self._table.runs(self._base + first, last - first):
                    start = max(run.virtual - self._base, first)
                    end = min(run.end - self._base, last)
                    reason = self._reason(run.level, run.address, cause)
                    yield Range(start, end - start, run.level, reason)

    def _reason(self, level: Level, address: int, cause: Reason | None) -> Reason | None:
        if level.size >= self.largest.size:
            return None
        if _COPIES <= address < _ZEROS:
            return Reason.COPY
        return cause or (Reason.UNSHARED if self.private else Reason.SPLIT)

    def _causes(self, call: Call, final: bool) -> Iterator[tuple[int, int, Reason | None]]:
        """Yield the parts of a call, from the window's base, each with why it can't be larger."""
        unit, at, end = self.largest.size, call.at, call.at + call.length
        if call.start is None:
            yield at, end, Reason.HOLE
            return
        if self.limit is not None:
            yield at, end, Reason.LIMIT
            return
        shift = at - call.start
        head = align_up(call.start, unit) + shift
        tail = align_down(call.start + call.length, unit) + shift
        rest = Reason.END if final else Reason.SHORT
        if head >= tail:
            yield at, end, rest
            return
        if (self._base + shift) % unit:
            yield at, end, Reason.COLOUR
            return
        yield at, head, Reason.SHORT
        for part in self._backing_of(head - shift, tail - shift):
            first = part.start + shift
            yield first, first + part.length, None if part.level.size >= unit else self._small()
        yield tail, end, rest

    def _small(self) -> Reason:
        if self.medium.name == "page cache":
            return Reason.CACHE
        if self.medium.name == "tmpfs" and self.medium.huge not in _HUGE_POLICIES:
            return Reason.POLICY
        return Reason.SPLIT


_REMEDIES: Final = {
    Reason.HOLE: "allocate the range",
    Reason.COPY: "take its block over with own() in blocks of 2M",
    Reason.UNSHARED: "take its block over with own() in blocks of 2M",
    Reason.LIMIT: "ask for larger ones",
    Reason.POLICY: "mount it with huge=always and write the file again, or use MADV_COLLAPSE",
    Reason.CACHE: "put the file into a pool on a tmpfs with huge=always, or on hugetlbfs",
    Reason.SPLIT: "use MADV_COLLAPSE, or write the file again",
    Reason.COLOUR: "set user.vfsmap.align to 2M before the file is written, or copy it",
    Reason.SHORT: "set user.vfsmap.align to 2M before the file is written, or copy it",
    Reason.END: "give the file a length that is a multiple of 2M",
}


def remedy(reason: Reason | None) -> str:
    """Return what to do about it; None: the medium has no larger pages at all."""
    if reason is None:
        return "put the pool on a medium of larger pages: a hugetlbfs of 1G pages"
    return _REMEDIES[reason]


def why(reason: Reason | None, medium: Medium) -> str:
    """Return the reason and what to do about it, in one line."""
    largest = format_size(levels_of(medium)[-1].size)
    cause = reason.value if reason else f"the largest pages of {medium.name} here are {largest}"
    return f"{cause}; {remedy(reason)}"
