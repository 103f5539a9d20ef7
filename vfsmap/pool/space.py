"""The pool's bytes that nobody owns: taken, reserved in the file system below, given back."""

from collections.abc import Iterable

from vfsmap.alloc import Allocator
from vfsmap.errors import NoSpace, PoolDamaged
from vfsmap.pmem import Pmem
from vfsmap.pool.layout import BLOCK, FIRST_FREE
from vfsmap.units import MIB, PMD, PTE, Level, align_down, align_up

Run = tuple[int, int]
"""Start in the pool and length, bytes."""


class Space(Allocator):
    """Free space that knows its medium.

    What is handed out is reserved below, so that a store to it can't fail; a reservation is made
    for a whole unit at a time and kept until the unit is free again and trimmed.
    """

    def __init__(self, pmem: Pmem) -> None:
        super().__init__()
        self._pmem = pmem
        self._unit = max(PMD.size, pmem.medium.page_size)
        self._reserved: set[int] = set()

    def fill(self, used: Iterable[Run], size: int) -> None:
        """Make everything free but the superblocks and the runs in ``used``.

        Raises:
            PoolDamaged: two runs overlap, or one lies outside the pool or off its blocks.
        """
        at = FIRST_FREE
        for start, length in sorted(used):
            end = start + length
            if start < at:
                raise PoolDamaged(f"pool bytes at {start:#x} belong to two extents")
            if end > size:
                raise PoolDamaged(f"an extent ends at {end:#x}, behind the pool's end at {size:#x}")
            if (start | end) % BLOCK:
                raise PoolDamaged(f"an extent lies at {start:#x} to {end:#x}, not on whole blocks")
            if start > at:
                self.free(at, start - at)
            at = end
        if at < size:
            self.free(at, size - at)

    def take(
        self, length: int, level: Level = PTE, *, goal: int | None = None, minimum: int = 0
    ) -> Run:
        """Allocate a run and reserve it; the arguments are those of :meth:`allocate`.

        Runs of huge units read as zeros; smaller ones hold anything.

        Raises:
            NoSpace: the pool, or the file system below, has no room.

        Crash: the run is free.
        """
        start, got = self.allocate(length, level, goal=goal, minimum=minimum)
        try:
            if level.size >= PMD.size:
                self.clear(start, got)
            else:
                self._reserve(start, got)
        except BaseException:
            self.free(start, got)
            raise
        return start, got

    def _reserve(self, start: int, length: int) -> None:
        for at in range(align_down(start, self._unit), start + length, self._unit):
            if at not in self._reserved:
                try:
                    self._pmem.reserve(at, min(self._unit, self._pmem.size - at))
                    self._reserved.add(at)
                except NoSpace:
                    self._pmem.reserve(start, length)
                    return

    def clear(self, start: int, length: int) -> None:
        """Make a run that nobody uses read as zeros, and reserve it.

        Only whole units are punched: a hole in one would split its huge page for good.

        Raises:
            NoSpace: the file system below has no room.

        Crash: any mix of old bytes and zeros.
        """
        end = start + length
        first, last = align_up(start, self._unit), align_down(end, self._unit)
        if first < last and self._pmem.punch(first, last - first):
            units = range(first, last, self._unit)
            self._reserved.difference_update(units)
            self._pmem.reserve(first, last - first)
            self._reserved.update(units)
            self._pmem.collapse(first, last - first)
        else:
            first = last = end
        for a, b in ((start, first), (last, end)):
            if a < b:
                self._reserve(a, b - a)
                self._pmem.zero(a, b - a)
                self._pmem.flush(a, b - a)

    def trim(self, most: int = 64 * MIB) -> bool:
        """Give some whole units that became free back to the file system below.

        Returns whether there may be more to give.

        Crash: nothing of a file has changed.
        """
        if not self.promoted:
            return False
        start, length = self.promoted.popitem()
        at, end = align_down(start, self._unit), align_up(start + length, self._unit)
        rest = at + max(most, self._unit)
        if rest < end:
            self.promoted[rest] = max(end - rest, self.promoted.get(rest, 0))
            end = rest
        for free, size in self.free_units(at, end - at):
            first, last = align_up(free, self._unit), align_down(free + size, self._unit)
            if first < last:
                self._reserved.difference_update(range(first, last, self._unit))
                self._pmem.punch(first, last - first)
        return True
