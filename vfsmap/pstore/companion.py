"""What the processes that share a region share beside it: a mutex, and the write in flight.

It lies in shared memory (/dev/shm), not in the region: it means nothing after a reboot, and
nothing to the kernel.  One page per region file and user, named after the file's device and inode:

    0   64  the mutex
    64  24  u64 zone + 1 (0: none), u64 offset, u64 count of a write with ECC that is under way

Whoever can write a mutex can crash those who use it, so only processes of one user share one, and
two users can't write to a region at the same time: each holds a shared flock() on the user's own
page as long as it has the region open, and finds by it that another user is there.

Who is the last to close a region removes its page, unless it was forked meanwhile: a child then
still uses the page, by the same descriptor, and its flock() can't be told from the parent's.
"""

import fcntl
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, Self
from weakref import WeakSet

from vfsmap.errors import Busy, NoSpace, Unsupported
from vfsmap.pmem.mutex import SIZE, Grip, Mutex

_HOME: Final = Path("/dev/shm")
_PAGE: Final = mmap.PAGESIZE


class Companion:
    """The shared page of one region; ``fd`` holds its flock() and is closed with it."""

    def __init__(self, memory: mmap.mmap, path: Path | None = None, fd: int = -1) -> None:
        self._path = path
        self._fd = fd
        self._view = memoryview(memory)
        self.mutex = Mutex(self._view[:SIZE])
        self.flight = self._view[SIZE : SIZE + 24].cast("Q")
        """Zone + 1, offset and count of the write with ECC that is under way."""
        self.forked = False
        _companions.add(self)

    @classmethod
    def alone(cls) -> Self:
        """Return one for a region in memory that only this process and its forks know."""
        companion = cls(mmap.mmap(-1, _PAGE))
        companion.mutex.create()
        return companion

    @classmethod
    def beside(cls, key: tuple[int, int]) -> Self:
        """Return the one that a user's processes share for the file of this device and inode.

        Raises:
            Busy: a process of another user has the region open for writing.
            Unsupported, NoSpace: there is no shared memory to be had.
        """
        path = _name(key, f"-{os.geteuid()}")
        fd = _open(path)
        try:
            for other in _HOME.glob(_name(key, "-*").name):
                if other != path and _in_use(other):
                    raise Busy(f"another user's process writes to the region: it holds {other}")
            return cls(mmap.mmap(fd, _PAGE), path, fd)
        except BaseException:
            os.close(fd)
            raise

    def close(self) -> None:
        """Tell other users that the region is free."""
        if self._fd < 0:
            return
        if self._path and not self.forked:
            with suppress(OSError):  # somebody has the region open
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._path.unlink()
            fcntl.flock(self._fd, fcntl.LOCK_UN)  # the mapping keeps a descriptor of its own
        os.close(self._fd)
        self._fd = -1

    @contextmanager
    def locked(self, recover: Callable[[], None]) -> Iterator[None]:
        """Hold the mutex; ``recover`` is called first when its last holder died with it.

        A thread that holds it already (a signal handler in the midst of a write) goes on at once.
        """
        grip = self.mutex.lock()
        if grip is Grip.REENTERED:
            yield
            return
        try:
            self.settle(grip, recover)
            yield
        finally:
            self.mutex.release()

    def settle(self, grip: Grip, recover: Callable[[], None]) -> None:
        """Recover if the mutex was orphaned."""
        if grip is Grip.ORPHANED:
            try:
                recover()
            finally:
                self.mutex.mend()


_companions: WeakSet[Companion] = WeakSet()


def _note_fork() -> None:
    for companion in _companions:
        companion.forked = True


os.register_at_fork(after_in_parent=_note_fork, after_in_child=_note_fork)


def fault_file(key: tuple[int, int], pid: int) -> Path:
    """Return the name of the file in which a process notes its fatal signals."""
    return _name(key, f"-fault-{pid}")


def _name(key: tuple[int, int], suffix: str) -> Path:
    device, inode = key
    return _HOME / f"vfsmap-pstore-{device:x}.{inode:x}{suffix}"


def _open(path: Path) -> int:
    """Open a user's page, made if need be, and hold its flock()."""
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            _create(path)
            continue
        except OSError as exc:
            raise Busy(f"{path} can't be used: {exc.strerror}; remove it") from exc
        status = os.fstat(fd)
        if status.st_uid != os.geteuid() or status.st_size < _PAGE:
            os.close(fd)
            raise Busy(f"{path} belongs to user {status.st_uid}; remove it")
        fcntl.flock(fd, fcntl.LOCK_SH)
        if os.fstat(fd).st_nlink:
            return fd
        os.close(fd)  # its last user has just removed it


def _create(path: Path) -> None:
    """Make the page whole before anybody can see it; somebody else may be faster."""
    try:
        fd, draft = tempfile.mkstemp(prefix=".vfsmap-pstore-", dir=_HOME)
    except OSError as exc:
        raise Unsupported(f"a shared region needs {_HOME}: {exc.strerror}") from exc
    try:
        os.posix_fallocate(fd, 0, _PAGE)  # a store into a hole would be a SIGBUS if it is full
        os.fchmod(fd, 0o644)  # others may look whether it is in use
        Companion(mmap.mmap(fd, _PAGE)).mutex.create()
        with suppress(FileExistsError):
            os.link(draft, path)
    except OSError as exc:
        raise NoSpace(f"no room for a shared page in {_HOME}: {exc.strerror}") from exc
    finally:
        os.close(fd)
        os.unlink(draft)


def _in_use(path: Path) -> bool:
    """Tell whether a process holds another user's page."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
