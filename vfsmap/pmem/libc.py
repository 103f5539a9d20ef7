"""System calls that Python's standard library does not wrap, or wraps too thickly.

Each function is one call; it raises OSError with the kernel's errno and adds nothing.  Addresses
are plain integers: whoever asks for one owns the range behind it.  Numbers are those of
include/uapi/asm-generic (mman-common.h, mman.h) and linux/{falloc,fcntl,stat}.h; the generic
values hold on x86-64, arm64 and riscv64.
"""

import ctypes
import errno
import os
import socket
import sys
from typing import Any, Final, NamedTuple

PROT_NONE: Final = 0x0
PROT_READ: Final = 0x1
PROT_WRITE: Final = 0x2
PROT_EXEC: Final = 0x4

MAP_SHARED: Final = 0x01
MAP_PRIVATE: Final = 0x02
MAP_FIXED: Final = 0x10
MAP_ANONYMOUS: Final = 0x20
MAP_NORESERVE: Final = 0x4000
MAP_HUGETLB: Final = 0x40000
MAP_FIXED_NOREPLACE: Final = 0x100000

MREMAP_MAYMOVE: Final = 1
MREMAP_FIXED: Final = 2

MS_SYNC: Final = 4

MADV_DONTNEED: Final = 4
MADV_HUGEPAGE: Final = 14
MADV_NOHUGEPAGE: Final = 15
MADV_POPULATE_READ: Final = 22
MADV_POPULATE_WRITE: Final = 23
MADV_COLLAPSE: Final = 25

FALLOC_FL_KEEP_SIZE: Final = 0x01
FALLOC_FL_PUNCH_HOLE: Final = 0x02

CAP_SYS_RESOURCE: Final = 24
_CAPABILITY_VERSION: Final = 0x20080522  # the third: two words of capabilities

_AT_EMPTY_PATH: Final = 0x1000
_AT_STATX_DONT_SYNC: Final = 0x4000
_STATX_BASIC_STATS: Final = 0x7FF
_SYS_MSEAL: Final = 462  # the same on every architecture, scripts/syscall.tbl

_SIZE = ctypes.c_size_t
_ADDRESS = ctypes.c_void_p
_INT = ctypes.c_int
_LONG = ctypes.c_long
_OFFSET = ctypes.c_int64
_FAILED: Final = (1 << (8 * ctypes.sizeof(ctypes.c_void_p))) - 1  # MAP_FAILED

SA_SIGINFO: Final = 4
SignalHandler: Final = ctypes.CFUNCTYPE(None, _INT, _ADDRESS, _ADDRESS)
"""A handler that is called with the signal's number, its siginfo_t and its context."""


class SigAction(ctypes.Structure):
    """glibc's struct sigaction; keep it alive for as long as it is in force."""

    _fields_ = (
        ("handler", SignalHandler),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", _INT),
        ("restorer", _ADDRESS),
    )


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.argtypes = (_ADDRESS, _SIZE, _INT, _INT, _INT, _OFFSET)
_libc.mmap.restype = _ADDRESS
_libc.munmap.argtypes = (_ADDRESS, _SIZE)
_libc.mprotect.argtypes = (_ADDRESS, _SIZE, _INT)
_libc.mremap.argtypes = (_ADDRESS, _SIZE, _SIZE, _INT, _ADDRESS)
_libc.mremap.restype = _ADDRESS
_libc.madvise.argtypes = (_ADDRESS, _SIZE, _INT)
_libc.msync.argtypes = (_ADDRESS, _SIZE, _INT)
_libc.fallocate.argtypes = (_INT, _INT, _OFFSET, _OFFSET)
_libc.syncfs.argtypes = (_INT,)
_libc.statx.argtypes = (_INT, ctypes.c_char_p, _INT, ctypes.c_uint, _ADDRESS)
_libc.syscall.restype = _LONG
_held = ctypes.PyDLL(None, use_errno=True)  # its calls keep the interpreter's lock
_held.munmap.argtypes = (_ADDRESS, _SIZE)
_held.send.argtypes = (_INT, ctypes.c_char_p, _SIZE, _INT)
_held.send.restype = ctypes.c_ssize_t


class Stat(NamedTuple):
    """What :func:`statx_nosync` knows of a file without asking its file system."""

    dev: int
    """As os.makedev() makes it; compares equal with ``st_dev``."""
    ino: int
    mode: int
    size: int
    """Bytes; of a FUSE file the kernel's idea of it, which may be old."""
    uid: int
    gid: int
    nlink: int
    blocks: int
    """Units of 512 bytes."""


class _Timestamp(ctypes.Structure):
    _fields_ = (("sec", ctypes.c_int64), ("nsec", ctypes.c_uint32), ("_pad", ctypes.c_int32))


