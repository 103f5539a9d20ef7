"""A window: a file's extents mapped into one range of this process's addresses."""

import ctypes
import errno
import operator
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from vfsmap.errors import (
    Denied,
    Invalid,
    MediumError,
    NoMemory,
    TooManyMappings,
    Unsupported,
    VfsmapError,
)
from vfsmap.mapping.layout import Call, Layout, arrange
from vfsmap.pmem import libc, pages
from vfsmap.pmem.medium import MAP_SHARED_VALIDATE, MAP_SYNC, Commit, Medium
from vfsmap.pmem.pmem import libpmem
from vfsmap.units import LEVELS, PMD, PTE, Extent, Level, align_down, format_size

if TYPE_CHECKING:
    import numpy

_MAX_MAP_COUNT: Final = Path("/proc/sys/vm/max_map_count")


def levels_of(medium: Medium) -> tuple[Level, ...]:
    """Return the levels whose entries can map the medium."""
    match medium.name:
        case "hugetlbfs":
            return (Level(format_size(medium.page_size), medium.page_size.bit_length() - 1),)
        case "tmpfs" | "page cache":
            return PTE, PMD
        case _:
            return tuple(level for level in LEVELS if level.size >= medium.page_size)


class Window:
    """Bytes of a file, mapped.

    ``fd`` is open on the pool (``direct``) or on the file itself; the window uses it only here and
    leaves it open.  ``extents`` tell where the file's bytes lie in ``fd``, ascending; they may
    reach beyond the request, and holes of a read-only window show zeros.  Addresses are chosen so
    that the largest entries fit, and the mapping grows outwards to whole entries within the
    extents given (to whole pages of the medium in any case); :meth:`view` shows exactly what was
    asked for.

    Leaving the ``with`` block closes the window; a window that nobody refers to any more, by
    itself or by its views, is unmapped with the last of them.
    """

    def __init__(
        self,
        fd: int,
        extents: Iterable[Extent],
        length: int,
        medium: Medium,
        *,
        offset: int = 0,
        writable: bool = False,
        populate: bool = False,
        sealed: bool = False,
        direct: bool = True,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        """Map ``length`` bytes of the file from ``offset`` on.

        ``populate`` maps each page now; ``sealed`` makes a read-only window final until the
        process ends; ``on_close`` is called once, after the range is unmapped.

        Raises:
            Invalid: a negative offset, a writable window that is sealed or has holes.
            Unsupported: the medium or the kernel can't do it.
            TooManyMappings: the process has reached vm.max_map_count.
            NoMemory: no free huge pages, or no addresses.
            Denied: the descriptor does not allow it.
        """
        if sealed and writable:
            raise Invalid("only a read-only window can be sealed")
        self.length = length
        self.medium = medium
        self.writable = writable
        self.sealed = sealed
        self.direct = direct
        self.closed = True  # until it is whole
        self.layout = EMPTY
        if length != 0:
            self.layout = arrange(
                extents,
                offset,
                length,
                page_size=medium.page_size,
                levels=levels_of(medium),
                holes=not writable,
            )
        self._exported: weakref.ref[Any] | None = None
        self._base = _reserve(self.layout) if length else 0
        try:
            self._fill(fd, populate)
            if sealed and length:
                self._seal()
        except OSError as exc:
            error = self._translated(exc)  # counts mappings, so it comes before they go
            self._unmap()
            raise error from exc
        self._on_close = on_close
        self.closed = False

    @property
    def address(self) -> int:
        """Where the first byte asked for is."""
        return self._base + self.layout.skip

    @property
    def mapped(self) -> tuple[int, int]:
        """Return the address and the length of all that is mapped, whole entries included."""
        return self._base, self.layout.length

    def view(self) -> memoryview:
        """Return the window's bytes; read-only unless the window is writable."""
        self._require_open()
        if self.length == 0:
            return memoryview(bytearray() if self.writable else b"")
        exporter: Any = self._exported() if self._exported is not None else None
        if exporter is None:
            kind: Any = type("WindowBytes", (ctypes.c_char * self.length,), {})
            exporter = kind.from_address(self.address)
            exporter.window = self  # a view keeps the window, so that its addresses stay mapped
            self._exported = weakref.ref(exporter)
        view = memoryview(exporter).cast("B")
        return view if self.writable else view.toreadonly()

    def array(self, dtype: Any = "uint8", shape: Any = None) -> "numpy.ndarray[Any, Any]":
        """Return the window as a numpy array without copying; by default as one dimension.

        Raises:
            Unsupported: numpy is not installed.
            Invalid: the items, or the shape, are larger than the window.
        """
        try:
            import numpy
        except ImportError as exc:
            raise Unsupported("array() needs numpy; install vfsmap[numpy]") from exc
        kind = numpy.dtype(dtype)
        if shape is None:
            count = self.length // kind.itemsize
            shape = (count,)
        else:
            shape = (operator.index(shape),) if not isinstance(shape, tuple | list) else shape
            count = int(numpy.prod(shape, dtype=object))
        if count < 0 or count * kind.itemsize > self.length:
            raise Invalid(f"{count} items of {kind.itemsize} bytes exceed {self.length} bytes")
        return numpy.frombuffer(self.view(), kind, count).reshape(shape)

    def page_sizes(self) -> dict[int, int]:
        """Return the bytes mapped by entries of each size, as the kernel sees them now.

        What was never touched is not mapped yet; ``populate`` touches it all.
        """
        self._require_open()
        return pages.page_sizes(*self.mapped)

    def persist(self, offset: int, length: int) -> None:
        """Make stores to a part of the window as durable as the medium promises.

        Raises:
            Invalid: the part is outside, or the window is read-only.
            MediumError: the medium could not be written.

        Crash: each cache line (on a page-cache medium: each page) is old or new.
        """
        self._require_open()
        if not self.writable:
            raise Invalid("the window is read-only: there is nothing to persist")
        if offset < 0 or length < 0 or offset + length > self.length:
            raise Invalid(f"{length} bytes at {offset} exceed the window's {self.length} bytes")
        if length == 0 or self.medium.commit is Commit.STORE:
            return
        address = self.address + offset
        flusher = libpmem() if self.medium.commit is Commit.FLUSH else None
        if flusher is not None:
            flusher.pmem_flush(address, length)
            flusher.pmem_drain()
            return
        start = align_down(address, PTE.size)
        try:
            libc.msync(start, address + length - start)
        except OSError as exc:
            raise MediumError(f"can't write the window back: {exc.strerror}") from exc

    def close(self) -> None:
        """Unmap the window; a sealed one stays mapped, and its lease lasts, until the process ends.

        Raises:
            BufferError: views or arrays of it are still in use.
        """
        if self.closed:
            return
        if self._exported is not None and self._exported() is not None:
            raise BufferError("views of the window are still in use; release them first")
        self.closed = True
        if not self.sealed:
            self._unmap()
            if self._on_close is not None:
                self._on_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            self.close()
        except BufferError:
            # an error's traceback holds the block's views: it matters more than they do, and the
            # last view unmaps the window
            if error is None:
                raise

    def __del__(self) -> None:
        if not getattr(self, "closed", True):
            self._exported = None  # whoever held a view would have kept the window
            self.close()

    def _require_open(self) -> None:
        if self.closed:
            raise Invalid("the window is closed")

    def _fill(self, fd: int, populate: bool) -> None:
        for call in self.layout.calls:
            self._map(fd, call)
        if populate and self.layout.length:
            # storing to each page would make all of a page-cache file dirty
            store = self.writable and self.medium.commit is not Commit.SYNC
            advice = libc.MADV_POPULATE_WRITE if store else libc.MADV_POPULATE_READ
            libc.madvise(*self.mapped, advice)

    def _map(self, fd: int, call: Call) -> None:
        protection = libc.PROT_READ | (libc.PROT_WRITE if self.writable else 0)
        flags = libc.MAP_FIXED
        if call.start is None:
            flags |= libc.MAP_PRIVATE | libc.MAP_ANONYMOUS | libc.MAP_NORESERVE
            libc.mmap(self._base + call.at, call.length, libc.PROT_READ, flags)
            return
        flags |= MAP_SHARED_VALIDATE | MAP_SYNC if self.medium.name == "dax" else libc.MAP_SHARED
        libc.mmap(self._base + call.at, call.length, protection, flags, fd, call.start)

    def _seal(self) -> None:
        try:
            libc.mseal(*self.mapped)
        except OSError as exc:
            if exc.errno == errno.ENOSYS:
                raise OSError(errno.EOPNOTSUPP, "mseal(2) needs Linux 6.10") from exc
            raise

    def _unmap(self) -> None:
        if self.layout.length:
            libc.munmap(*self.mapped)

    def _translated(self, exc: OSError) -> VfsmapError:
        what = f"can't map {format_size(self.layout.length)}"
        match exc.errno:
            case errno.ENOMEM:
                return _out_of_memory(what, len(self.layout.calls), self.medium)
            case errno.EACCES | errno.EPERM:
                return Denied(f"{what}: the descriptor does not allow it ({exc.strerror})")
            case errno.ENODEV | errno.EOPNOTSUPP | errno.EINVAL:
                return Unsupported(f"{what}: {exc.strerror}")
            case _:
                return MediumError(f"{what}: {exc.strerror}")


EMPTY: Final = Layout((), 0, 0, PTE, 0)


def _reserve(layout: Layout) -> int:
    """Take addresses of the layout's length and alignment out of use; return the first."""
    align = layout.level.size
    flags = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS | libc.MAP_NORESERVE
    try:
        found = libc.mmap(0, layout.length + align, libc.PROT_NONE, flags)
    except OSError as exc:
        raise _out_of_memory(f"can't reserve {format_size(layout.length)}", 1, None) from exc
    base = found + (layout.residue - found) % align
    end = base + layout.length
    if base > found:
        libc.munmap(found, base - found)
    if end < found + layout.length + align:
        libc.munmap(end, found + layout.length + align - end)
    return base


def _out_of_memory(what: str, calls: int, medium: Medium | None) -> NoMemory:
    """Tell which of the three things the kernel calls ENOMEM it was."""
    limit = int(_MAX_MAP_COUNT.read_text())
    with Path("/proc/self/maps").open() as lines:
        count = sum(1 for _ in lines)
    if count + 2 >= limit:
        return TooManyMappings(
            f"{what} in {calls} pieces: the process has {count} mappings and vm.max_map_count is "
            f"{limit}; raise it with sysctl, or map less at a time"
        )
    if medium and medium.name == "hugetlbfs":
        size = format_size(medium.page_size)
        return NoMemory(f"{what}: too few free huge pages of {size}; raise nr_hugepages")
    return NoMemory(f"{what}: no memory or addresses; look at ulimit -v and vm.overcommit_memory")
