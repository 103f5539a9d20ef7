"""One process that does everything twice: on a mounted pool, and on a file system of the kernel.

Whatever it is asked for is done on both sides, and the answers, results or errnos, are compared.
What only a pool has (windows of the mapping daemon, seals) is done there, and on the other side in
the way that has to come out the same.
"""

import errno
import mmap
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, NamedTuple

import vfsmap
from vfsmap.errors import Busy, VfsmapError

_LATE: Final = 10
"""Seconds that the kernel may take to tell a server that a file was closed."""


class Order(NamedTuple):
    """Something to do."""

    name: str
    arguments: tuple[Any, ...]
    error: int | None = None
    """An errno that the pool has to answer with; then the other side is left alone."""


class Differs(Exception):
    """The two sides have answered differently."""


class _Side:
    """One of the two trees, and what this process has open there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: dict[int, int] = {}

    def open(self, slot: int, name: str, flags: int) -> None:
        self.files[slot] = os.open(self.root / name, flags | os.O_CLOEXEC, 0o640)

    def close(self, slot: int) -> None:
        os.close(self.files.pop(slot))

    def pread(self, slot: int, size: int, at: int) -> bytes:
        return os.pread(self.files[slot], size, at)

    def pwrite(self, slot: int, data: bytes, at: int) -> int:
        return os.pwrite(self.files[slot], data, at)

    def write(self, slot: int, data: bytes) -> tuple[int, int]:
        fd = self.files[slot]
        return os.write(fd, data), os.lseek(fd, 0, os.SEEK_CUR)

    def read(self, slot: int, size: int) -> bytes:
        return os.read(self.files[slot], size)

    def fsync(self, slot: int) -> None:
        os.fsync(self.files[slot])

    def ftruncate(self, slot: int, size: int) -> None:
        os.ftruncate(self.files[slot], size)

    def fstat(self, slot: int) -> tuple[int, ...]:
        return _facts(os.fstat(self.files[slot]))

    def map_read(self, slot: int) -> bytes:
        with mmap.mmap(self.files[slot], 0, prot=mmap.PROT_READ) as mapped:
            return mapped[:]

    def map_write(self, slot: int, data: bytes, at: int) -> None:
        with mmap.mmap(self.files[slot], 0) as mapped:
            at %= len(mapped)
            end = min(at + len(data), len(mapped))
            mapped[at:end] = data[: end - at]
            mapped.flush()

    def truncate(self, name: str, size: int) -> None:
        os.truncate(self.root / name, size)

    def rename(self, old: str, new: str) -> None:
        os.rename(self.root / old, self.root / new)

    def link(self, old: str, new: str) -> None:
        os.link(self.root / old, self.root / new)

    def unlink(self, name: str) -> None:
        os.unlink(self.root / name)

    def symlink(self, target: str, name: str) -> None:
        os.symlink(target, self.root / name)

    def mkdir(self, name: str) -> None:
        os.mkdir(self.root / name, 0o755)

    def rmdir(self, name: str) -> None:
        os.rmdir(self.root / name)

    def chmod(self, name: str, mode: int) -> None:
        os.chmod(self.root / name, mode)

    def utime(self, name: str, ns: int) -> None:
        os.utime(self.root / name, ns=(ns, ns))

    def setxattr(self, name: str, key: str, value: bytes, flags: int) -> None:
        os.setxattr(self.root / name, key, value, flags)

    def removexattr(self, name: str, key: str) -> None:
        os.removexattr(self.root / name, key)

    def describe(self, name: str) -> tuple[object, ...]:
        """Return all that is to be seen of a name."""
        path = self.root / name
        facts = _facts(os.lstat(path))
        if path.is_symlink():
            return *facts, os.readlink(path)
        notes = sorted((key, os.getxattr(path, key)) for key in os.listxattr(path))
        if path.is_dir():
            return *facts, notes, sorted(os.listdir(path))
        return *facts, notes, path.read_bytes()

    def everything(self) -> dict[str, tuple[object, ...]]:
        """Return all that is to be seen of the tree."""
        found = {}
        for folder, folders, files in os.walk(self.root):
            for each in (*folders, *files):
                name = os.path.relpath(os.path.join(folder, each), self.root)
                found[name] = self.describe(name)
        return found


def _facts(status: os.stat_result) -> tuple[int, ...]:
    directory = status.st_mode >> 12 == 0o4
    size, links = (0, 0) if directory else (status.st_size, status.st_nlink)
    return status.st_mode, status.st_uid, status.st_gid, links, size


class Twins:
    """Both sides, in a process of their own."""

    def __init__(self, pool: Path, other: Path) -> None:
        self.pool = _Side(pool)
        self.other = _Side(other)
        self._windows: dict[int, tuple[vfsmap.Window, int]] = {}

    def obey(self, order: Order) -> object:
        """Do something on both sides; return what came of it, the error if it was one.

        Raises:
            Differs: the answers do.
        """
        special = getattr(self, f"_{order.name}", None)
        if special is not None:
            return special(order)
        ours = _answer(getattr(self.pool, order.name), *order.arguments)
        if order.error is not None:
            theirs: object = OSError(order.error, os.strerror(order.error))
        else:
            theirs = _answer(getattr(self.other, order.name), *order.arguments)
        _require_same(order, ours, theirs)
        if order.name == "open" and not isinstance(theirs, OSError):
            return os.fstat(self.other.files[order.arguments[0]]).st_ino
        return theirs

    # what only a pool has

    def _map(self, order: Order) -> object:
        slot, name, writable = order.arguments
        try:
            window = _unless_late(
                lambda: vfsmap.map(self.pool.root / name, writable=writable, direct=True),
                patient=order.error is None,
            )
        except VfsmapError as exc:
            ours = OSError(exc.errno, str(exc))
            _require_same(order, ours, order.error and OSError(order.error, "expected"))
            return ours
        if order.error is not None:
            raise Differs(f"{order}: it was mapped")
        flags = os.O_RDWR if writable else os.O_RDONLY
        self._windows[slot] = window, os.open(self.other.root / name, flags | os.O_CLOEXEC)
        return window.length

    def _unmap(self, order: Order) -> None:
        window, fd = self._windows.pop(order.arguments[0])
        window.close()
        os.close(fd)

    def _load(self, order: Order) -> None:
        window, fd = self._windows[order.arguments[0]]
        _require_same(order, bytes(window.view()), os.pread(fd, window.length, 0))

    def _store(self, order: Order) -> None:
        slot, data, at = order.arguments
        window, fd = self._windows[slot]
        at %= window.length
        data = data[: window.length - at]
        window.view()[at : at + len(data)] = data
        window.persist(at, len(data))
        window.publish()
        os.pwrite(fd, data, at)

    def _seal(self, order: Order) -> object:
        path = self.pool.root / order.arguments[0]
        theirs = OSError(order.error, "expected") if order.error is not None else None

        def seal() -> object:
            return _answer(os.setxattr, path, "user.vfsmap.seal", b"1")

        until = time.monotonic() + _LATE
        while isinstance(ours := seal(), OSError) and ours.errno == errno.EBUSY:
            if order.error is not None or time.monotonic() > until:
                break
            time.sleep(0.01)
        _require_same(order, ours, theirs)
        return ours

    def _compare(self, order: Order) -> None:
        ours, theirs = self.pool.everything(), self.other.everything()
        for name in sorted(ours.keys() | theirs.keys()):
            _require_same(Order(name, ()), ours.get(name), theirs.get(name))


def _unless_late(action: Callable[[], vfsmap.Window], *, patient: bool) -> vfsmap.Window:
    """Try again while a file counts as open that was closed a moment ago."""
    until = time.monotonic() + _LATE
    while True:
        try:
            return action()
        except Busy:
            if not patient or time.monotonic() > until:
                raise
        time.sleep(0.01)


def _answer(action: Callable[..., object], *arguments: object) -> object:
    try:
        return action(*arguments)
    except OSError as exc:
        return exc
    except ValueError as exc:  # Python's own word on mapping an empty file
        return OSError(errno.EINVAL, str(exc))


def _require_same(order: Order, ours: object, theirs: object) -> None:
    if isinstance(ours, OSError) and isinstance(theirs, OSError):
        if ours.errno == theirs.errno:
            return
    elif type(ours) is type(theirs) and ours == theirs:
        return
    what = f"{_short(ours)} on the pool, {_short(theirs)} elsewhere{_where(ours, theirs)}"
    raise Differs(f"{_short(order)}: {what}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 300 else f"{text[:200]}... of {len(text)} characters"


def _where(ours: object, theirs: object) -> str:
    if isinstance(ours, tuple) and isinstance(theirs, tuple) and ours and theirs:
        ours, theirs = ours[-1], theirs[-1]
    if not (isinstance(ours, bytes) and isinstance(theirs, bytes)):
        return ""
    pairs = enumerate(zip(ours, theirs, strict=False))
    at = next((at for at, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
    same = next((n for n in range(at, len(ours)) if ours[n : n + 8] == theirs[n : n + 8]), -1)
    return f"; {len(ours)} and {len(theirs)} bytes, different from {at:#x} to about {same:#x}"


def serve(pool: Path, other: Path, pipe: Connection) -> None:
    """Obey orders until the pipe ends; each is answered by what differs, if anything, and a result.

    Of a result only what is small comes back.
    """
    twins = Twins(pool, other)
    while True:
        try:
            order = pipe.recv()
        except EOFError:
            return
        try:
            result = twins.obey(order)
        except Exception as exc:
            pipe.send((f"{type(exc).__name__}: {exc}", None))
        else:
            pipe.send((None, result if isinstance(result, int | OSError) else None))
