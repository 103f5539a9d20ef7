"""Commands that serve a pool: ``mount``, ``umount``, ``serve``."""

import errno
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from fcntl import LOCK_SH, flock
from pathlib import Path
from typing import Any

import click

from vfsmap.errors import Busy, Invalid, NotADirectory, NotFound, VfsmapError
from vfsmap.pmem.files import open_file
from vfsmap_tools.console import complain, errors_exit
from vfsmap_tools.logs import is_journal, log_to
from vfsmap_tools.mounts import find_mount, mounted_pools

log = logging.getLogger("vfsmap")
PATH = click.Path(path_type=Path)
_PATIENCE = 60
"""Seconds to wait for a server to write everything back and end."""
_PATIENCE_ENDING = 5


def _server_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(
        (
            click.option("--socket", type=PATH, help="Where the mapping daemon listens."),
            click.option("--group", help="A group whose members get direct mappings, too."),
            click.option(
                "--promise",
                type=click.Choice(["process", "power"]),
                help="Refuse a medium that keeps less.",
            ),
            click.option(
                "--metrics",
                metavar="[HOST:]PORT",
                help="Answer Prometheus there, over HTTP; on 127.0.0.1 unless a host is named.",
            ),
            click.option("--log", type=PATH, help="Append messages to this file."),
            click.option("--verbose", "-v", is_flag=True, help="Say more in the log."),
        )
    ):
        command = option(command)
    return command


@click.command("mount")
@click.argument("pool", type=PATH)
@click.argument("directory", type=PATH)
@click.option(
    "-o", "options", multiple=True, metavar="OPTS", help="Mount options, comma separated."
)
@click.option("--follow", is_flag=True, help="Read what another process writes to the pool.")
@click.option("--foreground", "-f", is_flag=True, help="Stay in the foreground.")
@click.option("--ready-fd", type=int, hidden=True)
@_server_options
@errors_exit
def mount(
    pool: Path,
    directory: Path,
    options: tuple[str, ...],
    follow: bool,
    foreground: bool,
    **server: Any,
) -> None:
    """Mount a pool on a directory and start its mapping daemon.

    Returns when the mount answers.  The server writes everything back and unmounts on SIGTERM and
    SIGINT; a mount whose server has crashed goes away by itself.

    With --follow the mount is read-only and shows, within a second, what the pool's writer has
    finished: a server that mounted it elsewhere, perhaps on another host that shares the memory.
    The writer does not wait for it, and may end, crash and come back.  There is no mapping daemon.

    \b
    Options for -o (those of fstab(5) that are for mount(8) or systemd are let pass):
      ro               read-only
      follow           as --follow
      allow_other      let other users in (needs user_allow_other in /etc/fuse.conf, or root)
      writeback        let the kernel delay writes: faster, but a write is in the pool, and in
                       every window, only after fsync
      nobusypoll       do not poll for requests: less CPU, fewer requests a second
      noatime          do not record when files are read
      sloppy           ignore options that are not known
      socket=, group=, promise=, metrics=, log=, verbose
                       as the options of this command, for fstab
    """
    words = [word for option in options for word in option.split(",") if word]
    words = _take_server_options(words, server)
    if follow:
        words.append("follow")
    _require_mountable(pool, directory)
    if not {"ro", "follow"} & set(words):
        _let_end(pool)
    if foreground:
        _serve(pool, directory, words, **server)
        return
    server.pop("ready_fd")
    arguments = ["mount", str(pool.absolute()), str(directory.absolute()), "--foreground"]
    if words:
        arguments += ["-o", ",".join(words)]
    _start(arguments, **server)


def _take_server_options(words: list[str], server: dict[str, Any]) -> list[str]:
    """Take out of the words behind -o what is an option of this command, as fstab has it."""
    context = click.get_current_context()
    options = {
        option.name: option
        for option in context.command.params
        if isinstance(option, click.Option) and not option.hidden and option.name in server
    }
    rest = []
    for word in words:
        name, valued, value = word.partition("=")
        option = options.get(name)
        if option is None or bool(valued) == option.is_flag:
            rest.append(word)
        else:
            server[name] = True if option.is_flag else option.type_cast_value(context, value)
    return rest


