"""An open pool: typed objects, arenas of bytes, and transactions over both."""

import ctypes
import struct
import time
import uuid
import zlib
from pathlib import Path
from typing import Self, TypeVar

from vfsmap.errors import Invalid, NotAPool, NotFound, PoolDamaged, VfsmapError
from vfsmap.pmem import Pmem, Promise
from vfsmap.pool import superblock
from vfsmap.pool.journal import Commit, Journal, new_generation
from vfsmap.pool.layout import (
    BLOCK,
    EXTENT,
    FIRST_FREE,
    MAGIC,
    RECORD,
    SPACE,
    SUPERBLOCKS,
    VERSION,
    ExtentRecord,
    Superblock,
    WholeRecord,
)
from vfsmap.pool.log import LogHalf, Place
from vfsmap.pool.space import Run, Space
from vfsmap.pool.transaction import Transaction
from vfsmap.pool.typed import Oid, tag_of
from vfsmap.units import (
    KIB,
    LEVELS,
    MIB,
    PMD,
    Extent,
    Level,
    align_down,
    format_size,
    parse_size,
)

MINIMUM_SIZE = 4 * MIB
_LABEL_BYTES = 63

T = TypeVar("T", bound=ctypes.Structure)


class Pool:
    """A pool that is open in this process; use it from one thread."""

    def __init__(self, pmem: Pmem) -> None:
        """Open the pool on ``pmem`` and replay its log.

        Damage in the log is not raised: the pool is read-only then, and ``failed`` says where.

        Raises:
            NotAPool: there is no pool, or it is of a newer format.
            PoolDamaged: no superblock can be used.

            MediumError: the medium refused to make durable what was read.

        Crash: nothing has happened, but a stale copy of the superblock may have been renewed.
        """
        self.pmem = pmem
        self._load()
        if self.writable:
            # a writer that was killed may have left what was just read to the CPU's caches
            log = self.journal.log
            pmem.persist(SUPERBLOCKS[0], 2 * BLOCK)
            pmem.persist(log.place.start, log.tail - log.place.start)
            if self.complaints:
                superblock.write(pmem, self.journal.superblock)

    def _load(self) -> None:
        while True:
            sb, self.complaints = self._load_superblock()
            self.journal = Journal(self.pmem, sb)
            try:
                self.journal.replay()
                self._fill_space()
            except PoolDamaged as exc:
                self.fail(exc)
            # a writer that switched halves meanwhile may have overwritten what was just read
            if self.pmem.writable or self._load_superblock()[0].epoch == sb.epoch:
                return

    def _load_superblock(self) -> tuple[Superblock, list[str]]:
        for last in (False, False, True):  # a writer may be storing one copy after the other
            try:
                return superblock.load(self.pmem.view)
            except (NotAPool, PoolDamaged) as exc:
                if last or self.pmem.writable:
                    raise type(exc)(f"{self.path}: {exc}") from exc
        raise AssertionError("the last look returns or raises")

    def _fill_space(self) -> None:
        unpack = EXTENT.unpack_from
        try:
            used: list[Run] = [
                unpack(rec, RECORD.size)[2:]
                for rec in self.objects.values()
                if rec[4] in SPACE and not rec[7]
            ]
        except struct.error as exc:
            raise PoolDamaged("the record of an extent is too short") from exc
        used += ((place.start, place.length) for place in self.journal.halves)
        self.space.fill(used, self.size)

    @classmethod
    def create(
        cls,
        path: str | Path,
        size: int | str,
        *,
        label: str = "",
        level: Level = PMD,
        replace: bool = False,
        promise: Promise | str | None = None,
    ) -> Self:
        """Make a new, empty pool and open it.

        Args:
            path: a file that does not exist yet, or a DAX device.
            size: bytes, or a text such as ``"8G"``.
            label: up to 63 bytes of UTF-8.
            level: the unit that large files are laid out in.
            replace: destroy what the file holds.
            promise: what the medium must keep, ``process`` or ``power``.

        Raises:
            Exists: the file exists, and ``replace`` is not given.
            Invalid: the size is too small or does not suit the medium.
            NoSpace: the file system below has no room.
            PoolInUse: another process has the file open as a pool.
            Unsupported: the medium does not keep the promise that is demanded.

        Crash: no pool, or an empty one.
        """
        size = parse_size(size)
        if size < MINIMUM_SIZE:
            least = format_size(MINIMUM_SIZE)
            raise Invalid(f"a pool needs at least {least}, not {format_size(size)}")
        if not label.isprintable():
            raise Invalid(f"label {label!r}: only characters that can be printed are allowed")
        if len(label.encode()) > _LABEL_BYTES:
            raise Invalid(f"label {label!r} is longer than {_LABEL_BYTES} bytes")
        existed = Path(path).exists()
        pmem = Pmem.create(path, size, replace=replace, promise=promise)
        try:
            format_pmem(pmem, label=label, level=level)
            return cls(pmem)
        except BaseException:
            pmem.close()
            if not existed:
                Path(path).unlink(missing_ok=True)
            raise

    @classmethod
    def open(
        cls,
        path: str | Path,
        flags: str = "w",
        *,
        size: int | str | None = None,
        promise: Promise | str | None = None,
    ) -> Self:
        """Open a pool: ``r`` to read, ``w`` to write, ``c`` to create if missing, ``x`` to create.

        A reader may open a pool that a writer has open, and sees one finished state of it.

        Raises:
            NotFound: there is no file.
            PoolInUse: another process has it open for writing.
            NotAPool, PoolDamaged, Unsupported: as the constructor.
        """
        if flags not in ("r", "w", "c", "x"):
            raise Invalid(f"flags {flags!r}: one of r, w, c and x is expected")
        if flags == "x" or (flags == "c" and not Path(path).exists()):
            if size is None:
                raise Invalid("creating a pool needs a size")
            return cls.create(path, size, promise=promise)
        pmem = Pmem.open(path, writable=flags != "r", promise=promise)
        try:
            return cls(pmem)
        except BaseException:
            pmem.close()
            raise

    # facts

    @property
    def path(self) -> Path:
        """The pool's file."""
        return self.pmem.path

    @property
    def size(self) -> int:
        """Bytes of the pool."""
        return int(self.journal.superblock.size)

    @property
    def uuid(self) -> uuid.UUID:
        """The pool's identity, given when it was made."""
        return uuid.UUID(bytes=bytes(self.journal.superblock.uuid))

    @property
    def label(self) -> str:
        """The name that its maker gave it."""
        return bytes(self.journal.superblock.label).rstrip(b"\0").decode(errors="replace")

    @property
    def level(self) -> Level:
        """The unit that large files are laid out in."""
        shift = self.journal.superblock.align
        return next((level for level in LEVELS if level.shift == shift), PMD)

    @property
    def promise(self) -> Promise:
        """What a finished operation survives."""
        return self.pmem.medium.promise

    @property
    def grouped(self) -> bool:
        """Tell whether transactions wait in memory until :meth:`sync` or :meth:`begin_commit`."""
        return self.journal.grouped

    @property
    def failed(self) -> VfsmapError | None:
        """Why the pool turned read-only, if it did."""
        return self.journal.failed

    @property
    def writable(self) -> bool:
        """Tell whether the pool takes changes: opened so, and nothing has failed."""
        return self.pmem.writable and self.failed is None

    @property
    def objects(self) -> dict[int, bytes]:
        """Each object's number and its record, header included."""
        return self.journal.objects

    @property
    def space(self) -> Space:
        """The bytes that nobody owns."""
        return self.journal.space

    @property
    def next_oid(self) -> int:
        """A number that no object has had."""
        return self.journal.next_oid

    @property
    def root(self) -> Oid | None:
        """The root object's number, if one was set and has not been deleted."""
        rec = self.objects.get(0)
        oid = int.from_bytes(rec[RECORD.size : RECORD.size + 8], "little") if rec else 0
        return Oid(oid) if oid in self.objects and oid else None

    # reading

    def get(self, oid: Oid, kind: type[T]) -> T:
        """Return a copy of a typed object.

        Raises:
            NotFound: there is no such object.
            Invalid: it is of another type, or that type's layout has changed.
        """
        rec = self.objects.get(oid)
        if rec is None:
            raise NotFound(f"there is no object {oid}")
        if RECORD.unpack_from(rec)[1] != tag_of(kind):
            raise Invalid(f"object {oid} is not a {kind.__name__} of this layout")
        return kind.from_buffer_copy(rec, RECORD.size)

    def arena(self, oid: Oid) -> Extent:
        """Return where an arena lies.

        Raises:
            NotFound: there is no such arena.
        """
        rec = self.objects.get(oid)
        if rec is not None and RECORD.unpack_from(rec)[1] == ExtentRecord.TAG:
            with WholeRecord(f"arena {oid}"):
                owner, offset, start, length = EXTENT.unpack_from(rec, RECORD.size)
            if owner == 0:
                return Extent(offset, start, length)
        raise NotFound(f"there is no arena {oid}")

    def view(self, oid: Oid) -> memoryview:
        """Return the bytes of an arena themselves; :meth:`persist` makes changes durable.

        Raises:
            NotFound: there is no such arena.
        """
        extent = self.arena(oid)
        return self.pmem.view[extent.start : extent.start + extent.length]

    def persist(self, oid: Oid, offset: int = 0, length: int | None = None) -> None:
        """Make a range of an arena's bytes as durable as the medium promises.

        Raises:
            NotFound: there is no such arena.
            MediumError: the medium refused.

        Crash: each cache line, or page, of the range is old or new.
        """
        extent = self.arena(oid)
        length = extent.length - offset if length is None else length
        self.pmem.persist(extent.start + offset, length)

    # changing

    def transaction(self) -> Transaction:
        """Return a transaction, to be used in a ``with`` statement."""
        return Transaction(self.journal)

    def require_writable(self) -> None:
        """Do nothing when the pool takes changes.

        Raises:
            ReadOnly: it does not; the message says why.
        """
        self.journal.require_writable()

    def fail(self, reason: VfsmapError) -> None:
        """Turn read-only, for the reason given; the first reason stays."""
        self.journal.fail(reason)

    def begin_commit(self) -> Commit:
        """Take what is pending; the commit's ``run`` may then block in another thread."""
        return self.journal.begin_commit()

    def sync(self) -> None:
        """Make everything done so far as durable as the medium promises; blocks.

        Raises:
            MediumError: the medium refused; the pool is read-only from now on.

        Crash: everything or nothing of the group that was pending.
        """
        self.journal.sync()

    def resize(self, size: int | str) -> None:
        """Make the pool larger.

        Raises:
            Invalid: it would become smaller, or the size does not suit the medium.
            NoSpace: the file system below has no room.
            Unsupported: the medium can't change its size.

        Crash: the old or the new size.
        """
        self.require_writable()
        size = parse_size(size)
        page = self.pmem.medium.page_size
        if size <= self.size or size % page:
            raise Invalid(
                f"size {format_size(size)} must be a multiple of {format_size(page)} and larger "
                f"than {format_size(self.size)}: a pool can't shrink"
            )
        self.sync()
        old = self.size
        if size > self.pmem.size:
            self.pmem.resize(size)
        sb = Superblock.from_buffer_copy(self.journal.superblock)
        sb.size = superblock.usable_size(size)
        try:
            superblock.write(self.pmem, sb)
        except VfsmapError as exc:
            self.fail(exc)
            raise
        self.journal.superblock = sb
        self.space.free(old, self.size - old)

    def close(self) -> None:
        """Make everything durable and close the file.

        Raises:
            BufferError: somebody still holds a view of the pool.
            MediumError: the medium refused the last changes.
        """
        try:
            if self.writable:
                self.sync()
                self.journal.close()
        finally:
            self.pmem.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: object, trace: object) -> None:
        try:
            self.close()
        except BufferError:  # of views that the error's traceback holds
            if error is None:
                raise


