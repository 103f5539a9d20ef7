"""The client's side of the wire: blocking calls with descriptors, from any thread.

Windows are closed wherever the garbage collector pleases, so also in the middle of a call of the
same thread; a lease is therefore given back at once where that is possible, and else by whoever is
using the connection at that moment.
"""

import array
import os
import socket
import struct
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import msgspec

from vfsmap.daemon.ticket import Ticket
from vfsmap.daemon.varlink import (
    INTERFACE,
    KERNEL_DESCRIPTORS_MAX,
    REPLY_MAX,
    Call,
    Framer,
    Message,
    RawReply,
    decode,
    encode,
    encode_parameters,
    error_of,
)
from vfsmap.errors import DaemonUnreachable, Invalid, NotFound, ProtocolError, VfsmapError
from vfsmap.pmem import Commit, Medium, libc
from vfsmap.pmem.mountinfo import mount_of

SEAL_XATTR: Final = "user.vfsmap.seal"
SOCKET_XATTR: Final = "user.vfsmap.socket"
_RECEIVE: Final = 1 << 16  # for what is larger than 128 KiB malloc(3) asks the kernel each time
_FILESYSTEM_TYPE: Final = "fuse.vfsmap"
_FOLLOWED_TYPE: Final = "fuse.vfsmap-follow"
_ROOM: Final = socket.CMSG_SPACE(KERNEL_DESCRIPTORS_MAX * 4)
# plain numbers: arithmetic with the enumerations of the socket module takes longer than a call
_CLOEXEC: Final = int(socket.MSG_CMSG_CLOEXEC)
_NOSIGNAL: Final = int(socket.MSG_NOSIGNAL)
_LOOK: Final = int(socket.MSG_PEEK) | int(socket.MSG_DONTWAIT)
_UCRED: Final = struct.Struct("3i")


