"""The daemon's methods, and the socket that they are called over."""

import grp
import logging
import os
import socket
import stat
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
import trio

import vfsmap
from vfsmap.daemon.connection import Closer, Connection, Message
from vfsmap.daemon.files import file_of_descriptor, file_of_path
from vfsmap.daemon.grants import Grants
from vfsmap.daemon.varlink import (
    INTERFACE,
    SERVICE,
    SERVICE_DESCRIPTION,
    Call,
    Reply,
    VarlinkError,
    convert,
    decode_call,
    error_reply,
    interface_description,
)
from vfsmap.errors import Busy, Denied, Invalid, ProtocolError, VfsmapError
from vfsmap.fs import FileSystem
from vfsmap.mapping.lease import Lease
from vfsmap.pmem.procmaps import Scan, scan
from vfsmap.units import LEVELS, Extent

log = logging.getLogger("vfsmap.daemon")

CONNECTIONS_MAX: Final = 256
CONNECTIONS_MAX_PER_USER: Final = 64
_EVENTS_BUFFERED: Final = 1000
_RESCAN_INTERVAL: Final = 2.0
_RESCAN_PAUSE: Final = 0.1
_ACCEPT_PAUSE: Final = 0.1


class FileParameters(msgspec.Struct):
    """How every method names a file."""

    file: int | None = None
    path: str | None = None


class MapParameters(FileParameters):
    """Parameters of Map."""

    offset: int | None = None
    length: int | None = None
    writable: bool | None = None
    level: int | None = None


class AllocateParameters(FileParameters, kw_only=True):
    """Parameters of Allocate."""

    offset: int | None = None
    length: int
    level: int | None = None


class ExtentsParameters(FileParameters):
    """Parameters of Extents."""

    tree: bool | None = None


class LeaseParameters(msgspec.Struct):
    """Parameters of the methods that name a lease."""

    lease: int


class ViolationParameters(LeaseParameters):
    """Parameters of Violation."""

    detail: str


class DescriptionParameters(msgspec.Struct):
    """Parameters of GetInterfaceDescription."""

    interface: str


