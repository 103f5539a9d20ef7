"""Granting: what has to be so before a client may map a range, and when its lease has ended."""

import os
from collections.abc import Awaitable, Callable

import trio

from vfsmap.errors import Busy, Invalid, Unsupported
from vfsmap.fs import FileSystem, Inode
from vfsmap.mapping.lease import Holder, Lease, LeaseTable
from vfsmap.pmem.procmaps import Scan
from vfsmap.units import LEVELS, MIB, PMD, Extent, Level, align_down, align_up, format_size

_SLICE = 32 * MIB
"""What is allocated before other requests get their turn."""


class Grants:
    """The leases on the files of one pool."""

    def __init__(self, fs: FileSystem, sync: Callable[[], Awaitable[None]]) -> None:
        self._fs = fs
        self._sync = sync
        self.leases = LeaseTable()

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
    ) -> tuple[Lease, list[Extent]]:
        """Prepare a range of a file, and record the lease.

        Raises:
            Busy: the file is open through the mount's cache for writing.
            Sealed, NoSpace, Unsupported, Invalid.

        Crash: the range may be allocated; there is no lease.
        """
        fs = self._fs
        inode = fs.unsealed(ino) if writable else fs.file(ino)
        length = max(inode.size - offset, 0) if length is None else length
        if offset < 0 or length <= 0 or offset + length > inode.size:
            raise Invalid(
                f"the range {offset}+{length} is not inside the file, which has {inode.size} bytes"
            )
        fs.hold(ino)
        try:
            await self._write_back(ino, fd, writable=writable)
            if not inode.sealed:
                await self._place(ino, offset, length, level)
            first, last = self._reach(inode, offset, length)
            extents = fs.extents(ino, first, last - first)
            require_level(extents, offset, length, level)
            if writable and fs.use(ino).cached_writers:
                raise Busy("the file is open for writing through the mount's cache: close it first")
            if not inode.sealed:
                fs.zero_tail(ino)
            if fs.pool.grouped:
                await self._sync()
            pin = fs.pin(ino, first, last - first, writable=writable)
        finally:
            fs.drop(ino)
        lease = self.leases.grant(
            ino, offset, length, writable=writable, holder=holder, extents=extents, pin=pin
        )
        return lease, extents

    async def _write_back(self, ino: int, fd: int | None, *, writable: bool) -> None:
        """Bring what the mount's page cache holds of the file into the pool."""
        if not self._fs.use(ino).cached_writers:
            return  # then there can be no dirty page
        if writable:
            raise Busy("the file is open for writing through the mount's cache: close it first")
        if fd is not None:
            await trio.to_thread.run_sync(os.fsync, fd)

    async def _place(self, ino: int, offset: int, length: int, level: int) -> None:
        """Fill holes, and move into units what has to lie in them."""
        wanted = max(level, self._fs.pool.pmem.medium.page_size)
        unit = next((lv for lv in LEVELS if lv.size == wanted), None)
        if level and unit is None:
            raise Unsupported(f"no entry maps {format_size(wanted)}")
        if not self._fs.is_allocated(ino, offset, length, level=unit):
            await self.allocate(ino, offset, length, unit)

    async def allocate(self, ino: int, offset: int, length: int, level: Level | None) -> Inode:
        """Allocate a range a slice at a time."""
        fs = self._fs
        slice_ = max(_SLICE, level.size if level else 0)
        at, end = offset, offset + length
        while at < end:
            stop = min(align_down(at, slice_) + slice_, end)
            fs.allocate(ino, at, stop - at, level=level)
            at = stop
            await trio.lowlevel.checkpoint()
        return fs.file(ino)

    def _reach(self, inode: Inode, offset: int, length: int) -> tuple[int, int]:
        """Return the range in whole units, so that the file's end can be huge, too."""
        unit = max(PMD.size, 1 << inode.align, self._fs.pool.pmem.medium.page_size)
        return align_down(offset, unit), align_up(offset + length, unit)

    # ends

    def end_unmapped(self, found: Scan) -> int:
        """End the orphans that nobody maps any more; return how many."""
        ended = 0
        for lease in self.leases.orphans():
            unknown = lease.holder.pid in found.unreadable
            if not unknown and not any(found.covers(e.start, e.length) for e in lease.extents):
                self.leases.end(lease)
                self._fs.unpin(lease.pin)
                ended += 1
        return ended


def require_level(extents: list[Extent], offset: int, length: int, level: int) -> None:
    """Do nothing when entries of ``level`` bytes can map the whole range.

    Raises:
        Unsupported: they can't; the message says where and why.
    """
    if not level:
        return
    for unit in range(align_down(offset, level), offset + length, level):
        extent = next((e for e in extents if e.offset <= unit < e.offset + e.length), None)
        where = f"file offset {unit:#x} can't be mapped by an entry of {format_size(level)}"
        if extent is None:
            raise Unsupported(f"{where}: there is a hole")
        if (extent.start + unit - extent.offset) % level:
            raise Unsupported(f"{where}: its pool offset is not a multiple of that")
        if unit + level > extent.offset + extent.length:
            raise Unsupported(f"{where}: its extent is shorter")
