"""What a service and its manager, systemd, tell each other by environment variables.

LISTEN_FDS, LISTEN_PID   sockets that the manager listens on for us: sd_listen_fds(3)
NOTIFY_SOCKET            where to say that we are ready, end, or live: sd_notify(3)
WATCHDOG_USEC            how often to say that we live: sd_watchdog_enabled(3)
JOURNAL_STREAM           our output goes to the journal: systemd.exec(5), sd-daemon(3)
"""

import logging
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import trio

from vfsmap.errors import Invalid
from vfsmap_tools.escaping import printable

_FIRST_FD: Final = 3  # SD_LISTEN_FDS_START


def take_socket() -> socket.socket | None:
    """Return the listening socket that the manager has passed to this process, if any.

    Raises:
        Invalid: there are several, or it is no listening Unix stream socket.
    """
    count = os.environ.pop("LISTEN_FDS", "")
    ours = os.environ.pop("LISTEN_PID", "") == str(os.getpid())
    os.environ.pop("LISTEN_FDNAMES", None)
    if not ours or not count.isdigit() or count == "0":
        return None
    fds = range(_FIRST_FD, _FIRST_FD + int(count))
    for fd in fds:
        os.set_inheritable(fd, False)
    if len(fds) != 1:
        raise Invalid(f"{len(fds)} sockets were passed; one ListenStream= is expected")
    try:
        sock = socket.socket(fileno=fds[0])
    except OSError as exc:
        raise Invalid("what was passed is not a socket; use ListenStream=/PATH") from exc
    listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if (sock.family, sock.type, listens) != (socket.AF_UNIX, socket.SOCK_STREAM, 1):
        sock.close()
        raise Invalid("the socket that was passed is of another kind; use ListenStream=/PATH")
    sock.setblocking(False)
    return sock


def notify(*lines: str) -> None:
    """Tell the manager something, where there is one."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(address)
            sock.sendall("\n".join(map(printable, lines)).encode())
        except OSError as exc:
            logging.getLogger("vfsmap").warning("can't notify the service manager: %s", exc)


def watchdog_interval() -> float | None:
    """Return the seconds after which the manager takes silence for death; None: it does not."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    pid = os.environ.get("WATCHDOG_PID", str(os.getpid()))
    if not microseconds.isdigit() or microseconds == "0" or pid != str(os.getpid()):
        return None
    return int(microseconds) / 1e6


@asynccontextmanager
async def watched() -> AsyncIterator[None]:
    """Tell the manager, for as long as the block lasts, that the loop goes round."""
    interval = watchdog_interval()
    if interval is None:
        yield
        return
    async with trio.open_nursery() as nursery:
        # not cancelled with what it surrounds: that takes its time to end
        scope = await nursery.start(_feed, interval / 2)
        try:
            yield
        finally:
            scope.cancel()


async def _feed(pause: float, task_status: trio.TaskStatus[trio.CancelScope]) -> None:
    with trio.CancelScope(shield=True) as scope:
        task_status.started(scope)
        while True:
            notify("WATCHDOG=1")
            await trio.sleep(pause)
