"""A transaction: objects, arenas and the root, changed together or not at all."""

import ctypes
from types import TracebackType
from typing import Self

from vfsmap.errors import Invalid, NoMemory, NoSpace, NotFound
from vfsmap.pool.journal import Journal
from vfsmap.pool.layout import (
    EXTENT,
    RECORD,
    USER_TAG,
    ExtentRecord,
    Root,
    record,
)
from vfsmap.pool.space import Run
from vfsmap.pool.typed import Oid, tag_of
from vfsmap.units import PMD, PTE, Level, align_up, parse_size


class Transaction:
    """Collects changes; they happen when the ``with`` block ends, all of them, or none.

    An exception inside the block, or a pool without room, leaves the pool as it was.
    """

    __slots__ = ("_ended", "_exists", "_freed", "_journal", "_put", "_taken")

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._put: dict[int, bytes] = {}
        self._ended: dict[int, None] = {}
        self._taken: list[Run] = []
        self._freed: list[Run] = []
        self._exists: dict[int, bool] = {}
        """Which typed objects and arenas there will be, of those that were made or deleted here."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if exc is None:
            self.commit()
        else:
            self.abort()

    def commit(self) -> None:
        """Make the changes.

        Raises:
            NoSpace: the log can't hold them.
            ReadOnly: the pool can't be written.
            MemoryError: nothing has changed, or the pool is read-only from now on.

        Crash: all changes or none; on a grouped medium they are durable with the next group.
        """
        journal = self._journal
        doubts = journal.doubts
        try:
            if self._put or self._ended:
                journal.apply(self._put, self._ended, self._freed)
        except BaseException as exc:
            if isinstance(exc, MemoryError) and journal.doubts != doubts:
                journal.fail(NoMemory("there was no memory to end a transaction"))
            self.abort()
            raise

    def abort(self) -> None:
        """Give everything taken back."""
        try:
            for start, length in self._taken:
                self._journal.space.free(start, length)
        except BaseException:
            self._journal.doubts += 1
            raise
        self._taken.clear()
        self._put.clear()
        self._ended.clear()

    def new_oid(self) -> int:
        """Return a number that no object has had."""
        oid = self._journal.next_oid
        self._journal.next_oid = oid + 1
        return oid

    def put(self, oid: int, tag: int, payload: bytes) -> None:
        """Give object ``oid`` this content."""
        self.put_record(oid, record(oid, tag, payload))

    def put_record(self, oid: int, rec: bytes) -> None:
        """Give object ``oid`` the content of a record, header included."""
        self._put[oid] = rec
        if self._ended:
            self._ended.pop(oid, None)

    def end(self, oid: int) -> None:
        """End an object; its number is never used again."""
        self._put.pop(oid, None)
        self._ended[oid] = None

    def take(
        self, length: int, level: Level = PTE, *, goal: int | None = None, minimum: int = 0
    ) -> Run:
        """Take a run of reserved pool bytes; its arguments are those of Allocator.allocate.

        Whole huge units read as zeros; what is smaller holds anything.

        Raises:
            NoSpace: neither the pool nor the file system below has it.

        Crash: the run is free still.
        """
        space = self._journal.space
        try:
            start, got = space.take(length, level, goal=goal, minimum=minimum)
        except NoSpace:
            if not self._journal.reclaim(minimum or length):
                raise
            start, got = space.take(length, level, goal=goal, minimum=minimum)
        except MemoryError:
            self._journal.doubts += 1
            raise
        self._taken.append((start, got))
        return start, got

    def release(self, start: int, length: int) -> None:
        """Free a run once this transaction is durable."""
        self._freed.append((start, length))

    # typed objects and arenas, for programs

    def new(self, obj: ctypes.Structure) -> Oid:
        """Store a typed object under a new number and return that."""
        oid = self._made()
        self.put(oid, tag_of(type(obj)), bytes(obj))
        return oid

    def set(self, oid: Oid, obj: ctypes.Structure) -> None:
        """Replace a typed object, by one of another type if need be.

        Raises:
            NotFound: there is no such object.
            Invalid: it is not a typed object.
        """
        rec = self._require(oid)
        if rec and not RECORD.unpack_from(rec)[1] & USER_TAG:
            raise Invalid(f"object {oid} is not a typed object")
        self.put(oid, tag_of(type(obj)), bytes(obj))

    def delete(self, oid: Oid) -> None:
        """End a typed object or an arena of an earlier transaction, and free its bytes.

        Raises:
            NotFound: there is no such object.
        """
        rec = self._require(oid)
        if rec is None:
            raise Invalid(f"object {oid} was made in this transaction: abort it instead")
        if RECORD.unpack_from(rec)[1] == ExtentRecord.TAG:
            self.release(*EXTENT.unpack_from(rec, RECORD.size)[2:])
        self.end(oid)
        self._exists[oid] = False

    def _made(self) -> Oid:
        oid = Oid(self.new_oid())
        self._exists[oid] = True
        return oid

    def _require(self, oid: Oid) -> bytes | None:
        """Return the record of an object that was there before this transaction, if it was."""
        rec = self._journal.objects.get(oid)
        if not self._exists.get(oid, rec is not None):
            raise NotFound(f"there is no object {oid}")
        return rec

    def allocate(self, size: int | str, *, level: Level = PTE) -> Oid:
        """Allocate an arena: one run of zeroed bytes that starts at a multiple of the level's size.

        The length is rounded up to the level's size, never down.

        Raises:
            Invalid: the size is 0, or is not one.
            NoSpace: there is no such run.
        """
        length = align_up(parse_size(size), level.size)
        if length == 0:
            raise Invalid("an arena can't be empty")
        start, _ = self.take(length, level)
        if level.size < PMD.size:  # larger runs are zeroed already
            self._journal.space.clear(start, length)
        oid = self._made()
        self.put(oid, ExtentRecord.TAG, EXTENT.pack(0, 0, start, length))
        return oid

    def set_root(self, oid: Oid) -> None:
        """Make an object the root, from which a program finds the others."""
        self.put(0, Root.TAG, oid.to_bytes(8, "little"))

    root = property(fset=set_root, doc="Assigning makes an object the pool's root.")
