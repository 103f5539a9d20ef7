"""Where a file's bytes lie: its extents in order, and changes to them as records."""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from typing import Final, NamedTuple

from vfsmap.pool.layout import ExtentRecord, record_packer
from vfsmap.pool.transaction import Transaction
from vfsmap.units import Extent

_LAST: Final = 1 << 64
_RECORD: Final = record_packer(ExtentRecord)


class Piece(NamedTuple):
    """An extent of a file, and the number of its record."""

    offset: int
    start: int
    length: int
    oid: int

    @property
    def end(self) -> int:
        """Where it ends in the file."""
        return self.offset + self.length


class FileMap:
    """A file's extents, ascending by file offset, without overlap."""

    __slots__ = ("allocated", "pieces")

    def __init__(self, pieces: list[Piece], allocated: int) -> None:
        self.pieces = pieces
        self.allocated = allocated
        """Bytes of the pool that the file owns: the sum of the pieces' lengths."""

    def insert(self, piece: Piece) -> None:
        """Add a piece that the pool's log tells of."""
        insort(self.pieces, piece)
        self.allocated += piece.length

    def remove(self, piece: Piece) -> None:
        """Take a piece away that the pool's log has ended.

        Raises:
            LookupError: there is no such piece.
        """
        at = bisect_left(self.pieces, piece)
        if self.pieces[at] != piece:
            raise LookupError(f"there is no piece {piece}")
        del self.pieces[at]
        self.allocated -= piece.length

    def overlapping(self, offset: int, end: int) -> Iterator[Extent]:
        """Yield what lies in the range, cut to it."""
        pieces = self.pieces
        at = self._first(offset)
        while at < len(pieces):
            first, start, length, _ = pieces[at]
            if first >= end:
                return
            last = min(first + length, end)
            if first < offset:
                start += offset - first
                first = offset
            yield Extent(first, start, last - first)
            at += 1

    def within(self, offset: int, end: int) -> int | None:
        """Return where in the pool the range lies if one extent holds it all."""
        at = bisect_right(self.pieces, (offset, _LAST)) - 1
        if at >= 0:
            first, start, length, _ = self.pieces[at]
            if end <= first + length:
                return start + offset - first
        return None

    def holes(self, offset: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the parts of the range that nothing is allocated for, as start and end."""
        at = offset
        for extent in self.overlapping(offset, end):
            if extent.offset > at:
                yield at, extent.offset
            at = extent.offset + extent.length
        if at < end:
            yield at, end

    def covers(self, offset: int, end: int) -> bool:
        """Tell whether the range has no hole; an empty range has none."""
        if self.within(offset, end) is not None:
            return True
        return next(self.holes(offset, end), None) is None

    def is_hole(self, offset: int, end: int) -> bool:
        """Tell whether nothing is allocated for the range."""
        return next(self.overlapping(offset, end), None) is None

    def allocated_in(self, offset: int, end: int) -> int:
        """Return how many bytes of the range are allocated."""
        return sum(extent.length for extent in self.overlapping(offset, end))

    def _first(self, offset: int) -> int:
        """Return the index of the first piece that ends behind ``offset``."""
        at = bisect_right(self.pieces, (offset, _LAST))
        return at - 1 if at and self.pieces[at - 1].end > offset else at


class Edit(FileMap):
    """A changed copy of a file's extents; the changes are records of one transaction."""

    __slots__ = ("_owner", "_tx")

    def __init__(self, tx: Transaction, owner: int, map_: FileMap) -> None:
        super().__init__(map_.pieces.copy(), map_.allocated)
        self._tx = tx
        self._owner = owner

    def add(self, offset: int, start: int, length: int) -> None:
        """Add an extent where there is a hole; it grows its neighbours where both ends meet."""
        self.allocated += length
        pieces = self.pieces
        at = bisect_left(pieces, (offset,))
        oid = 0
        if at and pieces[at - 1].end == offset:
            before = pieces[at - 1]
            if before.start + before.length == start:
                at -= 1
                offset, start, length = before.offset, before.start, before.length + length
                oid = pieces.pop(at).oid
        if at < len(pieces) and pieces[at].offset == offset + length:
            after = pieces[at]
            if after.start == start + length:
                length += after.length
                del pieces[at]
                if oid:
                    self._tx.end(after.oid)
                oid = oid or after.oid
        self._put(at, offset, start, length, oid or self._tx.new_oid())

    def cut(self, offset: int, end: int = _LAST, *, most: int = _LAST) -> bool:
        """Free what is allocated in the range; False when more than ``most`` pieces are left.

        What is left is in front: the file's last pieces go first, so that ending them is cheap.
        """
        at = bisect_left(self.pieces, (end,)) - 1
        while at >= 0 and self.pieces[at].end > offset:
            if most <= 0:
                return False
            most -= 1
            piece = self.pieces.pop(at)
            first, last = max(piece.offset, offset), min(piece.end, end)
            self._tx.release(piece.start + first - piece.offset, last - first)
            self.allocated -= last - first
            oid = piece.oid
            if last < piece.end:
                self._put(at, last, piece.start + last - piece.offset, piece.end - last, oid)
                oid = 0
            if piece.offset < first:
                length = first - piece.offset
                self._put(at, piece.offset, piece.start, length, oid or self._tx.new_oid())
                oid = 0
            if oid:
                self._tx.end(oid)
            at -= 1
        return True

    def _put(self, at: int, offset: int, start: int, length: int, oid: int) -> None:
        self.pieces.insert(at, Piece(offset, start, length, oid))
        rec = _RECORD.pack(_RECORD.size, ExtentRecord.TAG, oid, self._owner, offset, start, length)
        self._tx.put_record(oid, rec)