class Service:
    """The methods of ``io.vfsmap.Mapping`` over one file system."""

    def __init__(
        self,
        fs: FileSystem,
        *,
        group: str | None,
        sync: Callable[[], Awaitable[None]],
        seal: Callable[[int], Awaitable[object]],
        mount_device: int | None,
    ) -> None:
        self._fs = fs
        self._sync = sync
        self._seal = seal
        self._device = mount_device
        self._group = _group_number(group)
        self._owner = os.fstat(fs.pool.pmem.fd).st_uid
        self._grants = Grants(fs, sync)
        self._closer = Closer()
        self._watchers: set[trio.MemorySendChannel[dict[str, Any]]] = set()
        self._connections: dict[int, int] = {}
        self._rescan_wanted = trio.Event()
        fs.end_stale_pins = self._end_orphans
        # descriptions of our own: one that shared the lock would keep it when we are gone
        self._readable = os.open(f"/proc/self/fd/{fs.pool.pmem.fd}", os.O_RDONLY | os.O_CLOEXEC)
        self._writable = -1
        if fs.pool.writable:
            self._writable = os.open(f"/proc/self/fd/{fs.pool.pmem.fd}", os.O_RDWR | os.O_CLOEXEC)

    def close(self) -> None:
        """Close the descriptors that are handed out."""
        for fd in (self._readable, self._writable):
            if fd >= 0:
                os.close(fd)

    # clients

    async def serve(self, sock: trio.socket.SocketType) -> None:
        """Serve one client until it hangs up, or breaks a rule, and see its leases out."""
        connection = Connection(sock, self._closer)
        uid = connection.holder.uid
        mine = self._connections.get(uid, 0)
        if mine >= CONNECTIONS_MAX_PER_USER or sum(self._connections.values()) >= CONNECTIONS_MAX:
            log.warning("user %d has too many connections", uid)
            connection.close()
            return
        self._connections[uid] = mine + 1
        try:
            while message := await connection.receive():
                try:
                    await self._answer(connection, message)
                finally:
                    message.close()
        except ProtocolError as exc:
            log.warning("client %d: %s", connection.holder.pid, exc)
        except OSError:  # it has hung up in the middle
            pass
        except Exception:
            log.exception("client %d: its connection failed", connection.holder.pid)
        finally:
            self._connections[uid] -= 1
            connection.close()
        leases = self._grants.leases.held_by(connection.holder)
        if leases:
            self._end(connection, leases)
            await connection.process_ended()
            self._rescan_wanted.set()

    async def _answer(self, connection: Connection, message: Message) -> None:
        call = decode_call(message.raw)
        descriptors: tuple[int, ...] = ()
        try:
            if call.method == f"{INTERFACE}.Events":
                await self._events(connection, call)
                return
            parameters, descriptors = await self._dispatch(connection, call, message)
            reply = Reply(parameters)
        except (VfsmapError, VarlinkError) as exc:
            reply = error_reply(exc)
        except Exception:
            log.exception("%s failed", call.method)
            reply = error_reply(VfsmapError("an internal error; the daemon's log has more"))
        if not call.oneway:
            await connection.send(reply, descriptors)

    async def _dispatch(
        self, connection: Connection, call: Call, message: Message
    ) -> tuple[dict[str, Any], tuple[int, ...]]:
        interface, _, name = call.method.rpartition(".")
        if interface == SERVICE:
            return self._service(name, call), ()
        if interface != INTERFACE:
            raise VarlinkError("InterfaceNotFound", interface=interface)
        if name == "GetInfo":
            return self._info(connection), ()
        if name != "Map" and name not in _METHODS:
            raise VarlinkError("MethodNotFound", method=name)
        self._require_trusted(connection)
        if name == "Map":
            return await self._map(connection, message, convert(call.parameters, MapParameters))
        kind, handler = _METHODS[name]
        return await handler(self, connection, message, convert(call.parameters, kind)), ()

    def _service(self, name: str, call: Call) -> dict[str, Any]:
        if name == "GetInfo":
            return {
                "vendor": "vfsmap",
                "product": "vfsmap mapping daemon",
                "version": vfsmap.__version__,
                "url": "",
                "interfaces": [SERVICE, INTERFACE],
            }
        if name == "GetInterfaceDescription":
            interface = convert(call.parameters, DescriptionParameters).interface
            known = {SERVICE: lambda: SERVICE_DESCRIPTION, INTERFACE: interface_description}
            if interface not in known:
                raise VarlinkError("InterfaceNotFound", interface=interface)
            return {"description": known[interface]()}
        raise VarlinkError("MethodNotFound", method=name)

    # trust

    def _trusts(self, connection: Connection) -> bool:
        if connection.holder.uid in (0, self._owner):
            return True
        # without a mount the kernel has checked no permission for anybody else
        return self._device is not None and self._group in connection.groups

    def _require_trusted(self, connection: Connection) -> None:
        if not self._trusts(connection):
            self._event("refused", connection, detail="not trusted")
            raise Denied(
                f"user {connection.holder.uid} is not trusted with direct mappings: only root, the "
                f"pool's owner and the group named by --group are"
            )

    def _file(self, message: Message, wanted: FileParameters, *, writing: bool = False) -> int:
        if wanted.file is not None and self._device is not None:
            fd = message.descriptor(wanted.file)
            return file_of_descriptor(fd, self._device, writing=writing)
        if wanted.path is not None and self._device is None:
            return file_of_path(self._fs, wanted.path)
        how = "path" if self._device is None else "file, the index of a descriptor"
        raise Invalid(f"this daemon wants the parameter {how}")

    # methods

    def _info(self, connection: Connection) -> dict[str, Any]:
        pool = self._fs.pool
        return {
            "version": vfsmap.__version__,
            "pool": str(pool.path),
            "label": pool.label,
            "uuid": str(pool.uuid),
            "size": pool.size,
            "free": pool.space.free_bytes,
            "promise": pool.promise.value,
            "medium": self._medium(),
            "mounted": self._device is not None,
            "trusted": self._trusts(connection),
        }

    def _medium(self) -> dict[str, Any]:
        medium = self._fs.pool.pmem.medium
        return {
            "name": medium.name,
            "commit": medium.commit.value,
            "page_size": medium.page_size,
            "huge": medium.huge,
        }

    async def _map(
        self, connection: Connection, message: Message, wanted: MapParameters
    ) -> tuple[dict[str, Any], tuple[int, ...]]:
        writable = bool(wanted.writable)
        connection.watch_process()
        try:
            if writable:
                self._fs.pool.require_writable()
            ino = self._file(message, wanted, writing=writable)
            fd = message.descriptor(wanted.file) if wanted.file is not None else None
            lease, extents = await self._grants.grant(
                ino,
                fd,
                connection.holder,
                offset=wanted.offset or 0,
                length=wanted.length,
                writable=writable,
                level=wanted.level or 0,
            )
        except VfsmapError as exc:
            self._event("refused", connection, detail=str(exc))
            raise
        self._event("granted", connection, lease)
        answer = {
            "lease": lease.lease,
            "pool": 0,
            "length": lease.length,
            "extents": _plain(extents),
            "medium": self._medium(),
            "sealed": self._fs.get(ino).sealed,
        }
        return answer, (self._writable if writable else self._readable,)

    async def _release(
        self, connection: Connection, _: Message, wanted: LeaseParameters
    ) -> dict[str, Any]:
        self._end(connection, [self._grants.leases.get(wanted.lease, connection.holder)])
        return {}

    async def _publish(
        self, connection: Connection, _: Message, wanted: LeaseParameters
    ) -> dict[str, Any]:
        lease = self._grants.leases.get(wanted.lease, connection.holder)
        for invalidate in self._fs.invalidators:
            await trio.to_thread.run_sync(invalidate, lease.inode)
        return {}

    async def _extents(
        self, connection: Connection, message: Message, wanted: ExtentsParameters
    ) -> dict[str, Any]:
        ino = self._file(message, wanted)
        inode = self._fs.file(ino)
        descriptor = self._fs.seal_of(ino)
        extents = self._fs.tree_extents(ino) if wanted.tree else self._fs.extents(ino)
        answer = {"size": inode.size, "sealed": inode.sealed, "extents": _plain(extents)}
        if descriptor is not None:
            answer["descriptor"] = descriptor.hex()
        return answer

    async def _allocate(
        self, connection: Connection, message: Message, wanted: AllocateParameters
    ) -> dict[str, Any]:
        ino = self._file(message, wanted, writing=True)
        level = None
        if wanted.level:
            level = next((lv for lv in LEVELS if lv.size == wanted.level), None)
            if level is None:
                raise Invalid(f"{wanted.level} bytes is not the size of a page-table level")
        inode = await self._grants.allocate(ino, wanted.offset or 0, wanted.length, level)
        await self._sync()
        for invalidate in self._fs.invalidators:  # the kernel has cached the old size
            await trio.to_thread.run_sync(invalidate, ino)
        return {"size": inode.size}

    async def _seal_file(
        self, connection: Connection, message: Message, wanted: FileParameters
    ) -> dict[str, Any]:
        ino = self._file(message, wanted)
        owner = self._fs.get(ino).uid
        if connection.holder.uid not in (0, owner):
            raise Denied(f"only root and the file's owner, user {owner}, may seal it")
        return {"digest": str(await self._seal(ino))}

    async def _leases(
        self, connection: Connection, _: Message, wanted: msgspec.Struct
    ) -> dict[str, Any]:
        return {
            "leases": [
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
                for lease in self._grants.leases
            ]
        }

    async def _violation(
        self, connection: Connection, _: Message, wanted: ViolationParameters
    ) -> dict[str, Any]:
        lease = self._grants.leases.get(wanted.lease, connection.holder)
        self._event("violation", connection, lease, detail=wanted.detail)
        return {}

    # events

    async def _events(self, connection: Connection, call: Call) -> None:
        self._require_trusted(connection)
        if not call.more:
            raise VarlinkError("ExpectedMore")
        send, receive = trio.open_memory_channel[dict[str, Any]](_EVENTS_BUFFERED)
        self._watchers.add(send)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._forward, connection, receive, nursery.cancel_scope)
                await connection.wait_hangup()
                nursery.cancel_scope.cancel()
        finally:
            self._watchers.discard(send)

    async def _forward(
        self,
        connection: Connection,
        events: trio.MemoryReceiveChannel[dict[str, Any]],
        scope: trio.CancelScope,
    ) -> None:
        try:
            async for event in events:
                await connection.send(Reply({"event": event}, continues=True))
        except (OSError, ProtocolError):
            pass
        connection.close()
        scope.cancel()

    def _event(
        self, kind: str, connection: Connection, lease: Lease | None = None, detail: str = ""
    ) -> None:
        event = {
            "time_ns": time.time_ns(),
            "kind": kind,
            "pid": connection.holder.pid,
            "uid": connection.holder.uid,
            "detail": detail,
        }
        if lease is not None:
            event |= {"lease": lease.lease, "inode": lease.inode}
        for watcher in list(self._watchers):
            try:
                watcher.send_nowait(event)
            except trio.WouldBlock:  # too slow: it loses its connection, not the others their time
                self._watchers.discard(watcher)
                watcher.close()

    # the end of leases

    def _end(self, connection: Connection, leases: list[Lease]) -> None:
        """Take leases from their holder; they end when a scan, soon, says that nobody maps them."""
        for lease in leases:
            lease.orphaned = True
            self._event("ended", connection, lease)
        self._rescan_wanted.set()

    def _end_orphans(self) -> None:
        if self._grants.leases.orphans() or self._fs.withheld:
            self._end_unmapped(scan(self._fs.pool.pmem))

    def _end_unmapped(self, found: Scan) -> None:
        self._grants.end_unmapped(found)
        if self._fs.withheld:
            self._fs.release_withheld([(m.start, m.length) for m in found.ranges])

    async def rescan(self) -> None:
        """Let go of what nobody maps any more: when a holder has died, and now and then."""
        while True:
            with trio.move_on_after(_RESCAN_INTERVAL):
                await self._rescan_wanted.wait()
                await trio.sleep(_RESCAN_PAUSE)  # so that many ends make one scan
            self._rescan_wanted = trio.Event()
            if self._grants.leases.orphans() or self._fs.withheld:
                self._end_unmapped(await trio.to_thread.run_sync(scan, self._fs.pool.pmem))