@click.command("serve")
@click.argument("pool", type=PATH)
@click.option("--foreground", "-f", is_flag=True, help="Stay in the foreground.")
@click.option("--ready-fd", type=int, hidden=True)
@_server_options
@errors_exit
def serve(pool: Path, foreground: bool, **server: Any) -> None:
    """Run the mapping daemon of a pool without mounting it.

    Clients name files by their paths inside the pool; only root and the daemon's own user may.
    """
    _let_end(pool)
    if foreground:
        _serve(pool, None, [], **server)
        return
    server.pop("ready_fd")
    _start(["serve", str(pool.absolute()), "--foreground"], **server)


@click.command("umount")
@click.argument("directory", type=PATH)
@errors_exit
def umount(directory: Path) -> None:
    """Unmount a pool; returns when its server has written everything back and ended."""
    unmount_and_wait(directory)


def unmount_and_wait(directory: Path, *, force: bool = False, lazy: bool = False) -> None:
    """Unmount a pool; unless ``lazy``, return when its server has ended.

    Raises:
        Invalid: no pool is mounted there.
        Busy: files on it are in use, or the server does not end.
    """
    mounted = find_mount(directory)
    if mounted is None:
        raise Invalid(f"no pool is mounted on {directory}; see: findmnt -t fuse.vfsmap")
    # a server that does not answer is not asked: force and lazy are for it
    if force or lazy or not _clear_stale(directory):
        unmount(directory, force=force, lazy=lazy)
    if not lazy and mounted.writable:  # who only reads holds nothing that others wait for
        with suppress(FileNotFoundError, PermissionError):
            wait_until_free(mounted.pool)


def unmount(directory: Path, *, force: bool = False, lazy: bool = False) -> None:
    """Unmount a directory, as root or as the user who mounted it.

    Raises:
        Busy: files on it are in use.
    """
    if os.geteuid() == 0:
        command = ["umount", "-i", *["-f"] * force, *["-l"] * lazy]
    else:
        command = ["fusermount3", "-u", *["-z"] * lazy]
    result = subprocess.run([*command, str(directory)], capture_output=True, text=True, check=False)
    if result.returncode:
        reason = result.stderr.strip().rstrip(".").splitlines() or ["no reason given"]
        raise Busy(
            f"can't unmount {directory}: {reason[-1]}; to see who uses it: fuser -vm {directory}"
        )


def wait_until_free(pool: Path, patience: int = _PATIENCE) -> None:
    """Return when no server has the pool open for writing.

    Raises:
        Busy: one has, still, after so many seconds.
    """

    def give_up(*_: object) -> None:
        raise Busy(f"the server of {pool} has not ended within {patience} seconds")

    old = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(patience)
    try:
        fd = open_file(pool, os.O_RDONLY)
        try:
            flock(fd, LOCK_SH)
        finally:
            os.close(fd)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def _require_mountable(pool: Path, directory: Path) -> None:
    if not pool.exists():
        raise NotFound(f"{pool} does not exist; make it with: vfsmap format {pool} --size 8G")
    if find_mount(directory) and not _clear_stale(directory):
        raise Busy(
            f"a pool is mounted on {directory} already; unmount it: vfsmap umount {directory}"
        )
    if not directory.exists():
        raise NotFound(f"{directory} does not exist; make it with: mkdir {directory}")
    if not directory.is_dir():
        raise NotADirectory(f"{directory} is not a directory; a pool is mounted on one")


def _let_end(pool: Path) -> None:
    """Wait a moment for a server that has been unmounted: umount(8) returns before it has ended."""
    if not any(mount.writable and mount.pool == pool.absolute() for mount in mounted_pools()):
        with suppress(Busy, OSError):  # whoever opens the pool says why it can't be had
            wait_until_free(pool, _PATIENCE_ENDING)