class _Statx(ctypes.Structure):
    # struct statx, include/uapi/linux/stat.h
    _fields_ = (
        ("mask", ctypes.c_uint32),
        ("blksize", ctypes.c_uint32),
        ("attributes", ctypes.c_uint64),
        ("nlink", ctypes.c_uint32),
        ("uid", ctypes.c_uint32),
        ("gid", ctypes.c_uint32),
        ("mode", ctypes.c_uint16),
        ("_pad", ctypes.c_uint16),
        ("ino", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("blocks", ctypes.c_uint64),
        ("attributes_mask", ctypes.c_uint64),
        ("times", _Timestamp * 4),
        ("rdev_major", ctypes.c_uint32),
        ("rdev_minor", ctypes.c_uint32),
        ("dev_major", ctypes.c_uint32),
        ("dev_minor", ctypes.c_uint32),
        ("_rest", ctypes.c_uint64 * 14),
    )


class _CapHeader(ctypes.Structure):
    # struct __user_cap_header_struct, include/uapi/linux/capability.h
    _fields_ = (("version", ctypes.c_uint32), ("pid", _INT))


class _CapData(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


class _Buffer(ctypes.Structure):
    # Py_buffer, Include/cpython/object.h
    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


def _failure() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def _require_zero(result: int) -> None:
    if result != 0:
        raise _failure()


def _require_address(result: int | None) -> int:
    if result == _FAILED:
        raise _failure()
    return result or 0


def mmap(
    address: int, length: int, protection: int, flags: int, fd: int = -1, offset: int = 0
) -> int:
    """Map a file or anonymous memory; return the address.

    ``address`` 0 leaves the choice to the kernel.  With MAP_FIXED what is there goes.
    """
    return _require_address(_libc.mmap(address, length, protection, flags, fd, offset))


def munmap(address: int, length: int) -> None:
    """Unmap a range."""
    _require_zero(_libc.munmap(address, length))


def munmap_held(address: int, length: int) -> None:
    """Unmap a range without letting go of the interpreter's lock.

    For finalizers: a thread that asks for the lock back while the interpreter ends does not get it,
    and Python ends that thread on the spot; one that C++ code started takes the process with it.
    """
    _require_zero(_held.munmap(address, length))


def send_held(fd: int, data: bytes) -> int:
    """Send to a socket what it takes at once, likewise; return how many bytes that was."""
    sent: int = _held.send(fd, data, len(data), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    return max(sent, 0)


def mprotect(address: int, length: int, protection: int) -> None:
    """Set a range's protection."""
    _require_zero(_libc.mprotect(address, length, protection))


def mremap(address: int, length: int, new_length: int, flags: int, new_address: int = 0) -> int:
    """Move or resize a mapping; with MREMAP_FIXED over what is at ``new_address``, atomically."""
    return _require_address(_libc.mremap(address, length, new_length, flags, new_address))


def madvise(address: int, length: int, advice: int) -> None:
    """Advise the kernel about a range."""
    _require_zero(_libc.madvise(address, length, advice))


def try_madvise(address: int, length: int, advice: int) -> bool:
    """Advise the kernel about a range; tell whether it took the advice."""
    try:
        madvise(address, length, advice)
    except OSError:
        return False
    return True


def try_collapse(address: int, length: int) -> bool:
    """Ask for huge pages behind a range; tell whether the kernel made them all."""
    return try_madvise(address, length, MADV_COLLAPSE)


def msync(address: int, length: int) -> None:
    """Write a range of a shared mapping back and wait; ``address`` is page-aligned."""
    _require_zero(_libc.msync(address, length, MS_SYNC))


def mseal(address: int, length: int) -> None:
    """Make a range's mappings final until the process ends; ENOSYS before Linux 6.10."""
    number = ctypes.c_long(_SYS_MSEAL)
    result = _libc.syscall(number, _ADDRESS(address), _SIZE(length), ctypes.c_ulong(0))
    _require_zero(result)


def sigaction(number: int, action: SigAction) -> SigAction:
    """Have a signal handled at once, not where Python does it; return what was in force."""
    old = SigAction()
    _require_zero(_libc.sigaction(_INT(number), ctypes.byref(action), ctypes.byref(old)))
    return old


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Reserve or punch a range of a file."""
    while _libc.fallocate(fd, mode, offset, length) != 0:
        if ctypes.get_errno() != errno.EINTR:
            raise _failure()


def syncfs(fd: int) -> None:
    """Write back all that is dirty in the file system that holds an open file, and wait."""
    _require_zero(_libc.syncfs(fd))


def statx_nosync(fd: int) -> Stat:
    """Return what the kernel has at hand about an open file.

    Never calls into the file system, so a FUSE server may ask about a file of its own mount.
    """
    found = _Statx()
    flags = _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC
    _require_zero(_libc.statx(fd, b"", flags, _STATX_BASIC_STATS, ctypes.byref(found)))
    return Stat(
        dev=os.makedev(found.dev_major, found.dev_minor),
        ino=found.ino,
        mode=found.mode,
        size=found.size,
        uid=found.uid,
        gid=found.gid,
        nlink=found.nlink,
        blocks=found.blocks,
    )


def address_of(buffer: object) -> int:
    """Return the address of a contiguous buffer, read-only or not; keep it alive meanwhile."""
    described = _Buffer()
    api = ctypes.pythonapi
    api.PyObject_GetBuffer(ctypes.py_object(buffer), ctypes.byref(described), _INT(0))
    try:
        return described.buf or 0
    finally:
        api.PyBuffer_Release(ctypes.byref(described))


def set_capability(number: int, effective: bool) -> bool:
    """Take up or lay down a capability, in this thread; tell whether it was in force before.

    One that is laid down stays permitted, so it can be taken up again.  OSError with EPERM: it is
    not permitted.
    """
    header = _CapHeader(_CAPABILITY_VERSION, 0)
    data = (_CapData * 2)()
    _require_zero(_libc.capget(ctypes.byref(header), data))
    word, bit = data[number // 32], 1 << number % 32
    before = bool(word.effective & bit)
    if before != effective:
        word.effective ^= bit
        _require_zero(_libc.capset(ctypes.byref(header), data))
    return before


def copy(target: int, source: int, length: int) -> None:
    """Copy bytes from address to address."""
    ctypes.memmove(target, source, length)


def buffer_at(address: int, length: int, owner: object) -> Any:
    """Return a buffer over a range of addresses; it keeps ``owner`` alive, and so do its views."""
    kind: Any = type("Bytes", (ctypes.c_char * length,), {})
    buffer = kind.from_address(address)
    buffer.owner = owner
    return buffer


assert ctypes.sizeof(_Statx) == 256
assert sys.maxsize > 1 << 32, "vfsmap needs a 64-bit machine"
