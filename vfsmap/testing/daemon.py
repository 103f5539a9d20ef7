"""A mapping daemon in a thread of the test's own process, over a real pool and without a mount."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import trio

from vfsmap.daemon.client import Client
from vfsmap.daemon.connection import DEFAULT_LIMITS, Limits
from vfsmap.daemon.service import serve_mapping
from vfsmap.fs import ROOT, FileSystem
from vfsmap.pmem import libc

T = TypeVar("T")


class Daemon:
    """A running daemon."""

    def __init__(self, fs: FileSystem, socket: Path) -> None:
        self.fs = fs
        self.socket = socket
        self.synced = 0
        """How often the daemon has asked for everything to be made durable."""
        self._token: trio.lowlevel.TrioToken | None = None

    def run(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function in the loop's thread, to which the file system belongs."""
        assert self._token is not None
        return trio.from_thread.run_sync(function, *args, trio_token=self._token)

    def client(self) -> Client:
        """Return a new connection."""
        return Client(self.socket)

    async def _sync(self) -> None:
        self.synced += 1
        self.fs.pool.sync()

    async def _serve(
        self, started: threading.Event, stop: trio.Event, options: dict[str, Any]
    ) -> None:
        self._token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as nursery:

            async def serve(task_status: trio.TaskStatus[None]) -> None:
                await serve_mapping(
                    self.fs,
                    socket_path=self.socket,
                    sync=self._sync,
                    task_status=task_status,
                    **options,
                )

            await nursery.start(serve)
            started.set()
            await stop.wait()
            nursery.cancel_scope.cancel()


@contextmanager
def daemon(
    fs: FileSystem,
    socket: Path,
    *,
    seal: Any = None,
    group: str | None = None,
    mount_device: int | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Iterator[Daemon]:
    """Serve a file system for as long as the block lasts; it belongs to the daemon meanwhile."""
    made = Daemon(fs, socket)
    started, stop = threading.Event(), trio.Event()
    options = {"seal": seal, "group": group, "mount_device": mount_device, "limits": limits}
    failure: list[BaseException] = []

    def run() -> None:
        try:
            trio.run(made._serve, started, stop, options)
        except BaseException as exc:
            failure.append(exc)
            started.set()

    thread = threading.Thread(target=run, name="daemon")
    thread.start()
    started.wait()
    if not failure:
        try:
            yield made
        finally:
            made.run(stop.set)
            thread.join()
    for exc in failure:
        while isinstance(exc, BaseExceptionGroup):
            exc = exc.exceptions[0]
        raise exc


class FakeMount:
    """Ordinary files that stand for those of a pool: what statx(2) says of them is replaced."""

    DEVICE = 0x7777

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._inodes: dict[tuple[int, int], int] = {}
        self._statx = libc.statx_nosync

    def show(self, name: str, ino: int) -> Path:
        """Make a file that stands for the inode of a pool."""
        path = self.directory / name
        path.touch()
        status = path.stat()
        self._inodes[status.st_dev, status.st_ino] = ino
        return path

    def statx_nosync(self, fd: int) -> libc.Stat:
        """Stand in for the real one."""
        real = self._statx(fd)
        ino = self._inodes.get((real.dev, real.ino))
        return real if ino is None else real._replace(dev=self.DEVICE, ino=ino)


def close_all(descriptors: list[int]) -> None:
    """Close what a call has returned."""
    for fd in descriptors:
        os.close(fd)


class Listener:
    """Events, one after the other."""

    def __init__(self, client: Client) -> None:
        self._events = client.events()
        assert next(self._events)["kind"] == "ready"

    def next(self, kind: str) -> dict[str, Any]:
        """Return the next event, which must be of a kind."""
        event = next(self._events)
        assert event["kind"] == kind, event
        return event


def map_it(client: Client, descriptors: tuple[int, ...] = (), **wanted: Any) -> dict[str, Any]:
    """Call Map and close the pool's descriptor."""
    answer, received = client.call("Map", descriptors, **wanted)
    close_all(received)
    return answer


def make(fs: FileSystem, name: bytes, data: bytes = b"") -> int:
    """Make a file in the root directory; return its inode number."""
    ino = fs.create(ROOT, name, 0o644, 0, 0).ino
    fs.write(ino, 0, data)
    return ino


def pattern(size: int) -> bytes:
    """Return bytes that tell where they are: words that count up."""
    return b"".join(n.to_bytes(8, "little") for n in range(size // 8))
