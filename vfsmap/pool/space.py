"""The pool's bytes that nobody owns: taken, reserved in the file system below, given back."""

from collections.abc import Iterable

from vfsmap.alloc import Allocator
from vfsmap.errors import NoSpace, PoolDamaged
from vfsmap.pmem import Pmem
from vfsmap.pool.layout import FIRST_FREE
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
            PoolDamaged: two runs overlap, or one lies outside the pool.
        """
        at = FIRST_FREE
        for start, length in sorted(used):
            if start < at:
                raise PoolDamaged(f"pool bytes at {start:#x} belong to two extents")
            if start > at:
                self.free(at, min(start, size) - at)
            at = start + length
        if at > size:
            raise PoolDamaged(f"an extent ends at {at:#x}, behind the pool's end at {size:#x}")
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
                self._pmem.collapse(start, got)
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

    def clear(self, start: int, length: int) -> None:
        """Make a run that nobody uses read as zeros, and reserve it.

        Raises:
            NoSpace: the file system below has no room.

        Crash: any mix of old bytes and zeros.
        """
        punched = self._pmem.punch(start, length)
        self._pmem.reserve(start, length)
        if not punched:
            self._pmem.zero(start, length)
            self._pmem.flush(start, length)

    def trim(self, most: int = 64 * MIB) -> bool:
        """Give some whole units that became free back to the file system below.

        Returns whether there may be more to give.

        Crash: nothing of a file has changed.
        """
        if not self.promoted:
            return False
        start, length = self.promoted.pop()
        first, last = align_up(start, self._unit), align_down(start + length, self._unit)
        if first + most < last:
            self.promoted.append((first + most, last - first - most))
            last = first + most
        if first < last and self.has_units(first, last - first):
            self._reserved.difference_update(range(first, last, self._unit))
            self._pmem.punch(first, last - first)
        return True
