"""A pool's bytes: opened, mapped, stored to, made durable, reserved and given back."""

import ctypes
import errno
import mmap
import os
from functools import cache
from pathlib import Path
from typing import Final, Protocol, Self

from vfsmap.errors import Exists, Invalid, MediumError, NoSpace, Unsupported
from vfsmap.pmem import libc
from vfsmap.pmem.files import (
    lock,
    open_file,
    persist_name,
    require_no_directory,
    require_promise,
    set_size,
    translated,
)
from vfsmap.pmem.medium import (
    MAP_SHARED_VALIDATE,
    MAP_SYNC,
    Commit,
    Medium,
    Promise,
    detect,
    size_of,
)
from vfsmap.units import KIB, MIB, align_down, align_up, format_size

_PAGE = 4 * KIB
_HUGEPAGES = Path("/sys/kernel/mm/hugepages")
_ZEROS = bytes(2 * MIB)
_EMPTY = "{0} is empty, and no pool; make one with: vfsmap format {0} --size 8G --force"


class Flusher(Protocol):
    """The part of libpmem that a DAX medium needs."""

    def pmem_flush(self, address: int, length: int) -> None:
        """Start writing the CPU's cached lines back."""

    def pmem_drain(self) -> None:
        """Wait until what was started is durable."""


class Library(Flusher, Protocol):
    """The part of libpmem that is used."""

    def pmem_memcpy(self, target: int, source: int, length: int, flags: int) -> None:
        """Copy, as the flags say, and wait until it is durable."""


_NONTEMPORAL: Final = 1 << 1  # PMEM_F_MEM_NONTEMPORAL of libpmem.h
STREAMED: Final = 128 * KIB
"""From this length on, stores pass the CPU's caches by, where libpmem is installed.

So what is overwritten is not read first.  On an EPYC, copies of 1 MiB over a large map took half as
long, of 256 KiB two thirds, of 64 KiB nine tenths of what they take through the caches.
"""


@cache
def libpmem() -> Library | None:
    """Return libpmem, or None where it is not installed (msync(2) serves then)."""
    try:
        library = ctypes.CDLL("libpmem.so.1")
    except OSError:
        return None
    library.pmem_flush.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    library.pmem_flush.restype = None
    library.pmem_drain.argtypes = ()
    library.pmem_drain.restype = None
    library.pmem_memcpy.argtypes = (
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_uint,
    )
    library.pmem_memcpy.restype = None
    return library


