"""The daemon's methods over one file system, and the task that runs them."""

import grp
import os
import socket
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Final

import trio

import vfsmap
from vfsmap.daemon.calls import (
    AllocateCall,
    ExtentsCall,
    FileCall,
    LeaseCall,
    LeasesCall,
    MapCall,
    Nothing,
    ReleaseCall,
    StatsCall,
    ViolationCall,
)
from vfsmap.daemon.closer import Closer
from vfsmap.daemon.connection import DEFAULT_LIMITS, Connection, Limits
from vfsmap.daemon.ends import Ends, invalidate, show
from vfsmap.daemon.events import Events
from vfsmap.daemon.files import create_file, file_of_descriptor, file_of_path
from vfsmap.daemon.grants import Grants
from vfsmap.daemon.listening import listening
from vfsmap.daemon.server import Answer, Caller, Method, Server
from vfsmap.daemon.stats import Statistics
from vfsmap.daemon.ticket import EXTENTS_MAX
from vfsmap.daemon.tickets import Tickets
from vfsmap.daemon.varlink import readable
from vfsmap.errors import Denied, Invalid, Untrusted, VfsmapError
from vfsmap.fs import FileSystem
from vfsmap.mapping.layout import merge
from vfsmap.mapping.lease import Lease
from vfsmap.units import LEVELS, Extent

_EXTENTS_REPLIED: Final = 10_000
LEASES_REPLIED: Final = 10_000


