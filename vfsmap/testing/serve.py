"""A mount for tests: a server of its own, which does what a test asks of its file system.

The server is a process of its own, since a test that faults a page of the mount in, holding the
interpreter's lock, could not be answered by its own process.  Lines of JSON on its standard input
ask for calls of the :class:`FileSystem`: ``["pin", [5, 0, 4096], {"writable": true}]``; a line
with the result comes back.  Three names are no methods: ``sabotage`` has a method fail on a bug
from then on, ``failed`` tells why the pool turned read-only, ``invalidate`` does what a door does
that has changed a file behind the mount's back.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, NoReturn

import trio

from vfsmap.errors import VfsmapError
from vfsmap.fs import FileSystem
from vfsmap.pool import Pool
from vfsmap_fuse.mount import MountOptions, mounted
from vfsmap_tools.committer import Committer
from vfsmap_tools.sealer import seal_file

_PATIENCE = 20


class Server:
    """A mounted pool and the process that serves it."""

    def __init__(self, process: subprocess.Popen[str], pool: Path, mountpoint: Path) -> None:
        self.process = process
        self.pool = pool
        self.mountpoint = mountpoint

    def call(self, name: str, *args: object, **kwargs: object) -> Any:
        """Call a method of the server's file system and return what JSON can carry of the result.

        Raises:
            RuntimeError: the call failed; the text is the error's class and message.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([name, args, kwargs]) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]

    def kill(self) -> None:
        """Kill the server as a crash would."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """Ask the server to end, and return its exit status."""
        self.process.terminate()
        return self.process.wait(_PATIENCE)


@contextmanager
def served(
    pool: Path, mountpoint: Path, options: str = "", *, user: int = 0, log: IO[str] | None = None
) -> Iterator[Server]:
    """Serve a pool on a mount point for as long as the block lasts.

    Args:
        pool: a formatted pool.
        mountpoint: a directory.
        options: mount options, comma separated.
        user: who the server runs as.
        log: where its messages go; into the test's own otherwise, where nobody expects any.

    Raises:
        RuntimeError: there is no mount.
    """
    arguments = [str(pool), str(mountpoint), options, str(user)]
    command = [sys.executable, "-m", "vfsmap.testing.serve", *arguments]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    ) as process:
        server = Server(process, pool, mountpoint)
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise RuntimeError(f"{' '.join(command)} ended with {process.wait(_PATIENCE)}")
            yield server
        finally:
            if process.poll() is None:
                server.stop()


async def _serve(path: Path, mountpoint: Path, options: MountOptions) -> None:
    pool = Pool.open(path, "r" if options.read_only else "w")
    committer = Committer(pool)
    with FileSystem(pool) as fs:
        if pool.writable:
            fs.end_orphans()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(committer.run)
            nursery.start_soon(_stop_on_signal, nursery.cancel_scope)
            async with mounted(
                fs,
                mountpoint,
                options,
                sync=committer.sync,
                seal=partial(seal_file, fs, committer.sync),
                socket=Path("/run/vfsmap/test.socket"),
            ) as mount:
                nursery.start_soon(_obey, fs)
                print("ready", flush=True)
                await mount.wait_unmounted()
            nursery.cancel_scope.cancel()


async def _stop_on_signal(scope: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async for _ in signals:
            scope.cancel()


async def _obey(fs: FileSystem) -> None:
    lines = trio.lowlevel.FdStream(os.dup(0))
    buffer = b""
    async for piece in lines:
        buffer += piece
        *whole, buffer = buffer.split(b"\n")
        for line in whole:
            name, args, kwargs = json.loads(line)
            print(json.dumps(await _answer(fs, name, args, kwargs)), flush=True)


async def _answer(
    fs: FileSystem, name: str, args: list[Any], kwargs: dict[str, Any]
) -> dict[str, Any]:
    try:
        if name == "sabotage":
            setattr(fs, args[0], _fail_on_a_bug)
            return {"result": None}
        if name == "failed":
            return {"result": fs.pool.failed and str(fs.pool.failed)}
        if name == "invalidate":
            for invalidate in fs.invalidators:
                await trio.to_thread.run_sync(invalidate, args[0])
            return {"result": None}
        result = getattr(fs, name)(*args, **kwargs)
    except VfsmapError as exc:
        return {"error": f"{type(exc).__name__}: {exc}"}
    return {"result": _plain(result)}


def _plain(result: Any) -> Any:
    if isinstance(result, bytes | memoryview):
        return bytes(result).decode("latin-1")
    if hasattr(result, "__slots__") and not isinstance(result, tuple):
        return {name: _plain(getattr(result, name)) for name in result.__slots__}
    if isinstance(result, dict):
        return len(result)
    return result


def _fail_on_a_bug(*_: object, **__: object) -> NoReturn:
    raise ZeroDivisionError("sabotaged by a test")


def main() -> None:
    """Serve until told to stop."""
    path, mountpoint, options, user = sys.argv[1:]
    if int(user):  # not earlier: somebody else may not even read the interpreter
        os.setgroups([])
        os.setresgid(int(user), int(user), int(user))
        os.setresuid(int(user), int(user), int(user))
    words = [word for word in options.split(",") if word]
    trio.run(_serve, Path(path), Path(mountpoint), MountOptions.parse(words))


if __name__ == "__main__":
    main()
