"""Which bytes of the pool are free: aligned runs, whole units first, for every level alike.

Free space is kept as *fragments*.  A fragment of a level is a run of whole, aligned pieces of that
level's size inside one unit of the next level; a run that fills such a unit is promoted to the next
level.  So a request for small pieces never looks at a free huge unit before the fragments are gone,
and what is freed grows back into huge units by itself.
"""

from collections.abc import Iterator

from sortedcontainers import SortedDict, SortedList

from vfsmap.errors import Invalid, NoSpace
from vfsmap.units import LEVELS, PTE, Level, align_down, align_up, format_size, require_aligned


class _Fragments:
    """The free fragments of one level."""

    def __init__(self) -> None:
        self.by_start: SortedDict[int, int] = SortedDict()
        self.by_end: dict[int, int] = {}
        self.by_length: SortedList[tuple[int, int]] = SortedList()

    def add(self, start: int, end: int) -> None:
        self.by_start[start] = end
        self.by_end[end] = start
        self.by_length.add((end - start, start))

    def remove(self, start: int) -> int:
        end: int = self.by_start.pop(start)
        del self.by_end[end]
        self.by_length.remove((end - start, start))
        return end

    def overlapping(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return the fragments, as start and end, that have a byte in the range."""
        before = self.by_start.bisect_right(start) - 1
        least = self.by_start.keys()[before] if before >= 0 else None
        found = ((at, self.by_start[at]) for at in self.by_start.irange(least, end, (True, False)))
        return [(first, last) for first, last in found if last > start]

    def smallest(self, length: int) -> int | None:
        """Return the start of the smallest fragment of at least ``length`` bytes."""
        at = self.by_length.bisect_left((length, 0))
        return self.by_length[at][1] if at < len(self.by_length) else None


class Allocator:
    """The free space of a pool; it starts empty, and :meth:`free` fills it."""

    def __init__(self, levels: tuple[Level, ...] = LEVELS) -> None:
        self._levels = levels
        self._fragments = [_Fragments() for _ in levels]
        self.free_bytes = 0
        self.promoted: dict[int, int] = {}
        """Starts and lengths of runs of whole units that came together since this was emptied."""

    def allocate(
        self, length: int, level: Level = PTE, *, goal: int | None = None, minimum: int = 0
    ) -> tuple[int, int]:
        """Take a run and return its start and length.

        A run that starts or ends inside a unit of a larger level does not reach over its border.

        Args:
            length: bytes wanted, a multiple of the level's size.
            level: the run starts at a multiple of this level's size.
            goal: take the run right here if it is free, so that a file grows in one piece.
            minimum: a shorter run, of at least so many bytes, is welcome where there is none of
                ``length``; 0 asks for all or nothing.

        Raises:
            NotAligned, Invalid: ``length`` is not a multiple of the level's size, or not above 0.
            NoSpace: there is no such run.
        """
        if length <= 0:
            raise Invalid(f"a run can't have {length} bytes")
        require_aligned("length", length, level.size)
        row = self._levels.index(level)
        found = self._at_goal(goal, row, length, minimum or length) or self._fit(length, row)
        if found is None and minimum:
            found = self._longest(minimum, row)
        if found is None:
            raise NoSpace(
                f"no free run of {format_size(length)}; the largest that starts at a multiple of "
                f"{format_size(level.size)} has {format_size(self.largest(level))}"
            )
        row, start = found
        end = self._fragments[row].remove(start)
        got = min(length, end - start)
        if start + got < end:
            self._insert(start + got, end, 0)
        self.free_bytes -= got
        return start, got

    def free(self, start: int, length: int) -> None:
        """Give a run back; it merges with its neighbours and is promoted level by level."""
        require_aligned("start", start, self._levels[0].size)
        require_aligned("length", length, self._levels[0].size)
        self._insert(start, start + length, 0)
        self.free_bytes += length

    def withhold(self, start: int, length: int) -> list[tuple[int, int]]:
        """Take whatever is free in this range, and return the runs taken."""
        taken = []
        for fragments in self._fragments:
            for first, last in fragments.overlapping(start, start + length):
                fragments.remove(first)
                a, b = max(first, start), min(last, start + length)
                taken.append((a, b - a))
                if first < a:
                    self._insert(first, a, 0)
                if b < last:
                    self._insert(b, last, 0)
        self.free_bytes -= sum(run[1] for run in taken)
        return taken

    def free_units(self, start: int, length: int) -> list[tuple[int, int]]:
        """Return what is free in this range, in whole units of a level above the smallest."""
        end = start + length
        return [
            (max(first, start), min(last, end) - max(first, start))
            for fragments in self._fragments[1:]
            for first, last in fragments.overlapping(start, end)
        ]

    def largest(self, level: Level) -> int:
        """Return the length of the largest run that starts at a multiple of the level's size."""
        row = self._levels.index(level)
        return max(
            (f.by_length[-1][0] for f in self._fragments[row:] if f.by_length),
            default=0,
        )

    def runs(self) -> Iterator[tuple[int, int]]:
        """Yield every free fragment as start and length, in no particular order."""
        for fragments in self._fragments:
            for start, end in fragments.by_start.items():
                yield start, end - start

    def free_in_units(self, level: Level) -> int:
        """Return the free bytes that lie in whole, aligned units of the level."""
        row = self._levels.index(level)
        return sum(end - start for f in self._fragments[row:] for start, end in f.by_start.items())

    def _insert(self, start: int, end: int, row: int) -> None:
        """Add a run of whole pieces of the row's level, merged and promoted."""
        if row + 1 == len(self._levels):
            self._merge(start, end, row)
            return
        unit = self._levels[row + 1].size
        first, last = align_up(start, unit), align_down(end, unit)
        if first > last:  # inside one unit
            self._merge(start, end, row)
            return
        if first < last:
            if row == 0:
                self.promoted[first] = max(last - first, self.promoted.get(first, 0))
            self._insert(first, last, row + 1)
        if start < first:
            self._merge(start, first, row)
        if last < end:
            self._merge(last, end, row)

    def _merge(self, start: int, end: int, row: int) -> None:
        fragments = self._fragments[row]
        top = row + 1 == len(self._levels)
        unit = 0 if top else self._levels[row + 1].size
        if start in fragments.by_end and (top or start % unit):
            before = fragments.by_end[start]
            fragments.remove(before)
            start = before
        if end in fragments.by_start and (top or end % unit):
            end = fragments.remove(end)
        if not top and end - start == unit:
            self._insert(start, end, row)
        else:
            fragments.add(start, end)

    def _at_goal(
        self, goal: int | None, row: int, length: int, least: int
    ) -> tuple[int, int] | None:
        """Return the row and start of the fragment at the goal, if taking from it is right.

        A unit of a larger level is not broken just to grow in one piece.
        """
        if goal is None:
            return None
        for at in range(row, len(self._levels)):
            end = self._fragments[at].by_start.get(goal)
            if end is not None:
                broken = at > row and end - goal > length
                return (at, goal) if end - goal >= least and not broken else None
        return None

    def _fit(self, length: int, row: int) -> tuple[int, int] | None:
        for at in range(row, len(self._levels)):
            start = self._fragments[at].smallest(length)
            if start is not None:
                return at, start
        return None

    def _longest(self, minimum: int, row: int) -> tuple[int, int] | None:
        rows = range(row, len(self._levels))
        longest = [
            (*self._fragments[at].by_length[-1], at) for at in rows if self._fragments[at].by_length
        ]
        length, start, at = max(longest, default=(0, 0, 0))
        return (at, start) if length >= minimum else None
