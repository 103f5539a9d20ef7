"""File contents: read, written, cut, allocated in huge units, sealed.

Bytes that nobody has written read as zeros.  What lies behind a file's end inside its extents may
be anything; it is zeroed before it becomes part of the file or of a window.  So cutting a file
never changes its bytes, and growing it is one transaction, whatever a crash does in between.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from vfsmap.errors import Busy, Exists, Invalid, NoSpace, TooBig
from vfsmap.fs.filemap import Edit, FileMap
from vfsmap.fs.inode import Inode
from vfsmap.fs.state import BATCH_PIECES, State
from vfsmap.pool import Transaction
from vfsmap.pool.layout import (
    BLOCK,
    EXTENT,
    RECORD,
    SealRecord,
    TreeExtentRecord,
)
from vfsmap.units import LEVELS, PMD, PTE, Extent, Level, align_down, align_up

MAX_SIZE: Final = (1 << 63) - 1
_ZEROS: Final = bytes(1 << 20)
_SUID_SGID: Final = 0o6000
_GROUP_EXECUTE: Final = 0o010


class Data(State):
    """Operations on contents."""

    def read(self, ino: int, offset: int, size: int) -> memoryview | bytes:
        """Return up to ``size`` bytes; a view of the pool, valid until the next change, if it can.

        Raises:
            NotFound, IsADirectory, Invalid: it is no regular file.
        """
        inode = self.file(ino)
        end = min(offset + size, inode.size)
        if end <= offset:
            return b""
        self.touch_atime(inode)
        view = self.pool.pmem.view
        pieces: list[memoryview | bytes] = []
        at = offset
        for extent in self.map_of(ino).overlapping(offset, end):
            if extent.offset > at:
                pieces.append(bytes(extent.offset - at))
            if extent.length == end - offset:
                return view[extent.start : extent.start + extent.length]
            pieces.append(view[extent.start : extent.start + extent.length])
            at = extent.offset + extent.length
        if at < end:
            pieces.append(bytes(end - at))
        return b"".join(pieces)

    def write(
        self, ino: int, offset: int, data: bytes | memoryview, *, clear_suid: bool = False
    ) -> int:
        """Store ``data`` and return its length.

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
            edit = None if map_.covers(offset, end) else self._fill(tx, inode, offset, end)
            current = edit or map_
            if offset > inode.size:
                self._zero(current, inode.size, offset)
            self._store(current, offset, data)
            inode.size = max(inode.size, end)
            inode.mtime_ns = inode.ctime_ns = time.time_ns()
            if clear_suid:
                inode.mode = without_suid(inode.mode)
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
                edit = Edit(tx, ino, map_.pieces)
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
        with self.change() as tx:
            if level is not None and level != PTE:
                edit = Edit(tx, ino, self.map_of(ino).pieces)
                first, last = align_down(offset, level.size), align_up(end, level.size)
                for unit in range(first, last, level.size):
                    if not _lies_in_unit(edit, unit, level):
                        self._place_unit(tx, edit, inode, unit, level)
            else:
                edit = self._fill(tx, inode, offset, end, allocating=True)
            if end > inode.size:
                self._zero(edit, inode.size, end)
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
        return all(_lies_in_unit(map_, unit, level) for unit in range(first, last, level.size))

    def extents(self, ino: int, offset: int = 0, length: int | None = None) -> list[Extent]:
        """Return what is allocated in a range, ascending by file offset; holes are left out."""
        self.file(ino)
        end = MAX_SIZE if length is None else offset + length
        return list(self.map_of(ino).overlapping(offset, end))

    def zero_tail(self, ino: int) -> None:
        """Zero what the file's extents hold behind its end, before a window shows it.

        Crash: any mix of old bytes and zeros, all of them behind the end.
        """
        if ino not in self._clean_tails:
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

    # sealing

    def require_sealable(self, ino: int) -> Inode:
        """Return the inode of a file that can be sealed now.

        Raises:
            Exists: it is sealed already.
            Busy: it is open for writing, or mapped writable.
        """
        inode = self.file(ino)
        if inode.sealed:
            raise Exists(f"inode {ino} is sealed already")
        if self.use(ino).cached_writers or self.has_writable_lease(ino):
            raise Busy(f"inode {ino} is open for writing: close it, then seal it")
        return inode

    @contextmanager
    def frozen(self, ino: int) -> Iterator[Inode]:
        """Keep a file that is about to be sealed from changing, while its digest is computed.

        Raises:
            Exists, Busy: it can't be sealed now.
        """
        inode = self.require_sealable(ino)
        if ino in self._frozen:
            raise Busy(f"inode {ino} is being sealed")
        self._frozen.add(ino)
        self.hold(ino)
        try:
            yield inode
        finally:
            self._frozen.discard(ino)
            self.drop(ino)

    def seal(self, ino: int, descriptor: bytes, tree: Iterable[bytes]) -> None:
        """Fix a file's content for ever.

        Args:
            ino: a regular file that nobody writes.
            descriptor: its fs-verity descriptor, 256 bytes.
            tree: the blocks of its Merkle tree, in order.

        Raises:
            Exists, Busy, NoSpace, ReadOnly.

        Crash: sealed, with its whole tree, or not sealed.
        """
        inode = self.require_sealable(ino)
        oids: list[int] = []
        with self.change() as tx:
            self._store_tree(tx, ino, b"".join(tree), oids)
            seal = tx.new_oid()
            payload = ino.to_bytes(8, "little") + descriptor.ljust(256, b"\0")
            tx.put(seal, SealRecord.TAG, payload)
            inode.seal()
            inode.ctime_ns = time.time_ns()
            self.put(tx, inode)
        self._seals[ino] = seal
        if oids:
            self._trees[ino] = tuple(oids)

    def _store_tree(self, tx: Transaction, ino: int, tree: bytes, oids: list[int]) -> None:
        offset = 0
        while offset < len(tree):
            wanted = align_up(len(tree) - offset, BLOCK)
            start, got = tx.take(wanted, minimum=BLOCK)
            piece = tree[offset : offset + got].ljust(got, b"\0")
            self.pool.pmem.store(start, piece)
            self.pool.pmem.flush(start, got)
            oids.append(tx.new_oid())
            tx.put(oids[-1], TreeExtentRecord.TAG, EXTENT.pack(ino, offset, start, got))
            offset += got

    def seal_of(self, ino: int) -> bytes | None:
        """Return a sealed file's fs-verity descriptor, 256 bytes, or None."""
        oid = self._seals.get(ino)
        at = RECORD.size + 8
        return self.pool.objects[oid][at : at + 256] if oid is not None else None

    def sealed_inodes(self) -> list[int]:
        """Return the numbers of the sealed files."""
        return list(self._seals)

    def tree_extents(self, ino: int) -> list[Extent]:
        """Return where a sealed file's Merkle tree lies, ascending."""
        records = (self.pool.objects[oid] for oid in self._trees.get(ino, ()))
        fields = (EXTENT.unpack_from(rec, RECORD.size) for rec in records)
        return sorted(Extent(offset, start, length) for _, offset, start, length in fields)

    # the parts

    def _store(self, map_: FileMap, offset: int, data: bytes | memoryview) -> None:
        pmem = self.pool.pmem
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
            self.map_of(inode.ino).pieces = edit.pieces

    def _level(self, inode: Inode) -> Level:
        """Return the level whose units the file is laid out in."""
        shift = inode.align or self.pool.level.shift
        return next(level for level in LEVELS if level.shift == shift)

    def _fill(
        self, tx: Transaction, inode: Inode, offset: int, end: int, *, allocating: bool = False
    ) -> Edit:
        """Allocate the holes of a range, in units where that is right, else in blocks."""
        edit = Edit(tx, inode.ino, self.map_of(inode.ino).pieces)
        level = self._level(inode)
        at, stop = align_down(offset, BLOCK), align_up(end, BLOCK)
        while at < stop:
            unit = align_down(at, level.size)
            upto = min(stop, unit + level.size)
            if not edit.covers(at, upto) and not (
                level != PTE
                and self._deserves_unit(inode, edit, unit, level, (offset, end), allocating)
                and self._try_unit(tx, edit, inode, unit, level)
            ):
                for hole in list(edit.holes(at, upto)):
                    self._place_blocks(tx, edit, hole, offset, end)
            at = upto
        return edit

    def _deserves_unit(
        self,
        inode: Inode,
        edit: Edit,
        unit: int,
        level: Level,
        written: tuple[int, int],
        allocating: bool,
    ) -> bool:
        """Tell whether a write is worth a whole unit.

        It is where somebody asked for alignment, where a large file grows at its end, and where at
        least half of the unit is in use; a lone block in the middle of a sparse file is not.
        """
        if inode.align > PTE.shift:
            return True
        offset, end = written
        if max(inode.size, end) < level.size:
            return False
        if self.is_pinned(inode.ino, unit, unit + level.size):
            return False
        present = edit.allocated_in(unit, unit + level.size)
        if not present and (allocating or offset <= inode.size < end):
            return True
        return 2 * (present + min(end, unit + level.size) - max(offset, unit)) >= level.size

    def _try_unit(self, tx: Transaction, edit: Edit, inode: Inode, unit: int, level: Level) -> bool:
        """Place a unit if there is one, and nobody minds; else blocks will do."""
        try:
            self._place_unit(tx, edit, inode, unit, level)
        except (NoSpace, Busy):
            return False
        return True

    def _place_unit(
        self, tx: Transaction, edit: Edit, inode: Inode, unit: int, level: Level
    ) -> None:
        """Give one unit of the file a unit of the pool, moving what it has there already."""
        end = unit + level.size
        old = list(edit.overlapping(unit, min(end, max(inode.size, unit))))
        if old and self.is_leased(inode.ino, unit, end):
            raise Busy(f"inode {inode.ino} is mapped: its bytes can't move before the lease ends")
        goal = _behind(edit, unit)
        start, _ = tx.take(level.size, level, goal=goal)
        pmem = self.pool.pmem
        for extent in old:
            length = min(extent.length, inode.size - extent.offset)
            target = start + extent.offset - unit
            pmem.store(target, pmem.view[extent.start : extent.start + length])
            pmem.flush(target, length)
        edit.cut(unit, end)
        edit.add(unit, start, level.size)

    def _place_blocks(
        self, tx: Transaction, edit: Edit, hole: tuple[int, int], offset: int, end: int
    ) -> None:
        """Fill a hole with blocks; zero what the write to ``offset`` up to ``end`` won't cover."""
        at, stop = hole
        pmem = self.pool.pmem
        while at < stop:
            start, got = tx.take(stop - at, goal=_behind(edit, at), minimum=BLOCK)
            for first, last in ((at, min(offset, at + got)), (max(end, at), at + got)):
                if first < last:
                    pmem.zero(start + first - at, last - first)
                    pmem.flush(start + first - at, last - first)
            edit.add(at, start, got)
            at += got

    def _kept_end(self, map_: FileMap, size: int) -> int:
        """Return from where on a file cut to ``size`` needs no extents."""
        unit = align_down(size, PMD.size)
        if size > unit and _lies_in_unit(map_, unit, PMD):
            return unit + PMD.size
        return align_up(size, BLOCK)


def without_suid(mode: int) -> int:
    """Return a mode as a write by somebody without privileges leaves it."""
    return mode & ~(_SUID_SGID if mode & _GROUP_EXECUTE else 0o4000)


def _behind(map_: FileMap, offset: int) -> int | None:
    """Return where in the pool a file that grows at ``offset`` would stay in one piece."""
    extent = next(map_.overlapping(offset - 1, offset), None) if offset else None
    return extent.start + extent.length if extent else None


def _lies_in_unit(map_: FileMap, unit: int, level: Level) -> bool:
    """Tell whether one unit of a file is one unit of the pool."""
    extent = next(map_.overlapping(unit, unit + level.size), None)
    return extent is not None and extent.length == level.size and extent.start % level.size == 0
