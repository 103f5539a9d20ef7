"""The bytes of a region: a file of a mounted pool, any other file, or a buffer."""

import mmap
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from vfsmap.errors import Denied, Exists, Invalid, MediumError, NoSpace, NotFound, VfsmapError
from vfsmap.pmem import libc

Buffer = bytes | bytearray | memoryview | mmap.mmap

_ON_A_MOUNT: Final = "user.vfsmap.socket"  # every file of a mounted pool has it
_CHUNK: Final = 1 << 20


class Backing(NamedTuple):
    """A region's bytes and what can be done with them as a whole."""

    view: memoryview
    persist: Callable[[], None]
    """Make all stores as durable as the medium promises; raises MediumError."""
    close: Callable[[], None]
    key: tuple[int, int] | None = None
    """Device and inode of the file; None: memory of this process alone."""


def over_buffer(buffer: Buffer) -> Backing:
    """Return the backing of a region in memory."""
    view = memoryview(buffer).cast("B")
    return Backing(view, persist=_nothing, close=view.release)


def over_file(path: str | os.PathLike[str], *, writable: bool) -> Backing:
    """Map a region file; a file of a mounted pool straight out of the pool.

    Raises:
        NotFound, Denied, Invalid: there is no such file, no right to it, or nothing in it.
        NoSpace: the file has holes, and no room to fill them.
        VfsmapError: whatever mapping out of the pool met with.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise Invalid(f"{os.fspath(path)} is not a regular file")
        if not status.st_size:
            raise Invalid(f"{os.fspath(path)} is empty; make a region of it with format")
        key = status.st_dev, status.st_ino
        if is_on_mount(path):
            return _over_window(path, key, writable=writable)
        return _over_mmap(path, key, status.st_size, writable=writable)
    except OSError as exc:
        raise translate(exc, path) from exc


def require_replaceable(path: str | os.PathLike[str], *, force: bool) -> None:
    """Raise unless a region may be made of a path: it is missing, an empty file, or forced.

    Raises:
        Exists: a file is there and not empty, and ``force`` was not given.
        Invalid: something else is there.
    """
    with suppress(FileNotFoundError):
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise Invalid(f"{os.fspath(path)} is not a regular file")
        if status.st_size and not force:
            raise Exists(f"{os.fspath(path)} is not empty; replacing what it holds needs force")


def create_file(path: str | os.PathLike[str], size: int) -> None:
    """Make a file of ``size`` zero bytes, all of them allocated; an old file is emptied first.

    Raises:
        NotFound, Denied, NoSpace, Invalid: as the file system says.

    Crash: a file of some length that holds nothing but zeros, which is not a region.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            if is_on_mount(path):
                with suppress(OSError):  # only a hint
                    os.setxattr(fd, "user.vfsmap.align", b"2M")
            for at in range(0, size, _CHUNK):
                os.pwrite(fd, bytes(min(_CHUNK, size - at)), at)
        finally:
            os.close(fd)
    except OSError as exc:
        raise translate(exc, path) from exc


def is_on_mount(path: str | os.PathLike[str]) -> bool:
    """Tell whether a file belongs to a mounted pool."""
    try:
        os.getxattr(path, _ON_A_MOUNT)
    except OSError:
        return False
    return True


def translate(error: OSError, path: str | os.PathLike[str]) -> VfsmapError:
    """Return what an OSError about a region file is to our callers."""
    text = f"{os.fspath(path)}: {error.strerror or error}"
    if isinstance(error, FileNotFoundError):
        return NotFound(text)
    if isinstance(error, PermissionError):
        return Denied(text)
    if error.errno in (NoSpace.errno, Invalid.errno):
        return NoSpace(text) if error.errno == NoSpace.errno else Invalid(text)
    return MediumError(text)


def _over_window(path: str | os.PathLike[str], key: tuple[int, int], *, writable: bool) -> Backing:
    import vfsmap  # the front door; it imports what it needs when it is asked

    window = vfsmap.map(path, writable=writable)
    view = window.view()

    def close() -> None:
        view.release()
        window.close()

    persist = (lambda: window.persist(0, window.length)) if writable else _nothing
    return Backing(view, persist, close, key)


def _over_mmap(
    path: str | os.PathLike[str], key: tuple[int, int], size: int, *, writable: bool
) -> Backing:
    access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
    fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
    try:
        if writable:
            _fill_holes(fd, size)
        mapped = mmap.mmap(fd, size, access=access)
    finally:
        os.close(fd)
    view = memoryview(mapped)

    def close() -> None:
        view.release()
        mapped.close()

    def persist() -> None:
        try:
            mapped.flush()
        except OSError as exc:
            raise MediumError(f"{Path(path)} can't be written back: {exc.strerror}") from exc

    return Backing(view, persist if writable else _nothing, close, key)


def _fill_holes(fd: int, size: int) -> None:
    # A store into a hole of a full file system is a SIGBUS, and this is a crash log.
    if os.fstat(fd).st_blocks * 512 < size:
        try:
            libc.fallocate(fd, libc.FALLOC_FL_KEEP_SIZE, 0, size)
        except OSError as exc:
            if exc.errno == NoSpace.errno:
                raise


def _nothing() -> None:
    pass