def format_pmem(pmem: Pmem, *, label: str = "", level: Level = PMD, log: int = 0) -> None:
    """Lay an empty pool out on ``pmem``.

    Args:
        pmem: what holds it.
        label: a name, up to 63 bytes.
        level: the unit that large files are laid out in.
        log: bytes of each half of the log, a multiple of 4 KiB; 0: as suits the size.

    Raises:
        NoSpace: the file system below has no room even for the log.

    Crash: no pool, or the empty one.
    """
    size = superblock.usable_size(pmem.size)
    half = log or min(max(align_down(size // 512, BLOCK), 256 * KIB), 16 * MIB)
    pmem.reserve(0, FIRST_FREE + 2 * half)
    pmem.zero(SUPERBLOCKS[0], 2 * BLOCK)
    pmem.persist(SUPERBLOCKS[0], 2 * BLOCK)
    sb = Superblock(version=VERSION, size=size, generation=new_generation(), align=level.shift)
    sb.created_ns = time.time_ns()
    sb.magic[:] = MAGIC
    sb.uuid[:] = uuid.uuid4().bytes
    raw = label.encode()
    sb.label[: len(raw)] = raw
    for index, place in enumerate(sb.halves):
        place.start, place.length = FIRST_FREE + index * half, half
    first = LogHalf(pmem, Place(FIRST_FREE, half), sb.generation, zlib.crc32(bytes(sb.uuid)))
    at = first.append([], next_oid=1)
    pmem.persist(at, first.tail - at)
    sb.batches = first.sequence
    superblock.write(pmem, sb)
