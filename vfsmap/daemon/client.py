"""The client: from a path to a window, with the daemon where it can be, else by the page cache."""

import array
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from vfsmap.daemon.varlink import INTERFACE, Call, Reply, decode_reply, encode, error_of
from vfsmap.errors import (
    DaemonUnreachable,
    Denied,
    Invalid,
    NotFound,
    ProtocolError,
    Unsupported,
    VfsmapError,
)
from vfsmap.mapping.window import Window
from vfsmap.pmem import Commit, Medium, detect
from vfsmap.units import PTE, Extent, Level, align_down, align_up, format_size

SOCKET_XATTR: Final = "user.vfsmap.socket"
_DESCRIPTORS_MAX: Final = 8
_RECEIVE: Final = 1 << 20


class Client:
    """A connection to a mapping daemon; for one call at a time, from any thread."""

    def __init__(self, path: str | Path) -> None:
        """Connect.

        Raises:
            DaemonUnreachable: nobody listens there.
        """
        self.path = Path(path)
        self._lock = threading.Lock()
        self._socket = socket.socket(socket.AF_UNIX)
        self._rest = b""
        try:
            self._socket.connect(str(path))
        except OSError as exc:
            self._socket.close()
            raise DaemonUnreachable(
                f"no mapping daemon answers on {path}: {exc.strerror}; is the pool still mounted?"
            ) from exc

    def call(
        self, method: str, descriptors: tuple[int, ...] = (), **parameters: Any
    ) -> tuple[dict[str, Any], list[int]]:
        """Call a method; return its result and the descriptors, which are the caller's to close.

        Raises:
            VfsmapError: what the daemon answered.
            DaemonUnreachable: it has gone away.
        """
        with self._lock:
            self._send(Call(f"{INTERFACE}.{method}", parameters), descriptors)
            reply, received = self._receive()
        if reply.error:
            _close_all(received)
            raise error_of(reply)
        return reply.parameters, received

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield what happens, from now on; this connection is good for nothing else afterwards."""
        with self._lock:
            self._send(Call(f"{INTERFACE}.Events", more=True), ())
            while True:
                reply, _ = self._receive()
                if reply.error:
                    raise error_of(reply)
                yield reply.parameters["event"]

    def _send(self, call: Call, descriptors: tuple[int, ...]) -> None:
        ancillary = []
        if descriptors:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        data = memoryview(encode(call))
        try:
            sent = self._socket.sendmsg([data], ancillary)
            if sent < len(data):
                self._socket.sendall(data[sent:])
        except OSError as exc:
            raise self._gone() from exc

    def _receive(self) -> tuple[Reply, list[int]]:
        descriptors: list[int] = []
        room = socket.CMSG_SPACE(_DESCRIPTORS_MAX * 4)
        data = self._rest
        try:
            while b"\0" not in data:
                piece, ancillary, _, _ = self._socket.recvmsg(
                    _RECEIVE, room, socket.MSG_CMSG_CLOEXEC
                )
                for level, kind, raw in ancillary:
                    if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                        fds = array.array("i")
                        fds.frombytes(raw[: len(raw) - len(raw) % fds.itemsize])
                        descriptors += fds
                if not piece:
                    raise self._gone()
                data += piece
        except OSError as exc:
            raise self._gone() from exc
        raw_reply, _, self._rest = data.partition(b"\0")
        return decode_reply(raw_reply), descriptors

    def _gone(self) -> DaemonUnreachable:
        return DaemonUnreachable(f"the mapping daemon on {self.path} has gone away; mount again")

    def close(self) -> None:
        """Hang up; leases that are not released end when nobody maps their bytes any more."""
        self._socket.close()


class _Clients:
    """The connections of this process, one for each mount."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_device: dict[int, Client] = {}
        # a child must not talk on its parent's connections; their sockets go with its exec or exit
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._by_device = {}

    def get(self, path: str) -> Client | None:
        """Return the connection to the daemon of a file's mount, or None: there is none.

        Raises:
            DaemonUnreachable: there should be one, but it does not answer.
            OSError: there is no such file.
        """
        device = os.stat(path).st_dev  # the kernel knows it; no request is sent
        client = self._by_device.get(device)
        if client is None:
            address = socket_of(path)
            if address is None:
                return None
            client = Client(address)
            with self._lock:
                client = self._by_device.setdefault(device, client)
        return client

    def drop(self, client: Client) -> None:
        """Forget a connection that is broken."""
        with self._lock:
            for device, known in list(self._by_device.items()):
                if known is client:
                    del self._by_device[device]


_clients = _Clients()


def socket_of(path: str | Path) -> Path | None:
    """Return where the daemon of the mount that holds ``path`` listens, or None outside a mount."""
    try:
        return Path(os.fsdecode(os.getxattr(path, SOCKET_XATTR)))
    except OSError:
        return None


def connect(path: str | Path) -> Client:
    """Return a new connection to the daemon of the mount that holds ``path``.

    Raises:
        Invalid: no pool is mounted there.
        DaemonUnreachable: its daemon does not answer.
    """
    if not Path(path).exists():
        raise NotFound(f"{path} does not exist")
    address = socket_of(path)
    if address is None:
        raise Invalid(f"{path} is not on a mounted pool")
    return Client(address)


