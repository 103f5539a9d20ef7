"""Which bytes of the pool are free: aligned runs, whole units first, for every level alike.

Free space is kept as *fragments*.  A fragment of a level is a run of whole, aligned pieces of that
level's size inside one unit of the next level; a run that fills such a unit is promoted to the next
level.  So a request for small pieces never looks at a free huge unit before the fragments are gone,
and what is freed grows back into huge units by itself.
"""

from collections.abc import Iterator

from sortedcontainers import SortedDict

from vfsmap.errors import Invalid, NoSpace
from vfsmap.units import LEVELS, PTE, Level, align_down, align_up, format_size, require_aligned


class _Fragments:
    """The free fragments of one level.

    Taking from the start of a fragment, the commonest change of all, sorts nothing anew: order is
    kept by the ends.  ``lengths`` has bit ``n`` set where there is a fragment of ``n`` pieces, so
    the smallest one that fits is found by shifting.
    """

    __slots__ = ("by_end", "by_length", "by_start", "lengths", "shift")

    def __init__(self, level: Level) -> None:
        self.shift = level.shift
        self.by_start: dict[int, int] = {}
        self.by_end: SortedDict[int, int] = SortedDict()
        self.by_length: dict[int, dict[int, None]] = {}
        """The starts of the fragments of so many pieces; a dict, as it keeps an order."""
        self.lengths = 0

    def add(self, start: int, end: int) -> None:
        self.by_start[start] = end
        self.by_end[end] = start
        self._note_length(start, end)

    def remove(self, start: int) -> int:
        end = self.by_start.pop(start)
        del self.by_end[end]
        self._forget_length(start, end)
        return end

    def move_start(self, start: int, to: int) -> None:
        """Make a fragment begin elsewhere: it is cut there, or grows."""
        end = self.by_start.pop(start)
        self._forget_length(start, end)
        self.by_start[to] = end
        self.by_end[end] = to
        self._note_length(to, end)

    def _note_length(self, start: int, end: int) -> None:
        pieces = end - start >> self.shift
        starts = self.by_length.get(pieces)
        if starts is None:
            self.by_length[pieces] = {start: None}
            self.lengths |= 1 << pieces
        else:
            starts[start] = None

    def _forget_length(self, start: int, end: int) -> None:
        pieces = end - start >> self.shift
        starts = self.by_length[pieces]
        del starts[start]
        if not starts:
            del self.by_length[pieces]
            self.lengths ^= 1 << pieces

    def overlapping(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return the fragments, as start and end, that have a byte in the range."""
        found = []
        for last in self.by_end.irange(start, None, (False, False)):
            first = self.by_end[last]
            if first >= end:
                break
            found.append((first, last))
        return found

    def smallest(self, length: int) -> int | None:
        """Return the start of the smallest fragment of at least ``length`` bytes."""
        pieces = -(-length >> self.shift)
        longer = self.lengths >> pieces
        if not longer:
            return None
        return self._any_of(pieces + (longer & -longer).bit_length() - 1)

    def longest(self) -> tuple[int, int]:
        """Return length and start of the longest fragment, or zeros."""
        pieces = self.lengths.bit_length() - 1
        return (pieces << self.shift, self._any_of(pieces)) if pieces > 0 else (0, 0)

    def _any_of(self, pieces: int) -> int:
        """Return the start of the youngest fragment of so many pieces."""
        starts = self.by_length[pieces]
        # next(iter(starts)) would walk over the places of all that were deleted
        start, _ = starts.popitem()
        starts[start] = None
        return start


class Allocator:
    """The free space of a pool; it starts empty, and :meth:`free` fills it."""

    def __init__(self, levels: tuple[Level, ...] = LEVELS) -> None:
        self._levels = levels
        self._fragments = [_Fragments(level) for level in levels]
        self._row = {level: row for row, level in enumerate(levels)}
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
        row = self._row[level]
        found = self._at_goal(goal, row, length, minimum or length) or self._fit(length, row)
        if found is None and minimum:
            found = self._longest(minimum, row)
        if found is None:
            raise NoSpace(
                f"no free run of {format_size(length)}; the largest that starts at a multiple of "
                f"{format_size(level.size)} has {format_size(self.largest(level))}"
            )
        row, start = found
        fragments = self._fragments[row]
        end = fragments.by_start[start]
        got = min(length, end - start)
        if start + got == end:
            fragments.remove(start)
        elif got & (1 << fragments.shift) - 1:
            fragments.remove(start)
            self._insert(start + got, end, 0)
        else:
            fragments.move_start(start, start + got)
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
        return max(f.longest()[0] for f in self._fragments[self._row[level] :])

    def runs(self) -> Iterator[tuple[int, int]]:
        """Yield every free fragment as start and length, in no particular order."""
        for fragments in self._fragments:
            for start, end in fragments.by_start.items():
                yield start, end - start

    def free_in_units(self, level: Level) -> int:
        """Return the free bytes that lie in whole, aligned units of the level."""
        row = self._row[level]
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
            if top or fragments.by_start[end] - start < unit:
                fragments.move_start(end, start)
                return
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
        length, start, at = max((*self._fragments[at].longest(), at) for at in rows)
        return (at, start) if length >= minimum else None