class Service:
    """The methods of ``io.vfsmap.Mapping``."""

    def __init__(
        self,
        fs: FileSystem,
        *,
        sync: Callable[[], Awaitable[None]],
        seal: Callable[[int], Awaitable[object]],
        group: str | None = None,
        mount_device: int | None = None,
        limits: Limits,
        statistics: Statistics | None = None,
    ) -> None:
        self.methods = {
            "GetInfo": Method(Nothing, self._get_info),
            "Map": Method(MapCall, self._map),
            "Release": Method(ReleaseCall, self._release),
            "Publish": Method(LeaseCall, self._publish),
            "Extents": Method(ExtentsCall, self._extents),
            "Allocate": Method(AllocateCall, self._allocate),
            "Seal": Method(FileCall, self._seal_file),
            "Leases": Method(LeasesCall, self._leases),
            "Stats": Method(StatsCall, self._stats),
            "Violation": Method(ViolationCall, self._violation),
        }
        self._fs = fs
        self._sync = sync
        self._seal = seal
        self._device = mount_device
        self._group = _group_number(group)
        medium = fs.pool.pmem.medium
        self._medium = {
            "name": medium.name,
            "commit": medium.commit.value,
            "page_size": medium.page_size,
            "huge": medium.huge,
        }
        self._owner = os.fstat(fs.pool.pmem.fd).st_uid
        self._grants = Grants(fs, sync, leases_max=limits.leases_max)
        self._events = Events(limits.events_max)
        self._statistics = statistics or Statistics(fs)
        self._statistics.events = self._events.counts
        self._statistics.leases = self._grants.leases.counts
        self.calls = self._statistics.calls
        self._ends = Ends(fs, self._grants.leases, self._events)
        self.tend = self._ends.tend
        self._tickets = Tickets(self._grant_at_once)
        fs.lease_by_attribute = self._tickets.lease
        # descriptions of our own: one that shared the lock would keep it when we are gone
        pool = f"/proc/self/fd/{fs.pool.pmem.fd}"
        self._readable = os.open(pool, os.O_RDONLY | os.O_CLOEXEC)
        self._writable = os.open(pool, os.O_RDWR | os.O_CLOEXEC) if fs.pool.writable else -1

    def close(self) -> None:
        """Close the descriptors that are handed out."""
        self._fs.lease_by_attribute = None
        self._ends.close()
        for fd in (self._readable, self._writable):
            if fd >= 0:
                os.close(fd)

    def hung_up(self, connection: Connection) -> None:
        """Note that a client is gone."""
        self._tickets.end(connection)
        self._ends.hung_up(connection)

    # trust

    def trusts(self, connection: Connection) -> bool:
        """Tell whether a client may have the pool's descriptor."""
        if connection.holder.uid in (0, self._owner):
            return True
        # without a mount the kernel has checked no permission for anybody else
        return self._device is not None and self._group in connection.groups()

    def _require_trusted(self, connection: Connection) -> None:
        if not connection.trusted:
            raise Untrusted(
                f"user {connection.holder.uid} is not trusted with direct mappings: only root, the "
                f"pool's owner and the group named by --group are"
            )

    def _file(self, caller: Caller, wanted: FileCall, *, writing: bool = False) -> int:
        """Return the number of the file that a call names."""
        if self._device is None:
            if wanted.path is None or wanted.file is not None:
                raise Invalid("this daemon has no mount: name the file by path, from the root on")
            return file_of_path(self._fs, wanted.path).ino
        if wanted.file is None or wanted.path is not None:
            raise Invalid("name the file by the index of its descriptor, in the parameter file")
        fd = caller.descriptor(wanted.file)
        ino, dirty = file_of_descriptor(fd, self._device, writing=writing)
        if dirty:
            caller.close_first(fd)
        return ino

    # methods

    async def _get_info(self, caller: Caller, _: Nothing) -> Answer:
        pool = self._fs.pool
        return Answer(
            {
                "version": vfsmap.__version__,
                "pool": readable(str(pool.path)),
                "label": pool.label,
                "uuid": str(pool.uuid),
                "size": pool.size,
                "free": pool.space.free_bytes,
                "promise": pool.promise.value,
                "medium": self._medium,
                "writable": pool.writable,
                "mounted": self._device is not None,
                "trusted": caller.connection.trusted,
            }
        )

    async def _map(self, caller: Caller, wanted: MapCall) -> Answer:
        connection = caller.connection
        try:
            lease = await self._grant(caller, wanted)
        except VfsmapError as exc:
            self._events.emit("refused", connection.holder, detail=readable(str(exc)))
            raise
        self._ends.watch(connection)
        self._events.emit("granted", connection.holder, lease)
        parameters: dict[str, object] = {
            "lease": lease.lease,
            "pool": 0,
            "inode": lease.inode,
            "offset": lease.offset,
            "length": lease.length,
            "extents": _plain(lease.extents),
            "medium": self._medium,
            "sealed": self._fs.file(lease.inode).sealed,
        }
        mounted = self._device is not None
        ticket = self._tickets.of(connection) if wanted.ticket and mounted else None
        if ticket is not None and not lease.writable:
            parameters["ticket"] = {
                "name": ticket.name,
                "secret": ticket.secret.hex(),
                "pool": readable(str(self._fs.pool.path.absolute())),
            }
        return Answer(parameters, (self._writable if lease.writable else self._readable,))

    async def _grant(self, caller: Caller, wanted: MapCall) -> Lease:
        self._require_trusted(caller.connection)
        writable = bool(wanted.writable)
        if writable:
            self._fs.pool.require_writable()
        ino = self._file(caller, wanted, writing=writable)
        caller.connection.watch_process()
        return await self._grants.grant(
            ino,
            caller.descriptor(wanted.file) if wanted.file is not None else None,
            caller.connection.holder,
            offset=wanted.offset or 0,
            length=wanted.length,
            writable=writable,
            level=wanted.level or 0,
        )

    def _grant_at_once(
        self, connection: Connection, ino: int, offset: int, length: int | None, level: int
    ) -> Lease | None:
        lease = self._grants.grant_at_once(
            ino, connection.holder, offset=offset, length=length, level=level, most=EXTENTS_MAX
        )
        if lease is not None:
            self._events.emit("granted", connection.holder, lease)
        return lease

    async def _release(self, caller: Caller, wanted: ReleaseCall) -> Answer:
        lease = self._grants.leases.get(wanted.lease, caller.connection.holder)
        await self._ends.release(lease, alone=bool(wanted.alone))
        return Answer({})

    async def _publish(self, caller: Caller, wanted: LeaseCall) -> Answer:
        lease = self._grants.leases.get(wanted.lease, caller.connection.holder)
        if not lease.writable:
            raise Invalid(f"lease {lease.lease} is for reading: there is nothing to publish")
        await show(self._fs, lease.inode)
        return Answer({})

    async def _extents(self, caller: Caller, wanted: ExtentsCall) -> Answer:
        self._require_trusted(caller.connection)
        ino = self._file(caller, wanted)
        inode = self._fs.file(ino)
        descriptor = self._fs.seal_of(ino)
        offset = wanted.offset or 0
        if wanted.tree:
            extents = [e for e in self._fs.tree_extents(ino) if e.offset + e.length > offset]
        else:
            extents = list(merge(self._fs.extents(ino, offset, max(inode.size - offset, 0))))
        answer: dict[str, object] = {
            "inode": ino,
            "size": inode.size,
            "sealed": inode.sealed,
            "extents": _plain(extents[:_EXTENTS_REPLIED]),
        }
        if descriptor is not None:
            answer["descriptor"] = descriptor.hex()
        return Answer(answer)

    async def _allocate(self, caller: Caller, wanted: AllocateCall) -> Answer:
        self._require_trusted(caller.connection)
        level = next((one for one in LEVELS if one.size == wanted.level), None)
        if wanted.level and level is None:
            raise Invalid(f"level {wanted.level}: the bytes of a page-table level are expected")
        if wanted.create and wanted.path is not None and self._device is None:
            create_file(self._fs, wanted.path)
        ino = self._file(caller, wanted, writing=True)
        inode = await self._grants.allocate(ino, wanted.offset or 0, wanted.length, level)
        if self._fs.pool.grouped:
            await self._sync()
        await invalidate(self._fs, ino)  # the kernel has cached the old size
        return Answer({"inode": ino, "size": inode.size})

    async def _seal_file(self, caller: Caller, wanted: FileCall) -> Answer:
        self._require_trusted(caller.connection)
        ino = self._file(caller, wanted)
        owner = self._fs.file(ino).uid
        if caller.connection.holder.uid not in (0, owner):
            raise Denied(f"only root and the file's owner, user {owner}, may seal it")
        digest = await self._seal(ino)
        await invalidate(self._fs, ino)
        return Answer({"digest": str(digest)})

    async def _leases(self, caller: Caller, wanted: LeasesCall) -> Answer:
        self._require_trusted(caller.connection)
        leases = [
            {
                "lease": lease.lease,
                "inode": lease.inode,
                "offset": lease.offset,
                "length": lease.length,
                "writable": lease.writable,
                "pid": lease.holder.pid,
                "uid": lease.holder.uid,
                "granted_ns": lease.granted_ns,
                "orphaned": lease.orphaned,
            }
            for lease in self._grants.leases.after(wanted.after or 0, LEASES_REPLIED)
        ]
        return Answer({"leases": leases})

    async def _stats(self, caller: Caller, wanted: StatsCall) -> Answer:
        self._require_trusted(caller.connection)
        if wanted.coverage:
            await self._statistics.count()
        return Answer(self._statistics.sample())

    async def _violation(self, caller: Caller, wanted: ViolationCall) -> Answer:
        holder = caller.connection.holder
        lease = self._grants.leases.get(wanted.lease, holder)
        self._events.emit(
            "violation",
            holder,
            lease,
            detail=wanted.detail,
            offset=wanted.offset,
            length=wanted.length,
        )
        return Answer({})

    async def stream(self, connection: Connection) -> None:
        """Send events to a client until it hangs up.

        Raises:
            Untrusted: it may not listen.
        """
        self._require_trusted(connection)
        await self._events.stream(connection)