def map(  # noqa: A001  # vfsmap.map says what it does
    path: str | os.PathLike[str],
    *,
    writable: bool = False,
    offset: int = 0,
    length: int | None = None,
    level: Level | None = None,
    populate: bool = False,
    direct: bool | None = None,
    sealed: bool = False,
) -> Window:
    """Map a range of a file; the file's own pool bytes where that can be had.

    Args:
        path: a file; on a mounted pool its daemon is asked, elsewhere the page cache is mapped.
        writable: map for reading and writing.
        offset: where the range starts, bytes.
        length: bytes; None: up to the file's end.
        level: the smallest page-table entries to accept.
        populate: touch every page first.
        direct: True demands the pool itself, False the page cache; None takes what can be had.
        sealed: nobody can unmap, remap or unprotect the window before the process ends.

    Raises:
        Unsupported: ``level`` or ``direct`` can't be had; the message says why.
        NotFound, Denied, Invalid, Busy, NoSpace, Sealed: as the file system or the daemon says.
    """
    name = os.fspath(path)
    if sealed and writable:
        raise Invalid(
            "only a read window can be sealed: writable=True does not go with sealed=True"
        )
    fd, client = _open(name, writable=writable, wanted=direct)
    try:
        if client is not None:
            try:
                return _map_direct(
                    client, fd, writable=writable, offset=offset, length=length, level=level,
                    populate=populate, sealed=sealed,
                )  # fmt: skip
            except Denied as exc:
                if direct or level not in (None, PTE):
                    raise Unsupported(f"{name} can't be mapped directly: {exc}") from exc
        elif direct:
            raise Unsupported(f"{name} can't be mapped directly: it is not on a mounted pool")
        return _map_cached(
            fd, name, writable=writable, offset=offset, length=length, level=level,
            populate=populate, sealed=sealed,
        )  # fmt: skip
    finally:
        os.close(fd)


def _open(name: str, *, writable: bool, wanted: bool | None) -> tuple[int, Client | None]:
    """Open a file; uncached where a window will store into it behind the mount's cache."""
    flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC
    try:
        client = None if wanted is False else _clients.get(name)
        if client is not None and writable:
            flags |= os.O_DIRECT | os.O_DSYNC  # both together tell the mount not to cache
        return os.open(name, flags), client
    except OSError as exc:
        raise _refused(exc, name) from exc


def _map_direct(
    client: Client,
    fd: int,
    *,
    writable: bool,
    offset: int,
    length: int | None,
    level: Level | None,
    populate: bool,
    sealed: bool,
) -> Window:
    wanted: dict[str, Any] = {"file": 0, "offset": offset}
    if length is not None:
        wanted["length"] = length
    if writable:
        wanted["writable"] = True
    if level is not None:
        wanted["level"] = level.size
    try:
        answer, descriptors = client.call("Map", (fd,), **wanted)
    except DaemonUnreachable:
        _clients.drop(client)
        raise
    try:
        medium = answer["medium"]
        lease = answer["lease"]
        window = Window(
            descriptors[answer["pool"]],
            [Extent(**extent) for extent in answer["extents"]],
            answer["length"],
            Medium(medium["name"], Commit(medium["commit"]), medium["page_size"], medium["huge"]),
            offset=offset,
            writable=writable,
            populate=populate,
            sealed=sealed,
            direct=True,
            on_close=lambda: _release(client, lease),
            on_publish=lambda: _publish(client, lease),
        )
    except (KeyError, IndexError, TypeError, ValueError) as exc:
        raise ProtocolError(f"the daemon's answer makes no sense: {exc!r}") from exc
    finally:
        _close_all(descriptors)
    return window


def _release(client: Client, lease: int) -> None:
    try:
        client.call("Release", lease=lease)
    except VfsmapError:  # the daemon is gone, and its leases with it
        _clients.drop(client)


def _publish(client: Client, lease: int) -> None:
    client.call("Publish", lease=lease)


def _map_cached(
    fd: int,
    name: str,
    *,
    writable: bool,
    offset: int,
    length: int | None,
    level: Level | None,
    populate: bool,
    sealed: bool,
) -> Window:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise Invalid(f"{name} is not a regular file")
    length = max(status.st_size - offset, 0) if length is None else length
    if offset < 0 or length <= 0 or offset + length > status.st_size:
        raise Invalid(
            f"{name}: the range {offset}+{length} is not inside the file, "
            f"which has {status.st_size} bytes"
        )
    medium = detect(fd)
    if level is not None and level.size > medium.page_size:
        raise Unsupported(
            f"{name} can't be mapped by entries of {format_size(level.size)}: it is mapped through "
            f"the page cache, whose entries have {format_size(medium.page_size)}"
        )
    start = align_down(offset, medium.page_size)
    extent = Extent(start, start, align_up(offset + length, medium.page_size) - start)
    return Window(
        fd, [extent], length, medium, offset=offset, writable=writable, populate=populate,
        sealed=sealed, direct=False,
    )  # fmt: skip


def _refused(exc: OSError, name: str) -> VfsmapError:
    kinds: dict[type[OSError], Callable[[str], VfsmapError]] = {
        FileNotFoundError: NotFound,
        PermissionError: Denied,
    }
    return kinds.get(type(exc), Invalid)(f"{name}: {exc.strerror}")


def _close_all(descriptors: list[int]) -> None:
    for fd in descriptors:
        os.close(fd)
