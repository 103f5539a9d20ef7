"""The daemon's socket: made where nobody can put another in its place, and removed again."""

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from vfsmap.errors import Busy, Denied, Invalid

_BACKLOG: Final = 128
_PATH_MAX: Final = 107  # struct sockaddr_un, include/uapi/linux/un.h, without the NUL byte


@contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """Listen on a socket of this name, which is removed in the end.

    Everybody may connect: what a client may do is decided by its credentials.

    Raises:
        Busy: another daemon listens there.
        Invalid: something else has the name, or it is too long.
        Denied: somebody else could put another socket in its place.
    """
    _require_safe(path)
    beside = path.with_name(f".{path.name}.new")
    if len(bytes(beside)) > _PATH_MAX:
        raise Invalid(f"{path} is too long for a socket; name a shorter one with --socket")
    _require_free(path)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.setblocking(False)
        beside.unlink(missing_ok=True)
        try:
            sock.bind(str(beside))
            beside.chmod(0o666)
            sock.listen(_BACKLOG)
            identity = beside.lstat().st_ino
            beside.rename(path)  # a stale one goes; clients see it, or one that answers
        except OSError as exc:
            beside.unlink(missing_ok=True)
            raise Denied(f"can't make the socket {path}: {exc.strerror}") from exc
        try:
            yield sock
        finally:
            with suppress(FileNotFoundError):
                if path.lstat().st_ino == identity:
                    path.unlink()


def _require_safe(path: Path) -> None:
    """Do nothing when only we, or root, can replace what the directory of ``path`` holds."""
    try:
        status = path.parent.stat()
    except OSError as exc:
        raise Invalid(f"{path.parent}: {exc.strerror}; make it, or use another --socket") from exc
    ours = status.st_uid in (0, os.geteuid())
    shared = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not status.st_mode & stat.S_ISVTX
    if not ours or shared:
        raise Denied(
            f"others could replace a socket in {path.parent}; name one in a directory of your own "
            f"with --socket"
        )


def _require_free(path: Path) -> None:
    """Do nothing when there is nothing of that name, or the socket of a daemon that has died."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise Invalid(f"{path} exists and is not a socket; name another with --socket")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return
        except BlockingIOError:  # it listens, and is busy
            pass
        except OSError as exc:
            raise Denied(f"can't tell who listens on {path}: {exc.strerror}") from exc
    raise Busy(f"another daemon listens on {path}; name another with --socket")
