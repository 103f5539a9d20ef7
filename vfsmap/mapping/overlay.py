"""Private windows: stores stay in this process, and the caller says how much each one copies.

The kernel copies 4 KiB at the first plain store to a private page of tmpfs or of the page cache,
and a whole page of hugetlbfs.  :meth:`PrivateWindow.own` and :meth:`PrivateWindow.write` copy
blocks of the size that was asked for instead: an anonymous block is filled beside the window and
put over it by one mremap(2), which the kernel does under the lock that page faults wait for.  So
another thread sees the old bytes or the new ones.
"""

from collections.abc import Iterable, Iterator
from typing import Final

from vfsmap.errors import Invalid, Unsupported
from vfsmap.mapping.addresses import out_of_memory
from vfsmap.mapping.window import Grantor, Window
from vfsmap.pmem import libc
from vfsmap.pmem.medium import Medium
from vfsmap.units import MIB, PTE, Extent, Level, align_down, align_up, format_size

_MAX_COPY: Final = 64 * MIB  # of one mremap: bounds what is held twice


class PrivateWindow(Window):
    """A window whose changes nobody else sees and nothing keeps.

    ``cow`` is the size of the blocks that :meth:`own` and :meth:`write` copy.  With ``stores``
    the view is writable as well, and plain stores copy what the kernel copies; without, only
    those two change the window, and a stray store dies as in any read window.
    """

    def __init__(
        self,
        fd: int,
        extents: Iterable[Extent],
        length: int,
        medium: Medium,
        *,
        cow: Level = PTE,
        stores: bool = True,
        offset: int = 0,
        level: Level | None = None,
        populate: bool = False,
        direct: bool = True,
        grantor: Grantor | None = None,
    ) -> None:
        """Map ``length`` bytes of the file from ``offset`` on, for this process alone.

        Raises:
            Unsupported: the medium's pages are larger than a block; and as :class:`Window`.
            NoMemory: hugetlbfs has no free pages for the copies that ``stores`` may need.
        """
        if cow.size < medium.page_size:
            raise Unsupported(
                f"{medium.name} here has pages of {format_size(medium.page_size)}, and nothing "
                f"smaller can be laid over one: a block of {format_size(cow.size)} is too small"
            )
        super().__init__(
            fd,
            extents,
            length,
            medium,
            offset=offset,
            writable=stores,
            private=True,
            level=level,
            populate=populate,
            direct=direct,
            grantor=grantor,
        )
        self.cow = cow
        self._owned: set[int] = set()  # addresses of blocks that were laid over the window

    def own(self, offset: int, length: int) -> int:
        """Copy the blocks that hold a part of the window, now; return the bytes copied.

        Blocks that this window owns already are left alone.  A plain store that another thread
        makes to a block while it is copied may be lost.

        Raises:
            Invalid: the part is outside the window.
            NoMemory: there is no memory, or the process has too many mappings.
        """
        self._require_part(offset, length)
        copied = 0
        for start, end in self._blocks(offset, length, owned=False):
            self._lay_over(start, end, offset, b"")
            copied += end - start
        return copied

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> int:
        """Change bytes of the window; return the bytes copied for it.

        Another thread sees each block change at once, except in blocks that plain stores may
        change and that this window owns already: there it sees it byte by byte.

        Raises:
            Invalid: the part is outside the window.
            NoMemory: there is no memory, or the process has too many mappings.
        """
        data = memoryview(data).cast("B")
        self._require_part(offset, len(data))
        copied = 0
        for start, end in self._blocks(offset, len(data), owned=not self.writable):
            self._lay_over(start, end, offset, data)
            copied += end - start
        if self.writable and len(data):
            # what was laid over holds the bytes already; the rest was owned before
            libc.copy(self.address + offset, libc.address_of(data), len(data))
        return copied

    def owned(self) -> int:
        """Return the bytes of the window that blocks of its own lie over."""
        low, high = self._ends()
        return sum(min(b + self.cow.size, high) - max(b, low) for b in self._owned)

    def _ends(self) -> tuple[int, int]:
        base, length = self.mapped
        return base, base + length

    def _require_part(self, offset: int, length: int) -> None:
        self._require_open()
        if offset < 0 or length < 0 or offset + length > self.length:
            raise Invalid(f"{length} bytes at {offset} exceed the window's {self.length} bytes")

    def _blocks(self, offset: int, length: int, *, owned: bool) -> Iterator[tuple[int, int]]:
        """Yield the address ranges of neighbouring blocks to copy; with ``owned`` again those."""
        if length == 0:
            return
        low, high = self._ends()
        size = self.cow.size
        start = align_down(self.address + offset, size)
        last = align_up(self.address + offset + length, size)
        for block in range(start, last + size, size):
            stop = block == last or (block in self._owned and not owned)
            if stop or block - start >= _MAX_COPY:
                if start < block:
                    yield max(start, low), min(block, high)
                start = block + size if stop else block

    def _lay_over(self, start: int, end: int, offset: int, data: bytes | memoryview) -> None:
        """Copy a range of the window to new memory, change it there, and put it over the window."""
        length, size = end - start, self.cow.size
        try:
            block = _new_block(start, length, size)
        except OSError as exc:
            raise out_of_memory(f"can't copy {format_size(length)}", 1, None) from exc
        try:
            libc.copy(block, start, length)
            at = self.address + offset
            first, last = max(at, start), min(at + len(data), end)
            if first < last:
                source = libc.address_of(data) + first - at
                libc.copy(block + first - start, source, last - first)
            if not self.writable:
                libc.mprotect(block, length, libc.PROT_READ)
            flags = libc.MREMAP_MAYMOVE | libc.MREMAP_FIXED
            libc.mremap(block, length, length, flags, start)  # from here on it is seen
        except OSError as exc:
            error = out_of_memory(f"can't lay {format_size(length)} over the window", 1, None)
            libc.munmap(block, length)
            raise error from exc
        first_block = align_down(start, size)
        self._owned.update(range(first_block, end, size))


def _new_block(start: int, length: int, size: int) -> int:
    """Map anonymous memory whose address has the alignment of ``start``, so that it moves whole."""
    flags = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS
    found = libc.mmap(0, length + size, libc.PROT_READ | libc.PROT_WRITE, flags)
    block = found + (start - found) % size
    if block > found:
        libc.munmap(found, block - found)
    libc.munmap(block + length, found + size - block)
    if size > PTE.size:
        libc.try_madvise(block, length, libc.MADV_HUGEPAGE)
    return block
