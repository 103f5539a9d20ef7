"""A page table, for all levels at once.

The tree is kept as runs: neighbouring entries of one level that map neighbouring addresses with
the same bits are one object, so a terabyte of 4 KiB entries costs no more than one of 1 GiB.  An
operation on part of a larger entry splits it, as the kernel does.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from sortedcontainers import SortedDict

from vfsmap.errors import Exists, Invalid, NotFound
from vfsmap.pgtable.architecture import Architecture, Bits
from vfsmap.pgtable.entry import Entry, require_bits, require_leaf
from vfsmap.pgtable.run import Run, collapsed, divided, joined, largest, stretches
from vfsmap.units import Level, align_down, align_up, require_aligned


class Step(NamedTuple):
    """One table that a walk goes through."""

    level: Level
    slot: int
    """The entry's place in the table."""


class Copy(NamedTuple):
    """What copy-on-write copied."""

    virtual: int
    length: int
    address: int
    """Where the copy is."""


class Statistics(NamedTuple):
    """What a page table is made of."""

    tables: dict[Level, int]
    """Tables that hold entries of each level."""
    table_bytes: dict[Level, int]
    entries: dict[Level, int]
    """Leaf entries of each level."""


class PageTable:
    """The page table of one address space.

    ``find_special_page`` tells of a virtual address whether it is special, for entries that have
    no bit to say so themselves (the kernel asks the mapping's owner then).
    """

    def __init__(
        self,
        architecture: Architecture,
        find_special_page: Callable[[int], bool] | None = None,
    ) -> None:
        self.architecture = architecture
        self._find_special_page = find_special_page
        self._runs: SortedDict[int, Run] = SortedDict()

    def map(
        self,
        virtual: int,
        address: int,
        length: int,
        bits: Bits = Bits.NONE,
        limit: Level | None = None,
    ) -> None:
        """Map a range by the largest leaves that both addresses, the length and ``limit`` allow.

        Raises:
            NotAligned: an address or the length is off the smallest page.
            Invalid: the range is outside the address space, or ``bits`` has one without a place.
            Exists: part of the range is mapped already.
        """
        self._range(virtual, length)
        require_aligned("address", address, self.architecture.page_size)
        if address < 0 or (address + length - 1) >> self.architecture.physical_bits:
            raise Invalid(f"{address:#x}+{length:#x} exceeds {self.architecture.name}")
        if next(self.runs(virtual, length), None) is not None:
            raise Exists(f"part of {virtual:#x}+{length:#x} is mapped already; unmap it first")
        levels = [v for v in self.architecture.leaves if limit is None or v.size <= limit.size]
        runs = list(largest(virtual, address, length, bits, levels))
        for run in runs:
            require_bits(self.architecture, run.level, bits)
        self._runs.update((run.virtual, run) for run in runs)
        self._join(virtual - 1, virtual + length + 1)

    def unmap(self, virtual: int, length: int) -> None:
        """Unmap a range; what is not mapped in it stays so."""
        self._change(*self._range(virtual, length), lambda run: None)

    def runs(self, virtual: int = 0, length: int | None = None) -> Iterator[Run]:
        """Yield the runs that overlap the range, in order of address."""
        end = 1 << self.architecture.virtual_bits if length is None else virtual + length
        before = next(self._runs.irange(maximum=virtual, reverse=True), virtual)
        for start in self._runs.irange(before, end, inclusive=(True, False)):
            if self._runs[start].end > virtual:
                yield self._runs[start]

    def walk(self, virtual: int) -> tuple[list[Step], Entry | None]:
        """Return the tables from the top down to the entry of an address, and that entry.

        Without an entry the tables that would lead to one of the smallest level are returned.
        """
        run = next(self.runs(virtual, 1), None)
        levels = self.architecture.levels
        down = levels[levels.index(run.level) if run else 0 :]
        steps = [
            Step(v, virtual >> v.shift & self.architecture.entries_per_table(v) - 1)
            for v in reversed(down)
        ]
        return steps, _entry(run, virtual) if run else None

    def protect(self, virtual: int, length: int, bits: Bits) -> None:
        """Set the rights of a range: write, user and execute, as ``bits`` has them."""
        rights = Bits.WRITE | Bits.USER | Bits.EXECUTE
        self._change(
            *self._range(virtual, length),
            lambda run: run._replace(bits=run.bits & ~rights | bits & rights),
        )

    def mark_special(self, virtual: int, length: int) -> None:
        """Say of a range that no page structures stand behind it.

        Raises:
            Invalid: its entries have no bit for that; ``find_special_page`` must say it.
        """
        for run in self.runs(virtual, length):
            require_bits(self.architecture, run.level, Bits.SPECIAL)
        self._change(
            *self._range(virtual, length),
            lambda run: run._replace(bits=run.bits | Bits.SPECIAL),
        )

    def normal_page(self, virtual: int) -> int | None:
        """Return the address of the page that backs an address; None: it is special.

        Raises:
            NotFound: nothing is mapped there.
        """
        run = next(self.runs(virtual, 1), None)
        if run is None:
            raise NotFound(f"nothing is mapped at {virtual:#x}")
        if run.level in self.architecture.special_levels:
            special = Bits.SPECIAL in run.bits
        else:
            special = self._find_special_page is not None and self._find_special_page(virtual)
        return None if special else run.address + align_down(virtual - run.virtual, self._page)

    def split(self, virtual: int, length: int, level: Level) -> None:
        """Make all larger entries that touch the range entries of ``level``.

        Raises:
            Invalid: the level may hold no leaf, or has no place for a bit they have.
        """
        require_leaf(self.architecture, level)
        for run in self.runs(virtual, length):
            require_bits(self.architecture, level, run.bits)
        self._change(
            *self._entries(virtual, length),
            lambda run: run._replace(level=min(run.level, level, key=lambda v: v.size)),
        )

    def collapse(self, virtual: int, length: int, level: Level) -> None:
        """Make smaller entries that fill the range entries of ``level``; accessed or dirty add up.

        Raises:
            NotAligned: the range is off the level's size.
            Invalid: part of it is not mapped, or not by one stretch with the same rights.
        """
        require_leaf(self.architecture, level)
        require_aligned("virtual address", virtual, level.size)
        require_aligned("length", length, level.size)
        end = virtual + length
        found = list(self.runs(virtual, length))
        mapped = sum(min(run.end, end) - max(run.virtual, virtual) for run in found)
        if mapped != length:
            raise Invalid(f"{length - mapped:#x} bytes of {virtual:#x}+{length:#x} are not mapped")
        for run in found:
            require_bits(self.architecture, level, run.bits)
        start, end = self._entries(virtual, length)
        old = [run for run in self._divide(start, end) if run.level.size < level.size]
        try:
            new = [run for stretch in stretches(old) for run in collapsed(stretch, level)]
            for run in old:
                del self._runs[run.virtual]
            self._runs.update((run.virtual, run) for run in new)
        finally:
            self._join(start - 1, end + 1)

    def touch(self, virtual: int, length: int, *, store: bool = False) -> None:
        """Set what the processor sets at a load, or at a store, in each entry of the range."""
        bits = Bits.ACCESSED
        if store:
            bits |= Bits.DIRTY
            if Bits.SOFT_DIRTY in self.architecture.on:
                bits |= Bits.SOFT_DIRTY
        self._change(
            *self._entries(virtual, length), lambda run: run._replace(bits=run.bits | bits)
        )

    def clear_accessed(self, virtual: int, length: int) -> list[Run]:
        """Clear the accessed bit of each entry of the range; return the runs that had it."""
        return self._harvest(virtual, length, Bits.ACCESSED)

    def clear_dirty(self, virtual: int, length: int) -> list[Run]:
        """Clear both dirty bits of each entry of the range; return the runs that had one."""
        return self._harvest(virtual, length, Bits.DIRTY | Bits.SOFT_DIRTY)

    def copy_on_write(
        self,
        virtual: int,
        length: int,
        allocate: Callable[[int, int], int],
        granularity: Level | None = None,
    ) -> list[Copy]:
        """Give a range that is stored to pages of its own, where it may not be written yet.

        Whole pages of ``granularity`` are copied, or by default of each entry's own size, and
        become writable and dirty.  ``allocate(length, align)`` returns where a copy goes.
        """
        if granularity is not None:
            require_leaf(self.architecture, granularity)
        copies: list[Copy] = []
        for run in list(self.runs(virtual, length)):
            level = granularity or run.level
            done = copies[-1].virtual + copies[-1].length if copies else 0
            start = max(align_down(max(virtual, run.virtual), level.size), done)
            end = align_up(min(virtual + length, run.end), level.size)
            if Bits.WRITE in run.bits or start >= end:
                continue
            copy = Copy(start, end - start, allocate(end - start, level.size))
            copies.append(copy)
            self.unmap(start, end - start)
            bits = run.bits & ~Bits.SPECIAL | Bits.WRITE
            self.map(start, copy.address, end - start, bits, level)
            self.touch(start, end - start, store=True)
        return copies

    def statistics(self) -> Statistics:
        """Count tables, their bytes, and leaf entries, for each level."""
        levels = self.architecture.levels
        tables = dict.fromkeys(levels, 0)
        entries = dict.fromkeys(levels, 0)
        last = dict.fromkeys(levels, -1)
        for run in self._runs.values():
            entries[run.level] += run.length // run.level.size
            for level in levels[levels.index(run.level) :]:
                span = self.architecture.entries_per_table(level) * level.size
                first, final = run.virtual // span, (run.end - 1) // span
                tables[level] += final - max(first, last[level] + 1) + 1
                last[level] = final
        tables[levels[-1]] = 1
        size = self.architecture.entry_bytes
        used = {v: n * size * self.architecture.entries_per_table(v) for v, n in tables.items()}
        return Statistics(tables, used, entries)

    @property
    def _page(self) -> int:
        return self.architecture.page_size

    def _range(self, virtual: int, length: int) -> tuple[int, int]:
        """Return the ends of a range that is one."""
        require_aligned("virtual address", virtual, self._page)
        require_aligned("length", length, self._page)
        if virtual < 0 or length <= 0 or (virtual + length - 1) >> self.architecture.virtual_bits:
            raise Invalid(f"{virtual:#x}+{length:#x} is no range of {self.architecture.name}")
        return virtual, virtual + length

    def _entries(self, virtual: int, length: int) -> tuple[int, int]:
        """Return the ends of the entries that touch a range."""
        start, end = self._range(virtual, length)
        first = next(self.runs(start, 1), None)
        last = next(self.runs(end - 1, 1), None)
        return (
            align_down(start, first.level.size) if first else start,
            align_up(end, last.level.size) if last else end,
        )

    def _harvest(self, virtual: int, length: int, bits: Bits) -> list[Run]:
        old = self._change(
            *self._entries(virtual, length), lambda run: run._replace(bits=run.bits & ~bits)
        )
        return [run for run in old if run.bits & bits]

    def _change(self, start: int, end: int, change: Callable[[Run], Run | None]) -> list[Run]:
        """Put what ``change`` makes of it in the place of each run of a range; return the old."""
        old = self._divide(start, end)
        for run in old:
            new = change(run)
            if new is None:
                del self._runs[run.virtual]
            else:
                self._runs[run.virtual] = new
        self._join(start - 1, end + 1)
        return old

    def _divide(self, start: int, end: int) -> list[Run]:
        """Make both addresses ends of runs, splitting entries there; return the runs between."""
        low, high = start, end
        for at in (start, end):
            run = next(self.runs(at, 1), None)
            if run is not None and run.virtual < at:
                parts = list(divided(run, at, self.architecture.leaves))
                for part in parts:
                    require_bits(self.architecture, part.level, part.bits)
                self._runs.update((part.virtual, part) for part in parts)
                low, high = min(low, run.virtual), max(high, run.end)
        # what an entry became may be like its neighbours; only at the two nothing is joined
        self._join(low - 1, start)
        self._join(start, end)
        self._join(end, high + 1)
        return list(self.runs(start, end - start))

    def _join(self, start: int, end: int) -> None:
        near = list(self.runs(start, end - start))
        for run in near:
            del self._runs[run.virtual]
        self._runs.update((run.virtual, run) for run in joined(near))


def _entry(run: Run, virtual: int) -> Entry:
    start = align_down(virtual, run.level.size)
    return Entry(run.level, run.address + start - run.virtual, run.bits)