class HeldTicket(NamedTuple):
    """A ticket, and what is needed to map what it brings."""

    ticket: Ticket
    medium: Medium
    pool: str
    """The path of the pool; opened for each window, so that nothing is kept open between."""
    file: tuple[int, int]
    """Device and inode of the pool, as it came from the daemon."""

    def open(self) -> int | None:
        """Return a descriptor of the pool, which is the caller's to close; None: it can't be had.

        A group's member may not open the pool; in another mount namespace, and when the pool was
        renamed, something else or nothing has its path.
        """
        try:
            fd = os.open(self.pool, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as exc:
            if exc.errno is None:  # a signal's handler raised it
                raise
            return None
        if file_of(fd) == self.file:
            return fd
        os.close(fd)
        return None


def file_of(fd: int) -> tuple[int, int]:
    """Return device and inode of an open file."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


class Client:
    """A connection to a mapping daemon."""

    def __init__(self, path: str | Path) -> None:
        """Connect.

        Raises:
            DaemonUnreachable: nobody listens there.
        """
        self.path = Path(path)
        self._lock = threading.Lock()
        self._releases: deque[dict[str, Any]] = deque()
        self.ticket: HeldTicket | None = None
        """What further read leases are asked for with."""
        self._takes_tickets = True
        self._answered = False
        self._framer = Framer(REPLY_MAX, KERNEL_DESCRIPTORS_MAX)
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.connect(str(path))
        except OSError as exc:
            self._socket.close()
            raise DaemonUnreachable(
                f"no mapping daemon answers on {path}: {exc.strerror}; is the pool still mounted?"
            ) from exc
        _all_clients.add(self)

    def may_ask_for_ticket(self) -> bool:
        """Tell whether a ticket is missing that could be used.

        With a ticket the daemon names a path that is opened here, so it must be nobody else's.
        """
        return self.ticket is None and self._takes_tickets and self.server_uid in (0, os.geteuid())

    def give_ticket_up(self) -> None:
        """Do without tickets from now on: the pool can't be opened from here."""
        self.ticket, self._takes_tickets = None, False

    @property
    def server_uid(self) -> int:
        """The user that the daemon runs as."""
        raw = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        uid: int = _UCRED.unpack(raw)[1]
        return uid

    def call(
        self, method: str, descriptors: tuple[int, ...] = (), **parameters: Any
    ) -> tuple[dict[str, Any], list[int]]:
        """Call a method; return its result and the descriptors, which are the caller's to close.

        Raises:
            VfsmapError: what the daemon answered.
            DaemonUnreachable: it has gone away.
            ProtocolError: what it answered makes no sense.
        """
        with self._lock:
            reply, received = self._exchange(method, descriptors, parameters)
        self._release_pending()
        try:
            result = msgspec.json.decode(reply.parameters)
            if reply.error:
                raise error_of(reply.error, result)
        except BaseException:
            close_all(received)
            raise
        return result, received

    def release(self, lease: int, *, alone: bool = False) -> None:
        """Give a lease back, now or when the call that is under way has ended; never fails.

        ``alone`` tells that nobody else has come to map the bytes through this process.
        """
        self._releases.append({"lease": lease, "alone": alone})
        self._release_pending()

    def drop(self, lease: int, *, alone: bool = False) -> None:
        """Give a lease back without waiting for the daemon, in a finalizer; never fails."""
        parameters = {"lease": lease, "alone": alone}
        if self._lock.acquire(blocking=False):
            try:
                call = Call(f"{INTERFACE}.Release", encode_parameters(parameters), oneway=True)
                data = encode(call)
                sent = libc.send_held(self._socket.fileno(), data)
                if sent == len(data):
                    return
                if sent:  # half a message: no other can follow
                    self.close()
            finally:
                self._lock.release()
        self._releases.append(parameters)  # for whoever calls next

    def _release_pending(self) -> None:
        # whoever adds a lease while the lock is taken leaves it to its owner, who looks afterwards
        while self._releases and self._lock.acquire(blocking=False):
            try:
                _, received = self._exchange("Release", (), self._releases.popleft())
                close_all(received)
            except (VfsmapError, IndexError):  # the daemon is gone, and its leases with it
                self._releases.clear()
            finally:
                self._lock.release()

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield what happens, from now on; this connection is good for nothing else afterwards.

        Raises:
            VfsmapError: what the daemon answered.
            DaemonUnreachable: it has gone away.
        """
        with self._lock:
            self._send(Call(f"{INTERFACE}.Events", more=True), ())
            while True:
                message = self._receive()
                close_all(message.descriptors)
                reply = decode(message.raw, RawReply)
                parameters = msgspec.json.decode(reply.parameters)
                if reply.error:
                    raise error_of(reply.error, parameters)
                yield parameters["event"]

    def leases(self) -> Iterator[dict[str, Any]]:
        """Yield all leases, the oldest first, as the interface declares them.

        Raises:
            As :meth:`call`.
        """
        last = 0
        while leases := self.call("Leases", after=last)[0]["leases"]:
            yield from leases
            last = leases[-1]["lease"]

    def is_alive(self) -> bool:
        """Tell whether the daemon has kept this connection, and so the leases on it."""
        try:
            return bool(self._socket.recv(1, _LOOK))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def _exchange(
        self, method: str, descriptors: tuple[int, ...], parameters: dict[str, Any]
    ) -> tuple[RawReply, list[int]]:
        call = Call(f"{INTERFACE}.{method}", encode_parameters(parameters))
        try:
            self._send(call, descriptors)
            message = self._receive()
        except BaseException:
            self.close()  # a reply that nobody waits for must not answer the next call
            raise
        try:
            return decode(message.raw, RawReply), message.descriptors
        except ProtocolError:
            close_all(message.descriptors)
            raise

    def _send(self, call: Call, descriptors: tuple[int, ...]) -> None:
        ancillary = []
        if descriptors:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        data = memoryview(encode(call))
        try:
            sent = self._socket.sendmsg([data], ancillary, _NOSIGNAL)
            if sent < len(data):
                self._socket.sendall(data[sent:])
        except OSError as exc:
            raise self._gone() from exc

    def _receive(self) -> Message:
        while (message := self._framer.next()) is None:
            try:
                data, ancillary, _, _ = self._socket.recvmsg(_RECEIVE, _ROOM, _CLOEXEC)
            except OSError as exc:
                raise self._gone() from exc
            found = array.array("i")
            for level, kind, raw in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    found.frombytes(raw[: len(raw) - len(raw) % found.itemsize])
            self._framer.feed(data, found)
            if not data:
                raise self._gone()
        self._answered = True
        return message

    def _gone(self) -> DaemonUnreachable:
        if self._answered:
            what = "has gone away; mount again"
        else:  # so a daemon ends connections, too, that it has no room for
            what = "hung up without a word: it ends, or has all the connections it takes; try again"
        return DaemonUnreachable(f"the mapping daemon on {self.path} {what}")

    def close(self) -> None:
        """Hang up; leases that are not released end when nobody maps their bytes any more."""
        self._socket.close()
        close_all(self._framer.abandon())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # at the interpreter's end the module's functions are gone before a sealed window's client
        if hasattr(self, "_socket") and close_all is not None:
            self.close()

    def forget_parent(self) -> None:
        """Let go, in a forked child: the connection and its leases are the parent's."""
        self._lock = threading.Lock()
        self._releases.clear()
        self.close()


class Clients:
    """The connections of this process, one for each mount."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_device: dict[int, Client] = {}
        self._distrust: dict[int, tuple[Path, int, str]] = {}
        self.forks = 0
        """How often this process has forked: a child may have inherited what was mapped before."""

    def forget(self) -> None:
        """Start anew, in a forked child."""
        self._lock = threading.Lock()
        self._by_device = {}
        self._distrust = {}  # it may become another user

    def get(self, path: str, device: int) -> Client | str | None:
        """Return the connection to the daemon of a file's mount, or None: there is none.

        Or why it does not trust this process, as it has said.

        Raises:
            DaemonUnreachable: there should be one, but it does not answer.
        """
        if (known := self._distrust.get(device)) is not None:
            socket_path, made, reason = known
            if _made_ns(socket_path) == made:
                return reason
            self._distrust.pop(device, None)  # another daemon may trust it
        client = self._by_device.get(device)
        if client is None:
            client = _find(path, device)
            if client is not None:
                with self._lock:
                    client = self._by_device.setdefault(device, client)  # else: another thread's
        return client

    def distrust(self, client: Client, device: int, reason: str) -> None:
        """Remember that a daemon does not trust this process, and hang up: others need the place.

        It is asked again when it has made its socket anew.
        """
        self._distrust[device] = client.path, _made_ns(client.path), reason
        self.drop(client)

    def drop(self, client: Client) -> None:
        """Forget a connection that is broken."""
        client.close()
        with self._lock:
            for device, known in list(self._by_device.items()):
                if known is client:
                    del self._by_device[device]


_all_clients: "weakref.WeakSet[Client]" = weakref.WeakSet()
clients: Final = Clients()


def _made_ns(path: Path) -> int:
    try:
        return path.stat().st_ctime_ns
    except OSError:
        return 0


def _before_fork() -> None:
    clients.forks += 1


def _in_child() -> None:
    for client in list(_all_clients):
        client.forget_parent()
    clients.forget()


os.register_at_fork(before=_before_fork, after_in_child=_in_child)


def socket_of(path: str | Path) -> Path | None:
    """Return where the daemon of the mount that holds ``path`` listens, or None outside a mount."""
    try:
        return Path(os.fsdecode(os.getxattr(path, SOCKET_XATTR)))
    except OSError:
        return None


def connect(path: str | Path) -> Client:
    """Return a new connection to the daemon of the mount that holds ``path``.

    Raises:
        NotFound: there is no such file.
        Invalid: no pool is mounted there.
        DaemonUnreachable: its daemon does not answer.
    """
    try:
        device = os.stat(path).st_dev
    except OSError as exc:
        raise NotFound(f"{path}: {exc.strerror}") from exc
    client = _find(path, device)
    if client is None:
        raise Invalid(f"{path} has no mapping daemon: {why_no_daemon(device)}")
    return client


def _find(path: str | Path, device: int) -> Client | None:
    """Connect to the daemon of a file's mount.

    The attribute that names its socket could be anybody's on another file system, and so could be
    the socket: it is believed on a mounted pool only, and of the user that mounted it or of root.
    """
    mounter = mounter_of(device)
    address = socket_of(path) if mounter is not None else None
    if address is None:
        return None
    client = Client(address)
    if client.server_uid not in (0, mounter, os.geteuid()):
        client.close()
        raise DaemonUnreachable(
            f"{address} belongs to user {client.server_uid}, but the pool was mounted by user "
            f"{mounter}; mount it again"
        )
    return client


def mounter_of(device: int) -> int | None:
    """Return the user that mounted the pool with this device number, or None: it is no pool."""
    mount = mount_of(device)
    if mount is None or mount.kind != _FILESYSTEM_TYPE:
        return None
    users = [o.removeprefix("user_id=") for o in mount.options.split(",") if "user_id=" in o]
    return int(users[0]) if users else 0


def why_no_daemon(device: int) -> str:
    """Return why no mapping daemon is asked about files of this device number."""
    mount = mount_of(device)
    if mount is not None and mount.kind == _FOLLOWED_TYPE:
        return "the mount follows another process, which alone can map: use that one's mount"
    return "it is not on a mounted pool"


def medium_of(medium: dict[str, Any]) -> Medium:
    """Return the medium that a daemon has described.

    Raises:
        ProtocolError: the description makes no sense.
    """
    try:
        commit = Commit(medium["commit"])
        return Medium(medium["name"], commit, medium["page_size"], medium["huge"])
    except (KeyError, ValueError) as exc:
        raise ProtocolError(f"the daemon's medium makes no sense: {medium}") from exc


def close_all(descriptors: list[int]) -> None:
    """Close received descriptors."""
    for fd in descriptors:
        os.close(fd)
