"""Every error vfsmap raises on purpose.

One class per thing a caller can react to.  The class says what the kernel (``errno``) and the
shell (``exit_code``) are told; the instance says, in one line, what was wrong, which value was
seen and what to do about it.
"""

import errno as linux
from typing import ClassVar


class VfsmapError(Exception):
    """Base class; never raised itself."""

    errno: ClassVar[int] = linux.EIO
    exit_code: ClassVar[int] = 1


class Invalid(VfsmapError, ValueError):
    """An argument breaks a rule; the message says which."""

    errno = linux.EINVAL
    exit_code = 2


class NotAligned(Invalid):
    """An offset or a size is off the required boundary."""

    def __init__(self, what: str, value: int, align: int) -> None:
        super().__init__(f"{what} {value:#x} is not a multiple of {align:#x}")
        self.value = value
        self.align = align


class NotFound(VfsmapError, LookupError):
    """The named thing does not exist."""

    errno = linux.ENOENT


class Stale(NotFound):
    """The thing was there, and is gone: somebody else has ended it meanwhile."""

    errno = linux.ESTALE


class Exists(VfsmapError):
    """The named thing exists already."""

    errno = linux.EEXIST


class NotADirectory(VfsmapError):
    """A path component is not a directory."""

    errno = linux.ENOTDIR


class IsADirectory(VfsmapError):
    """The operation needs something that is not a directory."""

    errno = linux.EISDIR


class NotEmpty(VfsmapError):
    """The directory has entries."""

    errno = linux.ENOTEMPTY


class NameTooLong(VfsmapError):
    """A name, link target or xattr name is longer than the format allows."""

    errno = linux.ENAMETOOLONG


class TooBig(VfsmapError):
    """A file would grow past the largest size the format allows."""

    errno = linux.EFBIG


class TooManyLinks(VfsmapError):
    """The link count is at its limit."""

    errno = linux.EMLINK


class NoData(VfsmapError):
    """The extended attribute does not exist."""

    errno = linux.ENODATA


class Denied(VfsmapError):
    """The caller has no right to do this."""

    errno = linux.EACCES


class Untrusted(Denied):
    """The daemon does not trust the caller with direct mappings."""


class Sealed(VfsmapError):
    """The file is sealed: its content can never change again."""

    errno = linux.EPERM


class Busy(VfsmapError):
    """Somebody else holds what the operation needs."""

    errno = linux.EBUSY


class PoolInUse(Busy):
    """Another process has the pool open for writing."""


class NoSpace(VfsmapError):
    """No room: in the pool, or in the file system that holds it."""

    errno = linux.ENOSPC


class NoMemory(VfsmapError):
    """No memory, no free huge pages or no address space; the message says which."""

    errno = linux.ENOMEM


class TooManyMappings(NoMemory):
    """The process has as many mappings as the kernel allows one."""


class Unsupported(VfsmapError):
    """The medium, the kernel or the build can't do this; the message says what is missing."""

    errno = linux.EOPNOTSUPP


class ReadOnly(VfsmapError):
    """The pool was opened read-only, or turned read-only after a failure."""

    errno = linux.EROFS


class MediumError(VfsmapError):
    """The medium refused to store or to flush."""

    errno = linux.EIO


class NotAPool(VfsmapError):
    """The file is not a vfsmap pool, or one of a newer format."""

    errno = linux.EINVAL
    exit_code = 3


class PoolDamaged(VfsmapError):
    """The pool breaks its own rules; only ``vfsmap check --repair`` may write to it now."""

    errno = linux.EIO
    exit_code = 3


class Damaged(VfsmapError):
    """A file's or a record's content does not agree with its checksum or its format."""

    errno = linux.EIO
    exit_code = 3


class DaemonUnreachable(VfsmapError):
    """No mapping daemon answers on the socket."""

    errno = linux.ECONNREFUSED


class ProtocolError(VfsmapError):
    """The peer broke the wire protocol."""

    errno = linux.EPROTO


class Crashed(VfsmapError):
    """Code that ran in a process of its own did something that ended it."""

    errno = linux.EIO


def shortage(exc: BaseException) -> int:
    """Return the errno of a want of memory or descriptors in this process, 0 of anything else."""
    if isinstance(exc, MemoryError):
        return linux.ENOMEM
    number = exc.errno if isinstance(exc, OSError) else None
    return number if number in (linux.EMFILE, linux.ENFILE, linux.ENOMEM) else 0