def _plain(extents: Iterable[Extent]) -> list[dict[str, int]]:
    return [{"offset": e.offset, "start": e.start, "length": e.length} for e in extents]


def _group_number(group: str | None) -> int | None:
    if group is None:
        return None
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError as exc:
        raise Invalid(f"there is no group {group!r}; make it, or name another") from exc


async def serve_mapping(
    fs: FileSystem,
    *,
    socket_path: Path,
    listener: socket.socket | None = None,
    sync: Callable[[], Awaitable[None]],
    seal: Callable[[int], Awaitable[object]],
    group: str | None = None,
    mount_device: int | None = None,
    limits: Limits = DEFAULT_LIMITS,
    statistics: Statistics | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve leases on a file system's files until cancelled.

    Args:
        fs: the file system, which this loop's thread owns.
        socket_path: where to listen.
        listener: a socket that listens there already, and stays; None: one is made.
        sync: makes what was done durable.
        seal: seals the inode of a number, and returns its digest.
        group: whose members are trusted as root and the pool's owner are.
        mount_device: the device number of the mount whose descriptors name files; None: files are
            named by paths.
        limits: what a client may take.
        statistics: where calls and events are counted, for those who want to know.
        task_status: told when clients can connect.

    Raises:
        Busy, Denied, Invalid: the socket can't be had, or there is no such group.
    """
    closer = Closer()
    service = Service(
        fs,
        sync=sync,
        seal=seal,
        group=group,
        mount_device=mount_device,
        limits=limits,
        statistics=statistics,
    )
    try:
        with listener or listening(socket_path) as door:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(service.tend)
                task_status.started()
                await Server(service, closer, limits).run(door)
    finally:
        service.close()
