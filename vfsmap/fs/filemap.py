"""Where a file's bytes lie: its extents in order, and changes to them as records."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import NamedTuple

from vfsmap.pool.layout import EXTENT, ExtentRecord
from vfsmap.pool.transaction import Transaction
from vfsmap.units import Extent

_LAST = 1 << 64


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

    __slots__ = ("pieces",)

    def __init__(self, pieces: list[Piece]) -> None:
        self.pieces = pieces

    @property
    def allocated(self) -> int:
        """Bytes of the pool that the file owns."""
        return sum(piece.length for piece in self.pieces)

    def overlapping(self, offset: int, end: int) -> Iterator[Extent]:
        """Yield what lies in the range, cut to it."""
        for piece in self.pieces[self._first(offset) :]:
            if piece.offset >= end:
                return
            first, last = max(piece.offset, offset), min(piece.end, end)
            yield Extent(first, piece.start + first - piece.offset, last - first)

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
        """Tell whether the range has no hole."""
        return next(self.holes(offset, end), None) is None

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

    def __init__(self, tx: Transaction, owner: int, pieces: list[Piece]) -> None:
        super().__init__(list(pieces))
        self._tx = tx
        self._owner = owner

    def add(self, offset: int, start: int, length: int) -> None:
        """Add an extent where there is a hole; it grows its neighbours where both ends meet."""
        at = bisect_left(self.pieces, (offset,))
        oid = 0
        if at and self.pieces[at - 1].end == offset:
            before = self.pieces[at - 1]
            if before.start + before.length == start:
                at -= 1
                offset, start, length = before.offset, before.start, before.length + length
                oid = self.pieces.pop(at).oid
        if at < len(self.pieces) and self.pieces[at].offset == offset + length:
            after = self.pieces[at]
            if after.start == start + length:
                length += after.length
                del self.pieces[at]
                if oid:
                    self._tx.end(after.oid)
                oid = oid or after.oid
        self._put(at, offset, start, length, oid or self._tx.new_oid())

    def cut(self, offset: int, end: int = _LAST, *, most: int = _LAST) -> bool:
        """Free what is allocated in the range; False when more than ``most`` pieces are left."""
        at = self._first(offset)
        while at < len(self.pieces) and self.pieces[at].offset < end:
            if most <= 0:
                return False
            most -= 1
            piece = self.pieces.pop(at)
            first, last = max(piece.offset, offset), min(piece.end, end)
            self._tx.release(piece.start + first - piece.offset, last - first)
            oid = piece.oid
            if last < piece.end:
                self._put(at, last, piece.start + last - piece.offset, piece.end - last, oid)
                oid = 0
            if piece.offset < first:
                length = first - piece.offset
                self._put(at, piece.offset, piece.start, length, oid or self._tx.new_oid())
                oid = 0
                at += 1
            if oid:
                self._tx.end(oid)
        return True

    def _put(self, at: int, offset: int, start: int, length: int, oid: int) -> None:
        self.pieces.insert(at, Piece(offset, start, length, oid))
        self._tx.put(oid, ExtentRecord.TAG, EXTENT.pack(self._owner, offset, start, length))
