"""A process that takes a mount away when its server has died, however it died.

It is started before the mount is made, so that there is no moment in which nobody looks after it,
and it is this file alone, with few imports, so that it takes little.  Its standard input is a pipe
from the server:

    the number of the mount's connection, once it is mounted, and a newline
    END, once the server has unmounted by itself

The pipe's end without END is the server's death.  But a server that is killed while it waits for
its own mount (it writes dirty pages back for a lease, or closes what a client has sent) never gets
as far as closing the pipe: it waits for an answer from itself, and can't be killed.  What it has
lost by then is its memory.  So this process looks now and then whether that is still there, and
ends the connection if it is not.
"""

import os
import select
import sys
from contextlib import suppress

END = b"."
_LOOK = 1.0
"""Seconds between two looks at the server."""
_MOUNTING = 10
"""Looks for a user's mount: the fusermount3 of a dead server may be just about to make it."""


def keep(server: int, directory: str) -> None:
    """Return when the server has unmounted, or has died and its mount is gone."""
    told = b""
    while not told.endswith(END):
        if select.select([0], [], [], _LOOK)[0]:
            piece = os.read(0, 64)
            if not piece:
                take_away(directory)
                return
            told += piece
        elif not _has_memory(server) and not select.select([0], [], [], _LOOK)[0]:
            abort(directory, told)


def take_away(directory: str) -> None:
    """Unmount what does not answer."""
    for _ in range(_MOUNTING if os.geteuid() else 1):
        try:
            os.statvfs(directory)
        except OSError:
            _unmount(directory)
        select.select([], [], [], _LOOK / _MOUNTING)


def abort(directory: str, told: bytes) -> None:
    """End the connection of a server that waits for itself, so that it can die."""
    if os.geteuid() == 0:
        _unmount(directory)
    with suppress(OSError):  # where the control files are not mounted, it stays
        name = f"/sys/fs/fuse/connections/{told.decode().strip()}/abort"
        os.write(os.open(name, os.O_WRONLY), b"1")


def _has_memory(server: int) -> bool:
    try:
        os.readlink(f"/proc/{server}/exe")
    except OSError as exc:
        return not isinstance(exc, FileNotFoundError)
    return True


def _unmount(directory: str) -> None:
    """Become the command that unmounts."""
    command = ["fusermount3", "-u", "-z"] if os.geteuid() else ["umount", "-i", "-c", "-f", "-l"]
    os.execvp(command[0], [*command, "--", directory])


if __name__ == "__main__":
    keep(int(sys.argv[1]), sys.argv[2])