class Pmem:
    """An open medium, mapped whole.

    Stores go through :meth:`store`, so that a test can put a recording medium in this class's
    place; loads read :attr:`view`, which is writable only for those who know what they do (the
    windows of other processes are).
    """

    _unsynced = False
    """Whether the file system below has to be told to remember what was reserved and punched."""

    def __init__(
        self, fd: int, path: Path, *, writable: bool, medium: Medium | None = None
    ) -> None:
        """Map the open file; takes ``fd`` over."""
        self.fd = fd
        self.path = path
        self.writable = writable
        self.medium = medium or detect(fd)
        self.size = size_of(fd)
        self._map = self._map_all()
        self.view = memoryview(self._map)
        self._written = writable and self.medium.commit is Commit.SYNC
        stored = writable and not self._written
        self._library = libpmem() if stored else None
        self._flusher: Flusher | None = (
            self._library if self.medium.commit is Commit.FLUSH else None
        )
        self._address = libc.address_of(self._map) if self._library else 0

    @classmethod
    def open(
        cls, path: str | Path, *, writable: bool, promise: Promise | str | None = None
    ) -> Self:
        """Open and map an existing file; a writer locks out other writers.

        Args:
            path: a regular file, or a DAX device.
            writable: open it for writing too.
            promise: what the medium must keep, ``process`` or ``power``.

        Raises:
            NotFound: there is no such file.
            Denied: its permissions forbid it.
            PoolInUse: another process has it open for writing.
            Invalid: it is empty.
            Unsupported: it is not a kind of file that can hold a pool, or its medium does not keep
                the promise.
        """
        path = Path(path)
        fd = open_file(path, os.O_RDWR if writable else os.O_RDONLY)
        try:
            medium = detect(fd)
            require_promise(medium, promise, path)
            if medium.name == "hugetlbfs" and os.fstat(fd).st_blocks == 0:
                # reading a page that is not there would take one, or raise SIGBUS
                raise Invalid(_EMPTY.format(path))
            if writable:
                lock(fd, path)
            return cls(fd, path, writable=writable, medium=medium)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def create(
        cls,
        path: str | Path,
        size: int,
        *,
        replace: bool = False,
        promise: Promise | str | None = None,
    ) -> Self:
        """Create a file of ``size`` bytes, or take a DAX device or an existing file over.

        Raises:
            Exists: the file exists, and ``replace`` is not given.
            Invalid: the size does not suit the medium.
            PoolInUse: another process has it open for writing.
            NoSpace: the file system below can't hold a file of that size.
            Unsupported: it is not a kind of file that can hold a pool, or its medium does not keep
                the promise.

        Crash: an empty or a sparse file, which no pool can be opened from.
        """
        path = Path(path)
        require_no_directory(path)
        existed = os.path.exists(path)  # Path's own raises for names that can't be
        device = existed and path.is_char_device()
        flags = os.O_RDWR if device else os.O_RDWR | os.O_CREAT | (0 if replace else os.O_EXCL)
        if existed and not device and not replace:
            raise Exists(f"{path} exists; to destroy what it holds, use --force (replace=True)")
        fd = open_file(path, flags)
        try:
            medium = detect(fd)
            lock(fd, path)
            require_promise(medium, promise, path)
            if not device:
                if size % medium.page_size:
                    raise Invalid(
                        f"size {format_size(size)} is not a multiple of the medium's page size, "
                        f"{format_size(medium.page_size)}"
                    )
                set_size(fd, path, size, os.fstat(fd).st_size)
                if not existed and medium.promise is Promise.POWER:
                    persist_name(path)
            return cls(fd, path, writable=True)
        except BaseException:
            os.close(fd)
            if not existed and not device:
                path.unlink(missing_ok=True)
            raise

    def _map_all(self) -> mmap.mmap:
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if self.writable else 0)
        flags = mmap.MAP_SHARED
        if self.medium.name == "dax":
            flags = MAP_SHARED_VALIDATE | MAP_SYNC
        elif self.medium.name == "hugetlbfs":
            flags |= libc.MAP_NORESERVE  # fallocate does that, for what is in use
        if self.size == 0:
            raise Invalid(_EMPTY.format(self.path))
        try:
            return mmap.mmap(self.fd, self.size, flags, protection)
        except OSError as exc:
            raise translated(exc, f"can't map {self.path}") from exc

    def read(self, offset: int, length: int) -> bytes:
        """Return a copy of a range; it is shorter where the file ends.

        Where the file has a hole this reads zeros; looking at :attr:`view` would take a page there,
        or raise SIGBUS when the file system below has none.

        Raises:
            MediumError: the medium can't be read.
        """
        if not self.medium.can_punch:  # a device, which can only be mapped
            return bytes(self.view[offset : offset + length])
        try:
            return os.pread(self.fd, length, offset)
        except OSError as exc:
            raise MediumError(f"can't read {self.path}: {exc.strerror}") from exc

    def store(self, offset: int, data: bytes | memoryview | bytearray) -> None:
        """Copy ``data`` to ``offset``.

        Raises:
            NoSpace, MediumError: the file system below refused.

        Crash: any mix of old and new words of the range.
        """
        if self._written:
            self._write(offset, data)
        elif len(data) < STREAMED or self._library is None:
            self.view[offset : offset + len(data)] = data
        else:
            self._stream(self._library, offset, data)

    def _stream(self, library: Library, offset: int, data: bytes | memoryview | bytearray) -> None:
        length = len(data)
        if not 0 <= offset <= offset + length <= self.size:
            raise ValueError(f"{length} bytes at {offset:#x} exceed the medium's {self.size:#x}")
        library.pmem_drain()  # such stores may overtake earlier ones, and these must not
        library.pmem_memcpy(self._address + offset, libc.address_of(data), length, _NONTEMPORAL)

    def _write(self, offset: int, data: bytes | memoryview | bytearray) -> None:
        # On a full disk ext4 refuses page faults even of blocks that it has set aside, which is a
        # bus error; write(2) finds room there, or says that there is none.
        rest = memoryview(data)
        try:
            while rest:
                written = os.pwrite(self.fd, rest, offset)
                offset += written
                rest = rest[written:]
        except OSError as exc:
            raise translated(exc, f"can't write to {self.path}") from exc

    def zero(self, offset: int, length: int) -> None:
        """Store zeros; for ranges smaller than the medium's page, or that must stay in place.

        Crash: any mix of old words and zeros.
        """
        while length > 0:
            piece = min(length, len(_ZEROS))
            self.store(offset, _ZEROS if piece == len(_ZEROS) else _ZEROS[:piece])
            offset += piece
            length -= piece

    def flush(self, offset: int, length: int) -> None:
        """Start making a range durable where that takes the CPU; else nothing.

        Crash: each cache line of the range is old or new.
        """
        if self._flusher is not None:
            self._flusher.pmem_flush(self._address + offset, length)
        elif self.medium.commit is Commit.FLUSH:
            self._msync(offset, length)

    def fence(self) -> None:
        """Wait for the flushes; what was flushed before is durable before anything stored after.

        So is what was reserved and punched: that lies with the file system below, which the CPU's
        flushes do not reach.

        Raises:
            MediumError: the medium refused.
        """
        if self._unsynced:
            self._fdatasync()
            self._unsynced = False
        if self._flusher is not None:
            self._flusher.pmem_drain()

    def persist(self, offset: int, length: int) -> None:
        """Make a range as durable as the medium promises, and wait for it.

        Raises:
            MediumError: the medium refused; nothing may be believed durable since the last call.

        Crash: each cache line (on a page-cache medium: each page) of the range is old or new.
        """
        if self.medium.commit is Commit.SYNC:
            self._msync(offset, length)
        else:
            self.flush(offset, length)
            self.fence()

    def sync(self) -> None:
        """Make everything stored so far durable on a page-cache medium.

        Elsewhere nothing waits for this: a store needs no more, or :meth:`flush` and :meth:`fence`.

        Raises:
            MediumError: the medium refused.

        Crash: any page stored since the last call is old or new.
        """
        if self.medium.commit is Commit.SYNC:
            self._fdatasync()

    def reserve(self, offset: int, length: int) -> None:
        """Make sure that storing to the range will find room; contents stay.

        Raises:
            NoSpace: the file system below, or the pool of huge pages, is exhausted.

        Crash: parts of the range are reserved.
        """
        if self.medium.can_punch:
            start, end = self._granules(offset, length)
            self._change_blocks(0, start, end - start)

    def punch(self, offset: int, length: int) -> bool:
        """Give a range back to the file system below; it reads as zeros then.

        Returns False, and does nothing, where the medium's pages are larger than the range.

        Crash: each of the medium's pages is old or zero.
        """
        if not self.medium.can_punch or (offset | length) % self.medium.page_size:
            return False
        mode = libc.FALLOC_FL_PUNCH_HOLE | libc.FALLOC_FL_KEEP_SIZE
        self._change_blocks(mode, offset, length)
        return True

    def collapse(self, offset: int, length: int) -> None:
        """Have huge pages behind a reserved range of a tmpfs.

        Its policy may not give them by itself, and even "always" gives small ones when no huge page
        is free at that moment; this call makes room, or the range stays small.
        """
        if self.medium.name == "tmpfs":
            address = libc.address_of(self._map) + offset
            # A huge page that fallocate has made, and nobody has touched, is not up to date yet.
            # Collapsed as it is, Linux 6.18 maps it and clears it later, stores and all.
            if libc.try_madvise(address, length, libc.MADV_POPULATE_WRITE):
                libc.try_collapse(address, length)

    def room(self) -> int | None:
        """Return how many bytes of the file can be backed, those that are included.

        None where there is no limit that could be asked for.
        """
        if not self.medium.can_punch:
            return None
        backed = os.fstat(self.fd).st_blocks * 512
        below = os.fstatvfs(self.fd)
        free = below.f_bavail * below.f_frsize
        if self.medium.name == "hugetlbfs":
            page = self.medium.page_size
            counts = _HUGEPAGES / f"hugepages-{page // KIB}kB"
            pages = int((counts / "free_hugepages").read_text())
            pages -= int((counts / "resv_hugepages").read_text())
            used = (below.f_blocks - below.f_bfree) * below.f_frsize or backed
            unreserved = pages * page + max(0, self.medium.kept - used)
            return backed + (min(free, unreserved) if below.f_blocks else unreserved)
        return backed + free if below.f_blocks else None

    def resize(self, size: int) -> None:
        """Make the file longer and map it again; no view of the old mapping may be in use.

        Raises:
            Unsupported: a device has the size it has.
            NoSpace: the file system below can't hold a file of that size.
            BufferError: somebody holds a view of the medium.
            MediumError: the file system below can't make the new size durable.

        Crash: the file has the old or the new size; a pool does not use the new part yet, and when
            it does, that size is durable.
        """
        if not self.medium.can_punch:
            raise Unsupported(f"{self.path} is a device: its size can't be changed")
        self._lengthen(size)
        if self.medium.commit is not Commit.STORE:
            self._fdatasync()

    def _lengthen(self, size: int) -> None:
        old = self.size
        self._unmap()
        try:
            self._remap(size)
        except BaseException:
            self._remap(old)
            raise

    def _remap(self, size: int) -> None:
        set_size(self.fd, self.path, size)
        self.size = size
        self._map = self._map_all()
        self.view = memoryview(self._map)
        self._address = libc.address_of(self._map) if self._library else 0

    def close(self) -> None:
        """Unmap and close; the lock goes with it.

        Raises:
            BufferError: somebody still holds a view of the medium.
        """
        if self.fd >= 0:
            self._unmap()
            os.close(self.fd)
            self.fd = -1

    def _unmap(self) -> None:
        self.view.release()
        try:
            self._map.close()
        except BufferError:
            self.view = memoryview(self._map)
            raise

    def _granules(self, offset: int, length: int) -> tuple[int, int]:
        page = self.medium.page_size
        return align_down(offset, page), min(align_up(offset + length, page), self.size)

    def _change_blocks(self, mode: int, offset: int, length: int) -> None:
        self._fallocate(mode, offset, length)
        self._unsynced = self.medium.commit is Commit.FLUSH

    def _fallocate(self, mode: int, offset: int, length: int) -> None:
        try:
            libc.fallocate(self.fd, mode, offset, length)
        except OSError as exc:
            what = f"{self.path}: can't reserve {format_size(length)}"
            if mode:
                what = f"{self.path}: can't give {format_size(length)} back"
            elif self.medium.name == "hugetlbfs" and exc.errno == errno.ENOSPC:
                page = self.medium.page_size
                count = _HUGEPAGES / f"hugepages-{page // KIB}kB" / "nr_hugepages"
                raise NoSpace(
                    f"{what} of free huge pages of {format_size(page)}; have more: {count}"
                ) from exc
            raise translated(exc, what) from exc

    def _fdatasync(self) -> None:
        try:
            os.fdatasync(self.fd)
        except OSError as exc:
            raise MediumError(f"can't write {self.path} back: {exc.strerror}") from exc

    def _msync(self, offset: int, length: int) -> None:
        start = align_down(offset, _PAGE)
        try:
            self._map.flush(start, min(align_up(offset + length, _PAGE), self.size) - start)
        except OSError as exc:
            raise MediumError(f"can't write {self.path} back: {exc.strerror}") from exc