Handler = Callable[..., Awaitable[dict[str, Any]]]
_METHODS: Final[dict[str, tuple[type[msgspec.Struct], Handler]]] = {
    "Release": (LeaseParameters, Service._release),
    "Publish": (LeaseParameters, Service._publish),
    "Extents": (ExtentsParameters, Service._extents),
    "Allocate": (AllocateParameters, Service._allocate),
    "Seal": (FileParameters, Service._seal_file),
    "Leases": (msgspec.defstruct("NoParameters", []), Service._leases),
    "Violation": (ViolationParameters, Service._violation),
}


def _plain(extents: list[Extent]) -> list[dict[str, int]]:
    return [extent._asdict() for extent in extents]


def _group_number(group: str | None) -> int | None:
    if group is None:
        return None
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError as exc:
        raise Invalid(f"there is no group {group!r}") from exc


@contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """Listen on a socket of this name, which is removed in the end.

    Everybody may connect; who is trusted is decided by the peer's credentials.

    Raises:
        Busy: another daemon listens there.
        Invalid: something else has the name.
    """
    if path.exists() or path.is_symlink():
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise Invalid(f"{path} exists and is not a socket; name another with --socket")
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except OSError:  # left behind by a daemon that was killed
                path.unlink()
            else:
                raise Busy(f"another daemon listens on {path}; name another with --socket")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        try:
            path.chmod(0o666)
            sock.listen(128)
            yield sock
        finally:
            path.unlink(missing_ok=True)


async def serve_mapping(
    fs: FileSystem,
    *,
    socket_path: Path,
    sync: Callable[[], Awaitable[None]],
    seal: Callable[[int], Awaitable[object]],
    group: str | None = None,
    mount_device: int | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve leases on a file system's files until cancelled.

    Args:
        fs: the file system, which this loop's thread owns.
        socket_path: where to listen.
        sync: makes what was done durable.
        seal: seals the inode of a number, and returns its digest.
        group: whose members are trusted as root and the pool's owner are.
        mount_device: the device number of the mount whose descriptors name files; None: files are
            named by paths.
        task_status: told when clients can connect.

    Raises:
        Busy, Invalid: the socket can't be had.
    """
    service = Service(fs, group=group, sync=sync, seal=seal, mount_device=mount_device)
    try:
        with listening(socket_path) as raw:
            listener = trio.socket.from_stdlib_socket(raw)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(service.rescan)
                task_status.started()
                while True:
                    try:
                        client, _ = await listener.accept()
                    except OSError as exc:  # out of descriptors: those who are here go on
                        log.warning("can't accept a client: %s", exc.strerror)
                        await trio.sleep(_ACCEPT_PAUSE)
                        continue
                    nursery.start_soon(service.serve, client)
    finally:
        service.close()
