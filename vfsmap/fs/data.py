"""File contents: read, written, cut, allocated in huge units.

Bytes that nobody has written read as zeros.  What lies behind a file's end inside its extents may
be anything; it is zeroed before it becomes part of the file or of a window.  So cutting a file
never changes its bytes, and growing it is one transaction, whatever a crash does in between.
"""

import stat
import time
from collections.abc import Mapping
from typing import Final

from vfsmap.errors import Busy, Invalid, NoMemory, TooBig
from vfsmap.fs.filemap import Edit, FileMap
from vfsmap.fs.inode import Inode
from vfsmap.fs.placing import Placing, grows_large, lies_in_unit
from vfsmap.fs.state import BATCH_PIECES
from vfsmap.pool import Transaction
from vfsmap.pool.layout import BLOCK
from vfsmap.units import LEVELS, PMD, PTE, Extent, Level, align_down, align_up

MAX_SIZE: Final = (1 << 63) - 1
_KIND: Final = 0o170000
_REGULAR: Final = stat.S_IFREG


class Data(Placing):
    """Operations on contents."""

    def read(
        self, ino: int, offset: int, size: int, *, noatime: bool = False
    ) -> memoryview | bytes:
        """Return up to ``size`` bytes; a view of the pool, valid until the next change, if it can.

        The time of access is noted, unless ``noatime`` says not to.

        Raises:
            NotFound, IsADirectory, Invalid: it is no regular file.
        """
        inode = self._inodes.get(ino)  # the usual way, without a call: this is all that many do
        if inode is None or inode.mode & _KIND != _REGULAR:
            inode = self.file(ino)
        end = offset + size
        if end > inode.size:
            end = inode.size
        if end <= offset:
            return b""
        if not (noatime or self.noatime):
            self.touch_atime(inode)
        map_ = self._maps.get(ino) or self.map_of(ino)
        view = self.pool.pmem.view
        start = map_.within(offset, end)
        if start is not None:
            return view[start : start + end - offset].toreadonly()
        pieces: list[memoryview | bytes] = []
        at = offset
        for extent in map_.overlapping(offset, end):
            if extent.offset > at:
                pieces.append(bytes(extent.offset - at))
            pieces.append(view[extent.start : extent.start + extent.length])
            at = extent.offset + extent.length
        if at < end:
            pieces.append(bytes(end - at))
        return b"".join(pieces)

    def write(
        self, ino: int, offset: int, data: bytes | memoryview, *, mode: int | None = None
    ) -> int:
        """Store ``data`` and return its length; ``mode`` are permissions that change with it.

        Raises:
            Sealed, TooBig, NoSpace, ReadOnly.
            NotFound, IsADirectory, Invalid: it is no regular file.

        Crash: what grows the file is wholly there or absent; of what is overwritten in place, any
            word is old or new.
        """
        inode = self.unsealed(ino)
        end = offset + len(data)
        if end > MAX_SIZE:
            raise TooBig(f"a file can't have {end} bytes")
        if end == offset:
            return 0
        self.pool.require_writable()
        map_ = self.map_of(ino)
        with self.change() as tx:
            if offset > inode.size:
                self._zero(map_, inode.size, offset)
            in_place = map_.covers(offset, end) and not grows_large(inode, end)
            edit = None if in_place else self.fill(tx, inode, offset, end)
            self._store(edit or map_, offset, data)
            inode.size = max(inode.size, end)
            inode.mtime_ns = inode.ctime_ns = time.time_ns()
            if mode is not None:
                inode.mode = _REGULAR | mode
            self._put_mapped(tx, inode, edit)
        self._remember_map(inode, edit)
        return len(data)

    def truncate(self, ino: int, size: int, changes: Mapping[str, int]) -> Inode:
        """Set a file's size, and other attributes with it.

        Raises:
            Sealed, TooBig, NoSpace, ReadOnly.
            Busy: a lease covers what would be cut.

        Crash: the file as it was, or with all changes; extents behind the new end may be left.
        """
        inode = self.unsealed(ino)
        if not 0 <= size <= MAX_SIZE:
            raise TooBig(f"a file can't have {size} bytes")
        if size < inode.size and self.is_leased(ino, size, inode.size):
            raise Busy(f"inode {ino} is mapped: it can't be cut before the lease ends")
        self.pool.require_writable()
        self._clean_tails.discard(ino)
        map_ = self.map_of(ino)
        if size > inode.size:
            self._zero(map_, inode.size, size)
        keep = self._kept_end(map_, size)
        done = False
        while not done:
            with self.change() as tx:
                edit = Edit(tx, ino, map_)
                done = self.is_pinned(ino, keep, MAX_SIZE) or edit.cut(keep, most=BATCH_PIECES)
                inode.size = size
                for name, value in changes.items():
                    setattr(inode, name, value)
                self._put_mapped(tx, inode, edit)
            self._remember_map(inode, edit)
        return inode

    def allocate(self, ino: int, offset: int, length: int, *, level: Level | None = None) -> Inode:
        """Fill the holes of a range with zeros, growing the file to its end if that is larger.

        Args:
            ino: a regular file.
            offset: where the range starts in the file.
            length: its bytes.
            level: demand whole, aligned units; parts of them that lie elsewhere are moved.

        Raises:
            NoSpace: there is no room, or there are no such units.
            Busy: what would be moved is mapped.
            Sealed, TooBig, ReadOnly.

        Crash: the file as it was, or with the range allocated.
        """
        inode = self.unsealed(ino)
        end = offset + length
        if not 0 <= offset <= end <= MAX_SIZE:
            raise TooBig(f"a file can't have {end} bytes")
        if end <= inode.size and self.is_allocated(ino, offset, length, level=level):
            return inode
        self.pool.require_writable()
        map_ = self.map_of(ino)
        with self.change() as tx:
            if end > inode.size:
                self._zero(map_, inode.size, end)
            if level is not None and level != PTE:
                edit = Edit(tx, ino, map_)
                first, last = align_down(offset, level.size), align_up(end, level.size)
                for unit in range(first, last, level.size):
                    if not lies_in_unit(edit, unit, level):
                        self.place_unit(tx, edit, inode, unit, level)
            else:
                edit = self.fill(tx, inode, offset, end, allocating=True)
            if end > inode.size:
                inode.size = end
                inode.mtime_ns = inode.ctime_ns = time.time_ns()
            self._put_mapped(tx, inode, edit)
        self._remember_map(inode, edit)
        return inode

    def is_allocated(
        self, ino: int, offset: int, length: int, *, level: Level | None = None
    ) -> bool:
        """Tell whether a range has no hole, and lies in whole units where a level is given."""
        map_ = self.map_of(ino)
        if level is None or level == PTE:
            return map_.covers(offset, offset + length)
        first, last = align_down(offset, level.size), align_up(offset + length, level.size)
        return all(lies_in_unit(map_, unit, level) for unit in range(first, last, level.size))

    def unmappable_units(self, ino: int) -> list[int]:
        """Return the file offsets of what the medium, for its large pages, can't map as it lies."""
        level = self.pool.pmem.medium.level
        if level == PTE:
            return []
        map_ = self.map_of(ino)
        units = {
            unit
            for piece in map_.pieces
            for unit in range(align_down(piece.offset, level.size), piece.end, level.size)
        }
        return sorted(unit for unit in units if not lies_in_unit(map_, unit, level))

    def make_mappable(self, ino: int, unit: int) -> None:
        """Move one of the :meth:`unmappable_units` of a file that is about to be sealed.

        Raises:
            NoSpace: there is none.
            Busy: it is leased.
            ReadOnly.

        Crash: the file is the same; it lies where it lay, or in the unit.
        """
        inode, map_ = self.file(ino), self.map_of(ino)
        with self.change() as tx:
            edit = Edit(tx, ino, map_)
            self.place_unit(tx, edit, inode, unit, self.pool.pmem.medium.level)
            self._put_mapped(tx, inode, edit)
        self._remember_map(inode, edit)

    def extents(self, ino: int, offset: int = 0, length: int | None = None) -> list[Extent]:
        """Return what is allocated in a range, ascending by file offset; holes are left out."""
        self.file(ino)
        end = MAX_SIZE if length is None else offset + length
        return list(self.map_of(ino).overlapping(offset, end))

    def tail_needs_commit(self, ino: int) -> bool:
        """Tell whether what lies behind a file's end may be zeroed only after a group commit.

        What was cut off a moment ago is the file's content still, should a crash come before the
        cut is durable.
        """
        return self.pool.grouped and not self.pool.journal.quiet and not self._is_tail_clean(ino)

    def _is_tail_clean(self, ino: int) -> bool:
        if ino not in self._clean_tails and self.map_of(ino).is_hole(self.file(ino).size, MAX_SIZE):
            self._clean_tails.add(ino)
        return ino in self._clean_tails

    def zero_tail(self, ino: int) -> None:
        """Zero what the file's extents hold behind its end, before a window shows it.

        Raises:
            MediumError: the medium refused; the pool is read-only from now on.

        Crash: any mix of old bytes and zeros, all of them behind the end.
        """
        if not self._is_tail_clean(ino):
            if self.tail_needs_commit(ino):
                self.pool.sync()
            self._zero(self.map_of(ino), self.file(ino).size, MAX_SIZE)
            self._clean_tails.add(ino)

    def set_align(self, ino: int, shift: int) -> Inode:
        """Set the alignment hint: log2 of a level's size, or 0 for none.

        Raises:
            Invalid: there is no such level, or the inode is neither file nor directory.
        """
        inode = self.get(ino)
        if shift and not any(level.shift == shift for level in LEVELS):
            raise Invalid(f"2^{shift} bytes is not the size of a page-table level")
        if not (inode.is_file or inode.is_directory):
            raise Invalid(f"inode {ino} has no extents to align")
        with self.change() as tx:
            inode.align = shift
            inode.ctime_ns = time.time_ns()
            self.put(tx, inode)
        return inode

    # the parts

    def _store(self, map_: FileMap, offset: int, data: bytes | memoryview) -> None:
        pmem = self.pool.pmem
        start = map_.within(offset, offset + len(data))
        if start is not None:
            pmem.store(start, data)
            pmem.flush(start, len(data))
            return
        view = memoryview(data)
        for extent in map_.overlapping(offset, offset + len(view)):
            at = extent.offset - offset
            pmem.store(extent.start, view[at : at + extent.length])
            pmem.flush(extent.start, extent.length)

    def _zero(self, map_: FileMap, offset: int, end: int) -> None:
        for extent in map_.overlapping(offset, end):
            self.pool.pmem.zero(extent.start, extent.length)
            self.pool.pmem.flush(extent.start, extent.length)

    def _put_mapped(self, tx: Transaction, inode: Inode, edit: Edit | None) -> None:
        if edit is not None:
            inode.blocks = edit.allocated >> 9
        self.put(tx, inode)

    def _remember_map(self, inode: Inode, edit: Edit | None) -> None:
        if edit is not None:
            try:
                self._maps[inode.ino] = FileMap(edit.pieces, edit.allocated)
            except MemoryError:  # what is in memory is not what is in the pool any more
                self.pool.fail(NoMemory("there was no memory to note where a file lies"))
                raise
            self._extents.pop(inode.ino, None)

    def _kept_end(self, map_: FileMap, size: int) -> int:
        """Return from where on a file cut to ``size`` needs no extents."""
        unit = align_down(size, PMD.size)
        if size > unit and lies_in_unit(map_, unit, PMD):
            return unit + PMD.size
        return align_up(size, BLOCK)