def _clear_stale(directory: Path) -> bool:
    """Unmount what a server that was killed has left behind; False: its server lives.

    Its keeper does that, unless it was killed, too.
    """
    try:
        os.statvfs(directory)
    except OSError as exc:
        if exc.errno != errno.ENOTCONN:
            return False
    else:
        return False
    mounted = find_mount(directory)
    with suppress(Busy):  # the keeper may be faster
        unmount(directory, lazy=True)
    if mounted:
        _remove_socket(mounted.pool)
    return find_mount(directory) is None


def _remove_socket(pool: Path) -> None:
    """Remove what a killed server has left where the daemon of its pool listens by default."""
    from vfsmap.pool import Pool
    from vfsmap_fuse import keeper
    from vfsmap_tools.server import default_socket

    with suppress(VfsmapError, OSError), Pool.open(pool, "r") as opened:
        keeper.remove(str(default_socket(opened)))


def _start(arguments: list[str], **server: Any) -> None:
    """Start a server in the background, and return when it answers.

    The server writes one line into a pipe: nothing but a newline when it is ready, else its error.
    """
    for name, value in server.items():
        if value is True:
            arguments.append(f"--{name}")
        elif value:
            arguments += [f"--{name}", str(value.absolute() if isinstance(value, Path) else value)]
    reader, writer = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-m", "vfsmap_tools.cli", *arguments, "--ready-fd", str(writer)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=None if is_journal(sys.stderr) else subprocess.DEVNULL,
        pass_fds=[writer],
        start_new_session=True,
        cwd="/",
    ) as process:
        os.close(writer)
        with os.fdopen(reader) as pipe:
            line = pipe.readline()
        if line == "\n":
            process.returncode = 0  # it runs on; nobody waits for it
            return
        status = process.wait()
    answer = json.loads(line) if line else {"error": f"the server ended with status {status}"}
    complain(answer["error"])
    sys.exit(answer.get("exit_code", 1))


def _serve(
    pool: Path,
    directory: Path | None,
    words: list[str],
    ready_fd: int | None,
    **server: Any,
) -> None:
    # here, not above: the doors are heavy, and the other commands do without them
    from vfsmap_fuse.mount import MountOptions
    from vfsmap_tools.following import run_follower
    from vfsmap_tools.manager import notify, take_socket
    from vfsmap_tools.server import ServerOptions, run_server

    told = False

    def tell(line: str) -> None:
        nonlocal told
        if ready_fd is not None and not told:
            os.write(ready_fd, line.encode() + b"\n")
            os.close(ready_fd)
        told = True

    def tell_end(error: str, **more: int) -> None:
        if told and (ready_fd is not None or server["log"]):  # nobody reads what we complain of
            log.critical("the server ends: %s", error)
        tell(json.dumps({"error": error, **more}))

    def tell_ready() -> None:
        tell("")
        notify("READY=1", f"STATUS={pool} on {directory}" if directory else f"STATUS={pool}")

    try:
        log_to(server["log"], verbose=server["verbose"], background=ready_fd is not None)
        chosen = ServerOptions(
            socket=server["socket"],
            listener=take_socket(),
            group=server["group"],
            promise=server["promise"],
            metrics=server["metrics"],
            read_only="ro" in words,
            mount=MountOptions.parse(words),
        )
        if directory is not None and chosen.mount.follow:
            run_follower(pool, directory, chosen, ready=tell_ready)
        else:
            run_server(pool, directory, chosen, ready=tell_ready)
    except VfsmapError as exc:
        tell_end(str(exc), exit_code=exc.exit_code)
        raise
    except OSError as exc:
        tell_end(f"{exc.filename}: {exc.strerror}" if exc.filename else str(exc))
        raise
    except BaseException as exc:
        tell_end(f"{type(exc).__name__}: {exc}")
        raise
