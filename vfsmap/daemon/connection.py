"""One client of the daemon: messages with their descriptors in and out, and limits that hold."""

import array
import os
import queue
import socket
import struct
import threading
from typing import Final

import trio

from vfsmap.daemon.varlink import DESCRIPTORS_MAX, MESSAGE_MAX, Reply, encode
from vfsmap.errors import ProtocolError
from vfsmap.mapping.lease import Holder

_UCRED: Final = struct.Struct("3i")
_SO_PEERPIDFD: Final = 77  # include/uapi/asm-generic/socket.h, since Linux 6.5
_SO_PEERGROUPS: Final = 59
_GROUPS_MAX: Final = 1024
PATIENCE: Final = 10.0
"""Seconds that a client may take to finish a message, or to take a reply."""


class Closer:
    """Closes descriptors in a thread.

    A descriptor of our own mount must not be closed in the loop's thread: close() sends a request
    that this very loop has to answer.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def close(self, fd: int) -> None:
        """Close a descriptor soon."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="closer", daemon=True)
            self._thread.start()
        self._queue.put(fd)

    def _run(self) -> None:
        while True:
            os.close(self._queue.get())


class Message:
    """A received message and the descriptors that came with it."""

    def __init__(self, raw: bytes, descriptors: list[int], closer: Closer) -> None:
        self.raw = raw
        self._descriptors = descriptors
        self._closer = closer

    def descriptor(self, index: int) -> int:
        """Return a descriptor, which the message goes on owning.

        Raises:
            ProtocolError: there is none of that index.
        """
        if not 0 <= index < len(self._descriptors):
            raise ProtocolError(
                f"descriptor {index} is named, but the message came with {len(self._descriptors)}"
            )
        return self._descriptors[index]

    def close(self) -> None:
        """Close the descriptors."""
        for fd in self._descriptors:
            self._closer.close(fd)
        self._descriptors = []


class Connection:
    """A connected client."""

    def __init__(self, sock: trio.socket.SocketType, closer: Closer) -> None:
        self._socket = sock
        self._closer = closer
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        pid, uid, gid = _UCRED.unpack(raw)
        self.holder = Holder(pid, uid)
        self.groups = {gid, *self._supplementary_groups()}
        self._buffer = bytearray()
        self._send_lock = trio.Lock()
        self._pidfd: int | None = None

    def _supplementary_groups(self) -> list[int]:
        groups = array.array("I")
        try:
            raw = self._socket.getsockopt(
                socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_MAX * groups.itemsize
            )
        except OSError:  # more groups than that, or an old kernel: those are not trusted
            return []
        groups.frombytes(raw)
        return list(groups)

    def watch_process(self) -> None:
        """Take hold of the client's process, while it is surely there."""
        if self._pidfd is None:
            try:
                raw = self._socket.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4)
                self._pidfd = int.from_bytes(raw, "little")
            except OSError:  # a kernel before 6.5
                self._pidfd = os.pidfd_open(self.holder.pid)

    async def process_ended(self) -> None:
        """Return when the client's process is gone."""
        if self._pidfd is not None:
            pidfd, self._pidfd = self._pidfd, None
            try:
                await trio.lowlevel.wait_readable(pidfd)
            finally:
                os.close(pidfd)

    async def receive(self) -> Message | None:
        """Return the next message, or None when the client has hung up.

        Raises:
            ProtocolError: the message is too large, too slow, or brings too many descriptors.
        """
        descriptors: list[int] = []
        try:
            with trio.CancelScope() as scope:
                while True:
                    # a read never crosses the end of a message, so that what comes with it is its
                    peeked = await self._socket.recv(MESSAGE_MAX, socket.MSG_PEEK)
                    end = peeked.find(b"\0") + 1
                    await self._read(end or len(peeked), descriptors)
                    if end or not peeked:
                        break
                    if len(self._buffer) >= MESSAGE_MAX:
                        raise ProtocolError(f"a message of more than {MESSAGE_MAX} bytes")
                    scope.deadline = min(scope.deadline, trio.current_time() + PATIENCE)
            if scope.cancelled_caught:
                raise ProtocolError(f"a message took longer than {PATIENCE:.0f} seconds")
        except BaseException:
            Message(b"", descriptors, self._closer).close()
            raise
        raw = bytes(self._buffer)
        self._buffer.clear()
        if not raw.endswith(b"\0"):
            Message(b"", descriptors, self._closer).close()
            return None
        return Message(raw[:-1], descriptors, self._closer)

    async def _read(self, length: int, descriptors: list[int]) -> None:
        room = socket.CMSG_SPACE(DESCRIPTORS_MAX * 4)
        data, ancillary, flags, _ = await self._socket.recvmsg(
            max(length, 1), room, socket.MSG_CMSG_CLOEXEC
        )
        self._buffer += data
        for level, kind, raw in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(raw[: len(raw) - len(raw) % fds.itemsize])
                descriptors += fds
        if flags & socket.MSG_CTRUNC or len(descriptors) > DESCRIPTORS_MAX:
            raise ProtocolError(f"a message with more than {DESCRIPTORS_MAX} descriptors")

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
        async with self._send_lock:
            with trio.move_on_after(PATIENCE) as scope:
                sent = await self._socket.sendmsg([data], ancillary)
                while sent < len(data):
                    sent += await self._socket.send(data[sent:])
        if scope.cancelled_caught:
            raise ProtocolError(f"a reply was not taken within {PATIENCE:.0f} seconds")

    async def wait_hangup(self) -> None:
        """Return when the client has hung up, or says something out of turn."""
        await self._socket.recv(1, socket.MSG_PEEK)

    def close(self) -> None:
        """Hang up."""
        self._socket.close()
