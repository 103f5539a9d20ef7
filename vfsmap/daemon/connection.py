"""One client of the daemon: who it is, messages in and replies out, and limits that hold."""

import array
import math
import os
import select
import socket
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import trio

from vfsmap.daemon.closer import Closer
from vfsmap.daemon.varlink import (
    CALL_MAX,
    DESCRIPTORS_MAX,
    KERNEL_DESCRIPTORS_MAX,
    Framer,
    Message,
    Reply,
    encode,
)
from vfsmap.errors import Denied, ProtocolError
from vfsmap.mapping.lease import LEASES_MAX, Holder

_Ready = Callable[[socket.socket], Awaitable[None]]
_UCRED: Final = struct.Struct("3i")
_SO_PEERGROUPS: Final = 59  # include/uapi/asm-generic/socket.h
_SO_PEERPIDFD: Final = 77  # the same, since Linux 6.5
# plain numbers: arithmetic with the enumerations of the socket module takes longer than a call
_CLOEXEC: Final = int(socket.MSG_CMSG_CLOEXEC)
_TRUNCATED: Final = int(socket.MSG_CTRUNC)
_NOSIGNAL: Final = int(socket.MSG_NOSIGNAL)
_GROUPS_MAX: Final = 256  # Python's getsockopt() returns at most 1024 bytes
# room for all that can come at once: what found no room would be closed by the kernel, here and now
_ROOM: Final = socket.CMSG_SPACE(KERNEL_DESCRIPTORS_MAX * 4)


@dataclass(frozen=True)
class Limits:
    """What a client may take of the daemon."""

    call_max: int = CALL_MAX
    """Bytes of a call."""
    descriptors_max: int = DESCRIPTORS_MAX
    """Descriptors of a call."""
    patience: float = 10.0
    """Seconds for a call to arrive whole once it has begun, and for a reply to be taken."""
    connections_max: int = 512
    """Connections of all users; those who are not trusted share half of them."""
    stranger_connections_max: int = 32
    """Connections of one user who is not trusted."""
    leases_max: int = LEASES_MAX
    """Leases of one connection."""
    events_max: int = 1000
    """Events that wait for a client that does not read them; the oldest are dropped."""
    penalty: float = 1.0
    """Seconds before a client that is not trusted, and has broken a rule, is hung up on."""
    leisure: float = 0.02
    """Seconds between two calls of a client that is not trusted, and until it is hung up on."""


DEFAULT_LIMITS: Final = Limits()


class Connection:
    """A connected client, for one task at a time (one more may wait for it to hang up)."""

    def __init__(self, sock: socket.socket, closer: Closer, limits: Limits) -> None:
        """Take a connected socket over."""
        sock.setblocking(False)
        self._socket = sock
        self._closer = closer
        self._limits = limits
        self._framer = Framer(limits.call_max, limits.descriptors_max)
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        pid, uid, self.gid = _UCRED.unpack(raw)
        self.holder = Holder(pid, uid)
        self._pidfd = -1
        self.trusted = False
        """Whether it may have the pool's descriptor; set by whoever decides."""

    @property
    def closed(self) -> bool:
        """Tell whether we have hung up."""
        return self._socket.fileno() < 0

    def groups(self) -> set[int]:
        """Return the groups that the client was in when it connected."""
        groups = array.array("I")
        try:
            raw = self._socket.getsockopt(
                socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_MAX * groups.itemsize
            )
        except OSError:  # more groups than that, or a kernel before 4.13
            return {self.gid}
        groups.frombytes(raw)
        return {self.gid, *groups}

    def watch_process(self) -> None:
        """Take hold of the client's process, while it is surely there.

        Raises:
            Denied: it can't be watched, so nobody would know when it has ended.
        """
        if self._pidfd >= 0:
            return
        try:
            raw = self._socket.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4)
            self._pidfd = int.from_bytes(raw, "little")
        except OSError:  # a kernel before 6.5, or the process is gone
            try:
                self._pidfd = os.pidfd_open(self.holder.pid)
            except OSError as exc:
                raise Denied(
                    f"process {self.holder.pid} can't be watched ({exc.strerror}), so it gets no "
                    f"lease; connect from the process that maps"
                ) from exc

    def process_has_ended(self) -> bool:
        """Tell whether the client's process is gone, if it is watched."""
        if self._pidfd < 0:
            return False
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(0))

    async def receive(self) -> Message | None:
        """Return the next message, or None when the client has hung up.

        Raises:
            ProtocolError: the message is too large, too slow, or brings too many descriptors.
        """
        message = self._framer.next()
        if message is not None:
            await trio.lowlevel.checkpoint()  # a client that sends many at once takes its turns
            return message
        deadline = math.inf
        while message is None:
            if self.closed:
                return None
            if deadline == math.inf and self._framer.has_part:
                deadline = trio.current_time() + self._limits.patience
            await self._wait(trio.lowlevel.wait_readable, deadline, "a call did not arrive whole")
            if not self._read():
                return None
            message = self._framer.next()
        return message

    def _read(self) -> bool:
        """Read once; False: the client has hung up."""
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(self._limits.call_max, _ROOM, _CLOEXEC)
        except BlockingIOError:
            return True
        except ConnectionError:
            return False
        self._framer.feed(data, descriptors_in(ancillary) if ancillary else ())
        if flags & _TRUNCATED:
            raise ProtocolError("descriptors that this process has no room for")
        return bool(data)

    async def _wait(self, ready: _Ready, deadline: float, what: str) -> None:
        if deadline == math.inf:
            await ready(self._socket)
            return
        with trio.CancelScope(deadline=deadline) as scope:
            await ready(self._socket)
        if scope.cancelled_caught:
            raise ProtocolError(f"{what} within {self._limits.patience:g} seconds")

    async def send(self, reply: Reply, descriptors: tuple[int, ...] = ()) -> None:
        """Send a reply; the descriptors stay the caller's.

        Raises:
            ProtocolError: the client does not take it in time.
            OSError: it has hung up.
        """
        data = memoryview(encode(reply))
        ancillary = []
        if descriptors:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        deadline = math.inf
        while data:
            try:
                sent = self._socket.sendmsg([data], ancillary, _NOSIGNAL)
            except BlockingIOError:
                sent = 0
            if sent:
                ancillary = []
                data = data[sent:]
            if data:
                if deadline == math.inf:
                    deadline = trio.current_time() + self._limits.patience
                await self._wait(trio.lowlevel.wait_writable, deadline, "a reply was not taken")

    async def wait_hangup(self) -> None:
        """Return when the client has hung up, or says something out of turn."""
        if self._framer.is_empty:
            await trio.lowlevel.wait_readable(self._socket)

    def abandon(self) -> None:
        """Have what came and was not taken closed."""
        self._closer.close(self.holder.uid, self._framer.abandon())

    def close(self) -> None:
        """Hang up; what came and was not taken is closed."""
        if self.closed:
            return
        trio.lowlevel.notify_closing(self._socket)
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        # descriptors may wait in the socket, unread: they are closed with it
        self._closer.close(self.holder.uid, [*self._framer.abandon(), self._socket.detach()])
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def descriptors_in(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    """Return the descriptors among what recvmsg(2) returned beside the data."""
    found = array.array("i")
    for level, kind, raw in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(raw[: len(raw) - len(raw) % found.itemsize])
    return found.tolist()
