"""Granting: what has to be so before a client may map a range."""

import os
from collections.abc import Awaitable, Callable

import trio

from vfsmap.daemon.files import require_uncached
from vfsmap.errors import Invalid, MediumError, NoSpace, TooManyMappings, Unsupported
from vfsmap.fs import FileSystem, Inode
from vfsmap.mapping.lease import LEASES_MAX, Holder, Lease, LeaseTable
from vfsmap.units import LEVELS, MIB, PMD, PTE, Extent, Level, align_down, align_up, format_size

EXTENTS_MAX = 65_000
"""Pieces that one lease has at most; vm.max_map_count is 65,530 unless somebody raised it."""
_SLICE = 32 * MIB
"""What is allocated before other requests get their turn."""


class Grants:
    """The leases on the files of one pool."""

    def __init__(
        self,
        fs: FileSystem,
        sync: Callable[[], Awaitable[None]],
        *,
        leases_max: int = LEASES_MAX,
    ) -> None:
        self._fs = fs
        self._sync = sync
        self._leases_max = leases_max
        self.leases = LeaseTable()
        self._page_size = fs.pool.pmem.medium.page_size
        self._usual_unit = max(PMD.size, fs.pool.level.size, self._page_size)

    async def grant(
        self,
        ino: int,
        fd: int | None,
        holder: Holder,
        *,
        offset: int,
        length: int | None,
        writable: bool,
        level: int,
    ) -> Lease:
        """Prepare a range of a file, and record the lease.

        Raises:
            Busy: the file is open through the mount's cache for writing, or what had to move is
                leased.
            Sealed, NoSpace, Unsupported, Invalid, ReadOnly.
            NoMemory, TooManyMappings: the holder has too much already, or would.

        Crash: the range may be allocated; there is no lease.
        """
        self.leases.require_room(holder, self._leases_max)
        unit = self._unit(level)
        if not self._is_ready(ino, offset, length, unit):
            self._fs.hold(ino)
            try:
                await self._prepare(ino, fd, offset, length, unit, writable=writable)
            finally:
                self._fs.drop(ino)
        if self._fs.tail_needs_commit(ino):
            await self._sync()  # else zeroing the tail would do it, and keep everybody waiting
        # nothing waits in here, so what is checked is so when the range is pinned
        lease = self._grant_now(
            ino, holder, offset, length, level, writable=writable, most=EXTENTS_MAX
        )
        if writable and self._fs.pool.grouped:
            await self._sync()  # what is persisted in a window must be found again in the file
        return lease

    def grant_at_once(
        self, ino: int, holder: Holder, *, offset: int, length: int | None, level: int, most: int
    ) -> Lease | None:
        """Grant a read lease on at most so many extents where nothing has to be done first.

        Returns None where something has to.

        Raises:
            As :meth:`grant`.
        """
        self.leases.require_room(holder, self._leases_max)
        if not self._is_ready(ino, offset, length, self._unit(level)):
            return None
        if self._fs.tail_needs_commit(ino):
            return None
        return self._grant_now(ino, holder, offset, length, level, writable=False, most=most)

    def _is_ready(self, ino: int, offset: int, length: int | None, unit: Level | None) -> bool:
        """Tell whether nothing has to be written back, allocated or moved."""
        fs = self._fs
        inode = fs.file(ino)
        if fs.has_cached_writer(ino):
            return False
        end = inode.size if length is None else offset + length
        return (
            inode.sealed
            or not fs.pool.writable
            or end > inode.size
            or fs.is_allocated(ino, offset, end - offset, level=unit)
        )

    async def _prepare(
        self,
        ino: int,
        fd: int | None,
        offset: int,
        length: int | None,
        unit: Level | None,
        *,
        writable: bool,
    ) -> None:
        """Bring dirty pages of the mount's cache into the pool; fill holes; move what has to."""
        fs = self._fs
        if writable:
            require_uncached(fs, ino)
        # without a cached writer there is no dirty page
        if fd is not None and fs.has_cached_writer(ino):
            try:
                await trio.to_thread.run_sync(os.fsync, fd)
            except OSError as exc:
                raise MediumError(f"the mount can't write the file back: {exc.strerror}") from exc
        while not fs.file(ino).sealed and fs.pool.writable:
            size = _length(fs.file(ino), offset, length)
            if fs.is_allocated(ino, offset, size, level=unit):
                break
            await self.allocate(ino, offset, size, unit)

    def _grant_now(
        self,
        ino: int,
        holder: Holder,
        offset: int,
        length: int | None,
        level: int,
        *,
        writable: bool,
        most: int,
    ) -> Lease:
        fs = self._fs
        inode = fs.file(ino)
        length = _length(inode, offset, length)
        if writable:
            fs.unsealed(ino)
            require_uncached(fs, ino)
        if fs.pool.writable:
            fs.zero_tail(ino)
        first, last = self._reach(inode, offset, length, level)
        extents = fs.extents(ino, first, last - first)
        if len(extents) > most:
            raise TooManyMappings(
                f"the file lies in {len(extents)} pieces there, and one process can map about "
                f"{most}; copy it, so that it lies in fewer"
            )
        require_level(extents, offset, length, level)
        pin = fs.pin(ino, first, last - first, writable=writable)
        return self.leases.grant(
            ino, offset, length, writable=writable, holder=holder, extents=extents, pin=pin
        )

    def _unit(self, level: int) -> Level | None:
        """Return the units that a range has to lie in, None for any place.

        Raises:
            Unsupported: no entry maps so many bytes.
        """
        for size in (level, self._page_size):
            if size and all(one.size != size for one in LEVELS):
                raise Unsupported(f"no page-table entry maps {format_size(size)}")
        wanted = max(level, self._page_size)
        return next((one for one in LEVELS if one.size == wanted and one != PTE), None)

    async def allocate(self, ino: int, offset: int, length: int, level: Level | None) -> Inode:
        """Allocate a range, growing the file if need be, a slice at a time.

        Raises:
            NoSpace, Busy, Sealed, TooBig, ReadOnly.

        Crash: a first part of the range is allocated.
        """
        fs = self._fs
        self._require_room(ino, offset, offset + length)
        slice_ = max(_SLICE, level.size if level else 0)
        at, end = offset, offset + length
        while True:
            stop = min(align_down(at, slice_) + slice_, end)
            inode = fs.allocate(ino, at, stop - at, level=level)
            at = stop
            if at >= end:
                return inode
            await trio.lowlevel.checkpoint()

    def _require_room(self, ino: int, offset: int, end: int) -> None:
        """Refuse what surely has no room before the first slice takes what there is."""
        held = 0
        for extent in self._fs.extents(ino, offset, end - offset):
            held += min(extent.offset + extent.length, end) - max(extent.offset, offset)
        missing, space = end - offset - held, self._fs.pool.space
        if missing > space.free_bytes:
            self._fs.end_stale_pins()
        if missing > space.free_bytes:
            raise NoSpace(
                f"{format_size(missing)} of the range are not allocated, and the pool has "
                f"{format_size(space.free_bytes)} free; delete something, or resize the pool"
            )

    def _reach(self, inode: Inode, offset: int, length: int, level: int) -> tuple[int, int]:
        """Return the range in whole units, so that the file's end can be huge, too."""
        unit = self._page_size
        if self._fs.pool.writable:  # else there may be anything behind the file's end
            unit = max(self._usual_unit, 1 << inode.align, level)
        return align_down(offset, unit), align_up(offset + length, unit)


def _length(inode: Inode, offset: int, length: int | None) -> int:
    """Return the length of a range, which ends with the file unless a length is given.

    Raises:
        Invalid: the range is not inside the file.
    """
    length = max(inode.size - offset, 0) if length is None else length
    if offset + length > inode.size:
        raise Invalid(
            f"the range {offset}+{length} is not inside the file, which has {inode.size} bytes; "
            f"grow it first"
        )
    return length


def require_level(extents: list[Extent], offset: int, length: int, level: int) -> None:
    """Do nothing when entries of ``level`` bytes can map the whole range.

    Raises:
        Unsupported: they can't; the message says where and why.
    """
    if not level or not length:
        return
    at, end = align_down(offset, level), offset + length
    why = "there is a hole"
    for piece in extents:
        stop = piece.offset + piece.length
        if stop <= at:
            continue
        if at >= end or piece.offset > at:
            break
        if (piece.start + at - piece.offset) % level:
            why = "its pool offset is not a multiple of that"
            break
        at = align_down(stop, level)
        if at < min(stop, end):
            why = "its extent is shorter"
            break
    if at < end:
        size = format_size(level)
        raise Unsupported(f"file offset {at:#x} can't be mapped by an entry of {size}: {why}")
