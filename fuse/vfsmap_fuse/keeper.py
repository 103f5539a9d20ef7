"""A process that takes mount and socket away when their server has died, however it died.

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
import signal
import sys
from contextlib import suppress

END = b"."
_LOOK = 1.0
"""Seconds between two looks at the server."""
_DYING = 10
"""Looks, a tenth of a second apart, at what a dying server may still hold, or fusermount3 make."""


def keep(server: int, directory: str, socket: str) -> None:
    """Return when the server has unmounted, or has died and its mount is gone."""
    told = b""
    while not told.endswith(END):
        if select.select([0], [], [], _LOOK)[0]:
            piece = os.read(0, 64)
            if not piece:
                take_away(directory)
                remove(socket)
                return
            told += piece
        elif not _has_memory(server) and not select.select([0], [], [], _LOOK)[0]:
            abort(directory, told)


def take_away(directory: str) -> None:
    """Unmount what does not answer."""
    for _ in range(_DYING if os.geteuid() else 1):
        try:
            os.statvfs(directory)
        except OSError:
            _unmount(directory)
            return
        select.select([], [], [], _LOOK / _DYING)


def remove(path: str) -> None:
    """Remove a socket on which nobody listens any more."""
    import socket  # who waits does without it

    for _ in range(_DYING if path else 0):
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                with suppress(OSError):
                    os.unlink(path)
                return
            except FileNotFoundError:
                return
            except OSError:
                pass
        select.select([], [], [], _LOOK / _DYING)


def abort(directory: str, told: bytes) -> None:
    """End the connection of a server that waits for itself, so that it can die.

    What somebody else has mounted there meanwhile stays.
    """
    connection = told.decode().strip()
    if os.geteuid() == 0 and (not connection or _top_mount(directory) == f"0:{connection}"):
        _unmount(directory)
        return
    with suppress(OSError):  # where the control files are not mounted, it stays
        control = os.open(f"/sys/fs/fuse/connections/{connection}/abort", os.O_WRONLY)
        try:
            os.write(control, b"1")
        finally:
            os.close(control)


def _top_mount(directory: str) -> str:
    """Return the device mounted on a directory last, which hides the others, as ``0:MINOR``."""
    for character in "\\ \t\n":  # as the kernel writes them
        directory = directory.replace(character, f"\\{ord(character):03o}")
    device = ""
    with open("/proc/self/mountinfo", errors="surrogateescape") as mounts:  # noqa: PTH123 pathlib costs memory
        for line in mounts:
            fields = line.split(" ")
            if fields[4] == directory:
                device = fields[2]
    return device


def _has_memory(server: int) -> bool:
    try:
        os.readlink(f"/proc/{server}/exe")
    except OSError as exc:
        return not isinstance(exc, FileNotFoundError)
    return True


def _unmount(directory: str) -> None:
    command = ["fusermount3", "-u", "-z"] if os.geteuid() else ["umount", "-i", "-c", "-f", "-l"]
    os.spawnvp(os.P_WAIT, command[0], [*command, "--", directory])


if __name__ == "__main__":
    # systemd asks all of a service's processes to end at once, when one was killed as well
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    keep(int(sys.argv[1]), *sys.argv[2:])
