"""Where new bytes of a file go: into whole huge units where that is right, else into blocks."""

from typing import Final

from vfsmap.errors import Busy, NoSpace
from vfsmap.fs.filemap import Edit, FileMap
from vfsmap.fs.inode import Inode
from vfsmap.fs.state import State
from vfsmap.pool import Transaction
from vfsmap.pool.layout import BLOCK
from vfsmap.units import LEVELS, PMD, PTE, Level, align_down, align_up

_UNITS: Final = {
    level.shift: tuple(lower for lower in reversed(LEVELS[1:]) if lower.shift <= level.shift)
    for level in LEVELS
}
"""For the shift of each level: the levels of the units to try, largest first."""


class Filling:
    """The holes of one range, about to be filled as part of one transaction."""

    __slots__ = ("allocating", "edit", "end", "inode", "offset", "tx")

    def __init__(
        self, tx: Transaction, inode: Inode, edit: Edit, offset: int, end: int, *, allocating: bool
    ) -> None:
        self.tx = tx
        self.inode = inode
        self.edit = edit
        self.offset = offset
        self.end = end
        self.allocating = allocating
        """Whether the range is to be zeroed, and not about to be written."""


class Placing(State):
    """What the operations on contents share."""

    def fill(
        self, tx: Transaction, inode: Inode, offset: int, end: int, *, allocating: bool = False
    ) -> Edit:
        """Allocate the holes of a range that is about to be written, or is to be allocated.

        Raises:
            NoSpace: there is no room.

        Crash: the holes are there still; what is allocated is free.
        """
        edit = Edit(tx, inode.ino, self.map_of(inode.ino))
        filling = Filling(tx, inode, edit, offset, end, allocating=allocating)
        at, stop = align_down(offset, BLOCK), align_up(end, BLOCK)
        if inode.align <= PTE.shift and end < PMD.size > inode.size:
            self._fill_range(filling, at, stop, ())
        else:
            levels = _UNITS[inode.align or self.pool.level.shift]
            if levels and grows_large(inode, end):
                self._gather(filling)
            self._fill_range(filling, at, stop, levels)
        return edit

    def _gather(self, filling: Filling) -> None:
        """Move the start of a file that grows large into a unit.

        Its blocks may fill that unit already, so that filling holes would not do it.
        """
        edit = filling.edit
        if (
            not edit.is_hole(0, PMD.size)
            and not lies_in_unit(edit, 0, PMD)
            and self._deserves_unit(filling, 0, PMD)
        ):
            self._try_unit(filling, 0, PMD)

    def _fill_range(self, filling: Filling, at: int, stop: int, levels: tuple[Level, ...]) -> None:
        edit = filling.edit
        if not levels:
            for first, last in list(edit.holes(at, stop)):
                self._place_blocks(filling, first, last)
            return
        level = levels[0]
        while at < stop:
            unit = align_down(at, level.size)
            upto = min(stop, unit + level.size)
            if not edit.covers(at, upto) and not (
                self._deserves_unit(filling, unit, level) and self._try_unit(filling, unit, level)
            ):
                self._fill_range(filling, at, upto, levels[1:])
            at = upto

    def _deserves_unit(self, filling: Filling, unit: int, level: Level) -> bool:
        """Tell whether a write is worth a whole unit.

        It is where somebody asked for alignment, where a large file grows at its end, and where at
        least half of the unit is in use; a lone block in the middle of a sparse file is not.
        """
        inode, offset, end = filling.inode, filling.offset, filling.end
        if inode.align > PTE.shift:
            return True
        if max(inode.size, end) < level.size:
            return False
        if self.is_pinned(inode.ino, unit, unit + level.size):
            return False
        present = filling.edit.allocated_in(unit, unit + level.size)
        if not present and (filling.allocating or offset <= inode.size < end):
            return True
        to_come = max(min(end, unit + level.size) - max(offset, unit), 0)
        return 2 * (present + to_come) >= level.size

    def _try_unit(self, filling: Filling, unit: int, level: Level) -> bool:
        """Place a unit if there is one, and nobody minds; else something smaller will do."""
        try:
            self.place_unit(filling.tx, filling.edit, filling.inode, unit, level)
        except (NoSpace, Busy):
            return False
        return True

    def place_unit(
        self, tx: Transaction, edit: Edit, inode: Inode, unit: int, level: Level
    ) -> None:
        """Give one unit of the file a unit of the pool, moving what it has there already.

        Raises:
            NoSpace: there is none.
            Busy: a lease covers what would be moved.

        Crash: the file has what it had.
        """
        end = unit + level.size
        moved = not edit.is_hole(unit, end)
        if moved and self.is_leased(inode.ino, unit, end):
            raise Busy(f"inode {inode.ino} is mapped: its bytes can't move before the lease ends")
        start, _ = tx.take(level.size, level, goal=_behind(edit, unit))
        if moved:
            pmem = self.pool.pmem
            for extent in edit.overlapping(unit, min(end, inode.size)):
                target = start + extent.offset - unit
                pmem.store(target, pmem.view[extent.start : extent.start + extent.length])
                pmem.flush(target, extent.length)
            edit.cut(unit, end)
        edit.add(unit, start, level.size)

    def _place_blocks(self, filling: Filling, at: int, stop: int) -> None:
        """Fill a hole with blocks; zero what the write that is to come won't cover."""
        tx, edit = filling.tx, filling.edit
        offset, end = filling.offset, filling.end
        if filling.allocating:
            offset = end = stop
        while at < stop:
            start, got = tx.take(stop - at, goal=_behind(edit, at), minimum=BLOCK)
            if at < offset:
                self._clear(start, min(offset, at + got) - at)
            if end < at + got:
                first = max(end, at)
                self._clear(start + first - at, at + got - first)
            edit.add(at, start, got)
            at += got

    def _clear(self, start: int, length: int) -> None:
        """Zero what was just taken."""
        if length >= PMD.size:
            self.pool.space.clear(start, length)
        else:
            self.pool.pmem.zero(start, length)
            self.pool.pmem.flush(start, length)


def _behind(map_: FileMap, offset: int) -> int | None:
    """Return where in the pool a file that grows at ``offset`` would stay in one piece."""
    last = map_.within(offset - 1, offset) if offset else None
    return None if last is None else last + 1


def grows_large(inode: Inode, end: int) -> bool:
    """Tell whether a file that is to reach ``end`` becomes worth huge units by that."""
    return inode.size < PMD.size <= end


def lies_in_unit(map_: FileMap, unit: int, level: Level) -> bool:
    """Tell whether one unit of a file is one unit of the pool."""
    start = map_.within(unit, unit + level.size)
    return start is not None and start % level.size == 0
