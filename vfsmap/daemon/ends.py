"""How leases end: released or orphaned, and over when nobody maps their bytes any more."""

import logging
import math
import time
from contextlib import suppress
from typing import Final

import trio

from vfsmap.daemon.connection import Connection
from vfsmap.daemon.events import Events
from vfsmap.errors import NotFound
from vfsmap.fs import FileSystem
from vfsmap.mapping.lease import Lease, LeaseId, LeaseTable
from vfsmap.pmem.procmaps import Scan, scan

log = logging.getLogger("vfsmap.daemon")

RESCAN_INTERVAL: Final = 2.0
"""Seconds after which it is asked again whether leases have ended."""
_RESCAN_PAUSE: Final = 0.1
_SCAN_REST_NS: Final = 100_000_000


class Ends:
    """Ends leases, and has the mount show what was stored under them."""

    def __init__(self, fs: FileSystem, leases: LeaseTable, events: Events) -> None:
        self._fs = fs
        self._leases = leases
        self._events = events
        self._holding: set[Connection] = set()
        self._wanted = trio.Event()
        self._scanned_ns = 0
        self._mapped: set[LeaseId] = set()
        """Orphans that the last scan has found mapped."""
        self._untold: set[LeaseId] = set()
        """Orphans that were not released, so nobody has been told of their end."""
        self._unshown: set[LeaseId] = set()
        """Writable leases that were not released, or whose bytes somebody mapped after that."""
        self._stored: set[int] = set()
        """Files that such leases have ended on."""
        fs.end_stale_pins = self.end_stale

    def close(self) -> None:
        """End nothing any more."""
        self._fs.end_stale_pins = lambda: None

    def watch(self, connection: Connection) -> None:
        """Note that a client holds a lease."""
        if not self._holding:
            self._wanted.set()  # wakes the tender: from now on there is a process to watch
        self._holding.add(connection)
        if connection.closed:  # while its call was waiting
            self.hung_up(connection)

    def hung_up(self, connection: Connection) -> None:
        """Note that a client is gone."""
        self._holding.discard(connection)
        leases = self._leases.held_by(connection.holder)
        self._untold |= {lease.lease for lease in leases}
        self._unshown |= {lease.lease for lease in leases if lease.writable}
        self._orphan(leases)

    async def release(self, lease: Lease, *, alone: bool) -> None:
        """Take a lease from its holder, who has unmapped it.

        ``alone`` is the holder's word that nobody else has come to map the bytes through it: then
        the lease ends at once, else when a scan says so.
        """
        try:
            if lease.writable:
                await show(self._fs, lease.inode)
        finally:
            if not lease.orphaned:  # while that took place it may have hung up
                self._orphan([lease])
                if alone:
                    self._leases.end(lease)
                    self._fs.unpin(lease.pin)
                self._events.emit("ended", lease.holder, lease)

    def _orphan(self, leases: list[Lease]) -> None:
        for lease in leases:
            self._leases.orphan(lease)
        if leases:
            self._wanted.set()

    async def tend(self) -> None:
        """End leases: soon after they are released, when holders have died, and now and then."""
        while True:
            busy = self._holding or self._leases.orphans() or self._fs.withheld
            with trio.move_on_after(RESCAN_INTERVAL if busy else math.inf):
                await self._wanted.wait()
                await trio.sleep(_RESCAN_PAUSE)  # so that many ends make one scan
            self._wanted = trio.Event()
            try:
                await self._tend_once()
            except Exception:
                log.exception("leases were not ended; they will be next time")

    async def _tend_once(self) -> None:
        for connection in list(self._holding):
            if connection.process_has_ended():  # a child has inherited its socket
                connection.close()
                self.hung_up(connection)
        orphans = self._leases.orphans()
        if orphans or self._fs.withheld:
            self._end(await trio.to_thread.run_sync(scan, self._fs.pool.pmem), orphans)
        while self._stored:
            with suppress(NotFound):  # its last name went while it was mapped
                await show(self._fs, self._stored.pop())

    def end_stale(self) -> None:
        """End, right now, the leases of windows that are gone: they are in somebody's way."""
        orphans = self._leases.orphans()
        if not orphans and not self._fs.withheld:
            return
        # who holds on to a mapping must not have us ask for it all the time
        rested = time.monotonic_ns() - self._scanned_ns > _SCAN_REST_NS
        if rested or any(lease.lease not in self._mapped for lease in orphans):
            self._end(scan(self._fs.pool.pmem), orphans)

    def _end(self, found: Scan, orphans: list[Lease]) -> None:
        """End those orphans that a scan, begun after they were, has not found mapped."""
        self._scanned_ns = time.monotonic_ns()
        for lease in orphans:
            if not _is_mapped(lease, found) and self._leases.end(lease):
                self._fs.unpin(lease.pin)
                if lease.lease in self._untold:
                    self._untold.discard(lease.lease)
                    self._events.emit("ended", lease.holder, lease)
                if lease.lease in self._unshown:
                    self._unshown.discard(lease.lease)
                    self._stored.add(lease.inode)
                    self._wanted.set()
        left = self._leases.orphans()
        self._mapped = {lease.lease for lease in left}
        self._unshown |= {lease.lease for lease in left if lease.writable}
        if self._fs.withheld:
            self._fs.release_withheld([(m.start, m.length) for m in found.ranges])


def _is_mapped(lease: Lease, found: Scan) -> bool:
    # a process that can't be looked at has what it had, until it ends
    return lease.holder.pid in found.unreadable or any(
        found.covers(extent.start, extent.length) for extent in lease.extents
    )


async def show(fs: FileSystem, ino: int) -> None:
    """Have the mount show what windows have stored into a file, as of now.

    Raises:
        NotFound: the file is gone.
    """
    if fs.pool.writable:
        fs.setattr(ino, mtime_ns=time.time_ns())
    await invalidate(fs, ino)


async def invalidate(fs: FileSystem, ino: int) -> None:
    """Have the mount forget what the kernel has cached of a file."""
    # the kernel may write dirty pages back first, which takes this very loop
    for forget in fs.invalidators:
        await trio.to_thread.run_sync(forget, ino)
