"""A window: a file's extents mapped into one range of this process's addresses."""

import errno
import operator
import weakref
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol, Self

from vfsmap.errors import (
    Denied,
    Invalid,
    MediumError,
    Unsupported,
    VfsmapError,
)
from vfsmap.mapping.addresses import out_of_memory, reserve
from vfsmap.mapping.layout import Call, Layout, arrange, levels_of
from vfsmap.mapping.plan import Backing, Plan, Reason, why
from vfsmap.pmem import libc, pages
from vfsmap.pmem.medium import MAP_SHARED_VALIDATE, MAP_SYNC, Commit, Medium
from vfsmap.pmem.pmem import libpmem
from vfsmap.units import PTE, Extent, Level, align_down, format_size

if TYPE_CHECKING:
    import numpy


class Grantor(Protocol):
    """Who has granted a window: the daemon, as the window knows it."""

    def closed(self) -> None:
        """Hear, once, that the range is unmapped."""

    def dropped(self) -> None:
        """Hear the same of a window that was collected and not closed, without waiting."""

    def publish(self) -> None:
        """Have the mount forget what it has cached of the file."""

    def report(self, offset: int, length: int, detail: str) -> None:
        """Hear what was tried at a part of the window."""


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
        private: bool = False,
        level: Level | None = None,
        limit: Level | None = None,
        populate: bool = False,
        sealed: bool = False,
        direct: bool = True,
        grantor: Grantor | None = None,
    ) -> None:
        """Map ``length`` bytes of the file from ``offset`` on.

        ``private`` keeps stores from the file, ``level`` is the smallest entry the caller accepts
        and ``limit`` the largest, ``populate`` maps each page now, ``sealed`` makes a read-only
        window final until the process ends; ``grantor`` is told how the window is used and ends.

        Raises:
            Invalid: a negative offset, a writable window that is sealed or has holes.
            Unsupported: the medium or the kernel can't do it, or not at that level.
            TooManyMappings: the process has reached vm.max_map_count.
            NoMemory: no free huge pages, or no addresses.
            Denied: the descriptor does not allow it.
        """
        if sealed and (writable or private):
            raise Invalid("only a shared, read-only window can be sealed")
        self.extents = tuple(extents)
        self.length = length
        self.medium = medium
        self.writable = writable
        self.private = private
        self.limit = limit
        self.sealed = sealed
        self.direct = direct
        self.closed = True  # until it is whole
        self._exported: weakref.ref[Any] | None = None
        self.grantor = grantor
        self.layout = self._arranged(offset) if length else EMPTY
        self._map(fd, level, populate)
        self.closed = False

    def _arranged(self, offset: int) -> Layout:
        return arrange(
            self.extents,
            offset,
            self.length,
            page_size=self.medium.page_size,
            levels=_allowed(self.medium, self.limit),
            holes=self.private or not self.writable,
        )

    def _map(self, fd: int, level: Level | None, populate: bool) -> None:
        # of what a page cache holds nothing is certain before it is mapped
        certain = self.medium.name != "page cache"
        if level is not None and certain:
            self.plan().require(level)
        self._base = 0
        try:
            if self.length:
                self._place(fd)
            if populate or (level is not None and not certain):
                self._populate()
                self._require(level)
            if self.sealed and self.length:
                self._seal()
        except OSError as exc:
            error = self._translated(exc)  # counts mappings, so it comes before they go
            self._unmap()
            raise error from exc
        except BaseException:
            self._unmap()
            raise

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
            # a view keeps the window, so that its addresses stay mapped
            exporter = libc.buffer_at(self.address, self.length, self)
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
        if not kind.itemsize or kind.hasobject:
            raise Invalid(f"items of {kind} have no bytes of their own in a window")
        if shape is None:
            count = self.length // kind.itemsize
            shape = (count,)
        else:
            shape = (operator.index(shape),) if not isinstance(shape, tuple | list) else shape
            count = int(numpy.prod(shape, dtype=object))
        if min(shape, default=0) < 0 or count * kind.itemsize > self.length:
            raise Invalid(f"{count} items of {kind.itemsize} bytes exceed {self.length} bytes")
        return numpy.frombuffer(self.view(), kind, count).reshape(shape)

    def plan(self, backing: Iterable[Backing] = ()) -> Plan:
        """Return what its page table should be, by what was measured, else by policy."""
        return Plan(
            self.layout, self.medium, private=self.private, limit=self.limit, backing=backing
        )

    def backing(self) -> list[Backing]:
        """Return how the medium is held, as the kernel's entries show it where it was touched.

        A range that this window can't map by large entries shows nothing of the medium: the plan
        knows those itself.
        """
        self._require_open()
        base, length = self.mapped
        levels = {level.size: level for level in (PTE, *levels_of(self.medium))}
        runs = pages.runs(base, length)
        held: list[Backing] = []
        for call in self.layout.calls:
            first, last = base + call.at, base + call.at + call.length
            for run in runs:
                start, end = max(run.start, first), min(run.start + run.length, last)
                if call.start is not None and start < end:
                    place = call.start + start - first
                    held.append(Backing(place, end - start, levels[run.entry_size]))
        return sorted(held)

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
        if not self.writable or self.private:
            kind = "private" if self.private else "read-only"
            raise Invalid(f"the window is {kind}: there is nothing to persist")
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

    def publish(self) -> None:
        """Persist the whole window, and have the mount show it to those who opened the file before.

        Raises:
            Invalid: the window is read-only.
            MediumError: the medium could not be written.
            DaemonUnreachable: the daemon that granted the window has gone away.

        Crash: as :meth:`persist`.
        """
        self.persist(0, self.length)
        if self.grantor is not None:
            self.grantor.publish()

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
            if self.grantor is not None:
                self.grantor.closed()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a window can't be copied or pickled: it is addresses; map the file again")

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
        # in any thread, perhaps of somebody's C++ code while the interpreter ends: nothing waits
        if getattr(self, "closed", True) or self.sealed:
            return
        self.closed = True
        if self.layout.length:
            libc.munmap_held(*self.mapped)
        if self.grantor is not None:
            self.grantor.dropped()

    def _require_open(self) -> None:
        if self.closed:
            raise Invalid("the window is closed")

    def _place(self, fd: int) -> None:
        calls, level, residue = self.layout.calls, self.layout.level, self.layout.residue
        if len(calls) == 1 and calls[0].start is not None:
            # where huge entries fit the kernel chooses such addresses by itself, mostly
            base = self._mmap(0, calls[0], fd)
            if (base - residue) % level.size == 0:
                self._base = base
                self._advise(base, calls[0].length)
                return
            libc.munmap(base, calls[0].length)
        self._base = reserve(self.layout)
        for call in calls:
            address = self._mmap(self._base + call.at, call, fd, libc.MAP_FIXED)
            if call.start is not None:
                self._advise(address, call.length)

    def _mmap(self, address: int, call: Call, fd: int, fixed: int = 0) -> int:
        protection = libc.PROT_READ | (libc.PROT_WRITE if self.writable else 0)
        if call.start is None:
            flags = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS | libc.MAP_NORESERVE
            return libc.mmap(address, call.length, protection, flags | fixed)
        return libc.mmap(address, call.length, protection, self._flags() | fixed, fd, call.start)

    def _flags(self) -> int:
        if self.private:
            # without stores no copies, so huge pages need not be set aside for them
            return libc.MAP_PRIVATE | (0 if self.writable else libc.MAP_NORESERVE)
        return MAP_SHARED_VALIDATE | MAP_SYNC if self.medium.name == "dax" else libc.MAP_SHARED

    def _advise(self, address: int, length: int) -> None:
        if self.limit == PTE and self.medium.page_size == PTE.size:
            libc.madvise(address, length, libc.MADV_NOHUGEPAGE)
        elif self.medium.name == "page cache":
            # ext4 and xfs then read whole units into the cache; refused by a kernel without THP
            libc.try_madvise(address, length, libc.MADV_HUGEPAGE)

    def _populate(self) -> None:
        if self.layout.length:
            # storing to each page would make all of a page-cache file dirty, or copy it all
            keep = self.private or self.medium.commit is Commit.SYNC
            store = self.writable and not keep
            advice = libc.MADV_POPULATE_WRITE if store else libc.MADV_POPULATE_READ
            libc.madvise(*self.mapped, advice)

    def _require(self, level: Level | None) -> None:
        """Check what the kernel made of it, once each page is mapped."""
        if level is None:
            return
        found = pages.page_sizes(*self.mapped)
        small = sum(size for entry, size in found.items() if entry < level.size)
        if small:
            cached = self.medium.name == "page cache"
            cause = why(Reason.CACHE if cached else Reason.SPLIT, self.medium)
            raise Unsupported(f"{format_size(small)} are not mapped by {level}: {cause}")

    def _seal(self) -> None:
        try:
            libc.mseal(*self.mapped)
        except OSError as exc:
            if exc.errno == errno.ENOSYS:
                raise OSError(errno.EOPNOTSUPP, "mseal(2) needs Linux 6.10") from exc
            raise

    def _unmap(self) -> None:
        if self._base:
            libc.munmap(*self.mapped)

    def _translated(self, exc: OSError) -> VfsmapError:
        what = f"can't map {format_size(self.layout.length)}"
        match exc.errno:
            case errno.ENOMEM:
                return out_of_memory(what, len(self.layout.calls), self.medium)
            case errno.EACCES | errno.EPERM:
                return Denied(f"{what}: the descriptor does not allow it ({exc.strerror})")
            case errno.ENODEV | errno.EOPNOTSUPP | errno.EINVAL:
                return Unsupported(f"{what}: {exc.strerror}")
            case _:
                return MediumError(f"{what}: {exc.strerror}")


EMPTY: Final = Layout((), 0, 0, PTE, 0)


@cache
def _allowed(medium: Medium, limit: Level | None) -> tuple[Level, ...]:
    levels = levels_of(medium)
    allowed = tuple(v for v in levels if limit is None or v.size <= limit.size)
    if not allowed:
        raise Unsupported(
            f"{medium.name} maps whole pages of {format_size(medium.page_size)}, none of {limit}"
        )
    return allowed
