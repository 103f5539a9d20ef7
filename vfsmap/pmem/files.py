"""The file that a medium is: opened, given its size, locked; and errors as we name them."""

import errno
import fcntl
import os
from pathlib import Path

from vfsmap.errors import (
    Denied,
    Invalid,
    MediumError,
    NoSpace,
    NotFound,
    PoolInUse,
    Unsupported,
    VfsmapError,
)
from vfsmap.pmem.medium import Medium, Promise
from vfsmap.units import format_size

_LOCKS = Path("/proc/locks")


def open_file(path: Path, flags: int) -> int:
    """Open a medium without waiting for anything; return its descriptor."""
    require_no_directory(path)
    flags |= os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO must be refused, not waited for
    if flags & os.O_CREAT:
        flags |= os.O_NOFOLLOW
    try:
        return os.open(path, flags, 0o600)
    except OSError as exc:
        error = translated(exc, f"can't open {path}")
        raise type(error)(f"{error}; {_cure(exc, path, flags)}") from exc


def require_no_directory(path: Path) -> None:
    """Say the same of a directory whether it is to be read, written or replaced.

    Raises:
        Invalid: it is one.
    """
    if os.path.isdir(path):  # Path.is_dir() raises where a directory above can't be searched
        raise Invalid(f"{path} is a directory; a pool is a regular file or a DAX device")


def _cure(exc: OSError, path: Path, flags: int) -> str:
    """Return what can be done about a file that can't be opened."""
    if exc.errno == errno.ENOENT:
        if flags & os.O_CREAT:
            return f"make the directory first: mkdir -p {path.parent}"
        return f"make a pool with: vfsmap format {path} --size 8G"
    if os.path.islink(path) and not os.path.exists(path):
        return "the symbolic link leads to nothing: name the file itself"
    if exc.errno == errno.ENAMETOOLONG:
        return "name it shorter"
    if flags & os.O_CREAT and not os.path.exists(path):
        return f"a file can't be made in {path.parent}; name another place, or ask its owner"
    if exc.errno in (errno.EACCES, errno.EPERM):
        return "a pool is for its owner and root alone"
    return "a pool is a regular file or a DAX device"


def set_size(fd: int, path: Path, size: int, old: int = 0) -> None:
    """Set a file's length; when it is to be replaced, ``old`` bytes of content go first."""
    try:
        if old:
            os.ftruncate(fd, 0)
        os.ftruncate(fd, size)
    except (OSError, OverflowError) as exc:
        what = f"can't make {path} {format_size(size)} long"
        if isinstance(exc, OverflowError):
            raise NoSpace(f"{what}: no file can be") from exc
        raise translated(exc, what) from exc


def persist_name(path: Path) -> None:
    """Make a new file's entry in its directory durable, which a sync of the file need not do."""
    try:
        fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as exc:
        raise translated(exc, f"can't make the name of {path} durable") from exc


def require_promise(medium: Medium, promise: Promise | str | None, path: Path) -> None:
    """Check that a medium keeps what is asked of it.

    Raises:
        Unsupported: it does not.
        Invalid: there is no such promise.
    """
    try:
        wanted = Promise(promise) if promise is not None else Promise.PROCESS
    except ValueError as exc:
        raise Invalid(f"promise {promise!r}: process or power is expected") from exc
    if not medium.promise.covers(wanted):
        raise Unsupported(
            f"{path} is on {medium.name}, which survives the death of processes but not "
            f"power loss; put the pool on a disk or on DAX, or ask for the promise 'process'"
        )


def lock(fd: int, path: Path) -> None:
    """Lock other writers out.

    Raises:
        PoolInUse: there is one.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        holder = lock_holder(path)
        by = f" by process {holder}" if holder else ""
        raise PoolInUse(f"{path} is in use{by}; unmount it or stop that process first") from exc


def lock_holder(path: Path) -> int | None:
    """Return the process that has a medium open for writing, as the kernel's table of locks says.

    None where there is none, or where it lives in another pid namespace.
    """
    status = path.stat()
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    wanted = f"{device}:{status.st_ino}"
    for line in _LOCKS.read_text().splitlines():
        fields = line.split()
        if fields[1] == "FLOCK" and fields[5] == wanted and int(fields[4]) > 0:
            return int(fields[4])
    return None


def translated(exc: OSError, what: str) -> VfsmapError:
    """Return our error for one of the system's; ``what`` could not be done."""
    reason = f"{what}: {exc.strerror}"
    match exc.errno:
        case errno.ENOENT:
            return NotFound(reason)
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return Denied(reason)
        case errno.EEXIST | errno.EISDIR | errno.EINVAL:
            return Invalid(reason)
        case errno.ELOOP | errno.ENOTDIR | errno.ENAMETOOLONG:
            return Invalid(reason)
        case errno.ENOSPC | errno.EFBIG | errno.ENOMEM | errno.EDQUOT:
            return NoSpace(reason)
        case errno.EOPNOTSUPP:
            return Unsupported(reason)
        case _:
            return MediumError(reason)
