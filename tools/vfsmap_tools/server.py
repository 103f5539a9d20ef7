"""The composition root: opens a pool once and runs both doors over it in one nursery."""

import logging
import os
import signal
import socket as sockets
import stat
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NoReturn, TypeVarTuple

import trio

from vfsmap.daemon.service import serve_mapping
from vfsmap.daemon.stats import Statistics
from vfsmap.errors import Invalid, MediumError, NoMemory, PoolDamaged
from vfsmap.fs import FileSystem
from vfsmap.pmem.buserror import bus_errors_told, require_whole
from vfsmap.pmem.procmaps import mapped_ranges
from vfsmap.pool import Pool
from vfsmap_fuse.mount import MountOptions, mounted
from vfsmap_tools.committer import Committer
from vfsmap_tools.manager import notify, watched
from vfsmap_tools.sealer import seal_file

log = logging.getLogger("vfsmap")
_TRIM_INTERVAL = 1.0
_WATCH_INTERVAL = 1.0
Ts = TypeVarTuple("Ts")


@dataclass
class ServerOptions:
    """What a server is asked for."""

    socket: Path | None = None
    """Where the mapping daemon listens; None: beside other servers' sockets, by the pool's uuid."""
    listener: sockets.socket | None = None
    """A socket that listens already, and stays when we end."""
    group: str | None = None
    """A group whose members are trusted with direct mappings."""
    promise: str | None = None
    metrics: str | None = None
    """Where Prometheus is answered; None: nowhere."""
    read_only: bool = False
    mount: MountOptions = field(default_factory=MountOptions)


def default_socket(pool: Pool) -> Path:
    """Return where a pool's daemon listens: under /run for root, else in the user's own place.

    Raises:
        Invalid: somebody else has taken that place.
    """
    user = os.geteuid()
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if user == 0:
        base = Path("/run/vfsmap")
    else:
        base = Path(runtime) / "vfsmap" if runtime else Path(f"/tmp/vfsmap-{user}")
    base.mkdir(mode=0o700 if user else 0o755, exist_ok=True)
    status = base.lstat()
    if status.st_uid != user or not stat.S_ISDIR(status.st_mode):
        raise Invalid(f"{base} belongs to somebody else; name a socket with --socket")
    return base / f"{pool.uuid}.socket"


def run_server(
    path: Path, mountpoint: Path | None, options: ServerOptions, ready: Callable[[], None]
) -> None:
    """Serve a pool until SIGTERM, SIGINT or its unmounting; ``ready`` is called when it answers.

    Raises:
        VfsmapError: the pool can't be opened, or the mount or the socket can't be made.
    """
    run_until_done(_serve, path, mountpoint, options, ready)


def run_until_done(serve: Callable[[*Ts], Awaitable[None]], *arguments: *Ts) -> None:
    """Run a server's loop until it ends, or raise what ended it."""
    try:
        trio.run(_watched, serve, arguments)
    except BaseExceptionGroup as group:
        # one thing went wrong, and the rest was cancelled for it
        error = _first(group)
        if isinstance(error, MemoryError):  # where a request is taken or answered, nothing helps
            error = NoMemory("there is no memory left to serve with; the server has ended")
        raise error from group


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def answering_prometheus(
    options: ServerOptions, pool: Pool, statistics: Statistics
) -> AbstractAsyncContextManager[object]:
    """Return what answers Prometheus for as long as a block lasts, if that was asked for."""
    if options.metrics is None:
        return nullcontext()
    from vfsmap_tools.metrics import exporting  # needs a package that not all have

    return exporting(options.metrics, pool, statistics)


async def _watched(serve: Callable[[*Ts], Awaitable[None]], arguments: tuple[*Ts]) -> None:
    async with watched():
        await serve(*arguments)


async def _serve(
    path: Path, mountpoint: Path | None, options: ServerOptions, ready: Callable[[], None]
) -> None:
    pool = Pool.open(path, "r" if options.read_only else "w", promise=options.promise)
    if pool.failed:
        log.error("%s is damaged and can only be read: %s", path, pool.failed)
    mount_options = options.mount
    if not pool.writable:
        mount_options = replace(mount_options, read_only=True)
    socket = _socket_of(options, pool)
    die = partial(_die, None if options.listener else socket)
    async with AsyncExitStack() as stack:
        stack.enter_context(bus_errors_told(pool.pmem, die))
        fs = stack.enter_context(FileSystem(pool))
        if pool.writable:
            fs.withhold(mapped_ranges(pool.pmem))
            fs.end_orphans()
        committer = Committer(pool)
        nursery = await stack.enter_async_context(trio.open_nursery())
        stack.callback(nursery.cancel_scope.cancel)
        nursery.start_soon(committer.run)
        nursery.start_soon(_trim, fs)
        nursery.start_soon(_watch_medium, fs, die)
        nursery.start_soon(stop_on_signal, nursery.cancel_scope)
        seal = partial(seal_file, fs, committer.sync)
        statistics = Statistics(fs)
        await stack.enter_async_context(answering_prometheus(options, pool, statistics))
        serve = partial(
            serve_mapping,
            fs,
            socket_path=socket,
            listener=options.listener,
            group=options.group,
            sync=committer.sync,
            seal=seal,
            statistics=statistics,
        )
        if mountpoint is None:
            await nursery.start(serve)
            ready()
            await trio.sleep_forever()
        async with mounted(
            fs,
            mountpoint,
            mount_options,
            socket=socket,
            sync=committer.sync,
            seal=seal,
            tallies=statistics.requests,
        ) as mount:
            await nursery.start(partial(serve, mount_device=mount.device))
            ready()
            await mount.wait_unmounted()


async def stop_on_signal(scope: trio.CancelScope) -> None:
    """Cancel a scope on SIGTERM and SIGINT."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            notify("STOPPING=1")
            scope.cancel()
            return


def _socket_of(options: ServerOptions, pool: Pool) -> Path:
    if options.listener:
        return Path(options.listener.getsockname())
    return options.socket or default_socket(pool)


def _die(socket: Path | None, reason: str) -> NoReturn:
    """End at once: what is mapped can't be touched any more; the mount's keeper takes it away."""
    log.critical("%s", reason, stack_info=True)
    if socket is not None:
        socket.unlink(missing_ok=True)
    os._exit(PoolDamaged.exit_code)


async def _watch_medium(fs: FileSystem, die: Callable[[str], NoReturn]) -> None:
    """Look now and then whether the pool's file is still whole.

    What the kernel can't copy out of a mapping is no bus error: the client would wait for ever.
    """
    while True:
        await trio.sleep(_WATCH_INTERVAL)
        try:
            require_whole(fs.pool.pmem)
        except MediumError as exc:
            die(str(exc))


async def _trim(fs: FileSystem) -> None:
    """Give freed units back to the file system below, a slice at a time."""
    while True:
        await trio.sleep(_TRIM_INTERVAL)
        while fs.pool.writable and fs.pool.space.trim():
            await trio.lowlevel.checkpoint()
