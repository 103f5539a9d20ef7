"""A medium in memory that remembers every store, flush, fence and call to the file system below.

:class:`RecordingPmem` is the real :class:`~vfsmap.pmem.Pmem` but for its lowest parts, so the order
in which that class flushes, fences and calls is what gets recorded.
"""

from pathlib import Path
from typing import Final, NamedTuple

from vfsmap.errors import Invalid, MediumError
from vfsmap.pmem import Commit, Medium, Pmem
from vfsmap.pmem.libc import FALLOC_FL_PUNCH_HOLE
from vfsmap.units import KIB, MIB, align_down, align_up

PAGE: Final = 4 * KIB

MEDIA: Final = {
    "store": Medium("tmpfs", Commit.STORE, PAGE, "always"),
    "hugetlb": Medium("hugetlbfs", Commit.STORE, 2 * MIB),
    "flush": Medium("dax", Commit.FLUSH, PAGE),
    "msync": Medium("dax without libpmem", Commit.FLUSH, PAGE),
    "devdax": Medium("device-dax", Commit.FLUSH, 2 * MIB),
    "sync": Medium("page cache", Commit.SYNC, PAGE),
}
"""The kinds of medium, by the names that crash ids call them."""


class Store(NamedTuple):
    """Bytes were stored."""

    offset: int
    data: bytes


class Flush(NamedTuple):
    """The CPU was told to write the lines of a range back."""

    offset: int
    length: int


class Fence(NamedTuple):
    """What was flushed before is durable."""


class Msync(NamedTuple):
    """The pages of a range are durable, and what the file system below knows of the file."""

    offset: int
    length: int


class Fdatasync(NamedTuple):
    """What the file system below knows of the file is durable, and all pages of its page cache."""


class Punch(NamedTuple):
    """A range was given back to the file system below: zeros, as far as that has recorded it."""

    offset: int
    length: int


class Resize(NamedTuple):
    """The file got longer."""

    size: int


class Mark(NamedTuple):
    """A note of who runs the workload; no effect on the medium."""

    what: str
    value: int


Event = Store | Flush | Fence | Msync | Fdatasync | Punch | Resize | Mark


class Memory:
    """Bytes in which every change can be taken back."""

    def __init__(self, content: bytes | bytearray) -> None:
        self._bytes = bytearray(content)
        self.view = memoryview(self._bytes)
        self._undo: list[tuple[int, bytes]] = []

    def __len__(self) -> int:
        return len(self._bytes)

    def write(self, offset: int, data: bytes) -> None:
        """Change a range."""
        end = offset + len(data)
        self._undo.append((offset, bytes(self.view[offset:end])))
        self.view[offset:end] = data

    def mark(self) -> int:
        """Return a point to which :meth:`rollback` may go back."""
        return len(self._undo)

    def rollback(self, mark: int) -> None:
        """Take every change back that was made since ``mark``."""
        while len(self._undo) > mark:
            offset, old = self._undo.pop()
            self.view[offset : offset + len(old)] = old


class RecordingPmem(Pmem):
    """A medium over a :class:`Memory`, of which it uses the first ``size`` bytes."""

    def __init__(
        self,
        memory: Memory,
        size: int,
        medium: Medium,
        *,
        writable: bool = True,
        backed: set[int] | None = None,
    ) -> None:
        """Record what happens from now on.

        Args:
            memory: holds the bytes; may be longer, so that the medium can grow.
            size: bytes of the medium.
            medium: what it plays.
            writable: whether it is opened for writing.
            backed: numbers of the pages that are reserved; a store to another one is an error, as
                it can raise SIGBUS where the file system below is full.
        """
        self.fd = -1
        self.path = Path("recorded.pmem")
        self.writable = writable
        self.medium = medium
        self.size = size
        self.memory = memory
        self.view = memory.view[:size]
        self.events: list[Event] = []
        self.backed = backed
        self.refuse = False
        """Answer every msync and fdatasync with EIO."""
        library = medium.commit is Commit.FLUSH and medium != MEDIA["msync"]
        self._flusher = self if library else None
        self._address = 0

    def store(self, offset: int, data: bytes | memoryview | bytearray) -> None:
        """Record and do a store."""
        assert self.writable
        if not 0 <= offset <= offset + len(data) <= self.size:
            raise IndexError(f"store of {len(data)} bytes at {offset:#x} in {self.size:#x}")
        if len(data):
            event = Store(offset, bytes(data))
            if self.backed is not None:
                self._require_backed(offset, len(event.data))
            self.events.append(event)
            self.memory.write(offset, event.data)

    def _require_backed(self, offset: int, length: int) -> None:
        assert self.backed is not None
        for page in range(offset // PAGE, (offset + length - 1) // PAGE + 1):
            if page not in self.backed:
                raise AssertionError(f"store to {offset:#x}, whose page nobody reserved")

    def pmem_flush(self, address: int, length: int) -> None:
        """Play libpmem."""
        self.events.append(Flush(address, length))

    def pmem_drain(self) -> None:
        """Play libpmem."""
        self.events.append(Fence())

    def _msync(self, offset: int, length: int) -> None:
        self._may_refuse()
        start = align_down(offset, PAGE)
        self.events.append(Msync(start, min(align_up(offset + length, PAGE), self.size) - start))

    def _fdatasync(self) -> None:
        self._may_refuse()
        self.events.append(Fdatasync())

    def _may_refuse(self) -> None:
        if self.refuse:
            raise MediumError("the recorded medium was told to refuse")

    def _fallocate(self, mode: int, offset: int, length: int) -> None:
        pages = range(offset // PAGE, -(-(offset + length) // PAGE))
        if mode & FALLOC_FL_PUNCH_HOLE:
            self.events.append(Punch(offset, length))
            self.memory.write(offset, bytes(length))
            if self.backed is not None:
                self.backed.difference_update(pages)
        elif self.backed is not None:
            self.backed.update(pages)

    def collapse(self, offset: int, length: int) -> None:
        """Do nothing: memory has the pages it has."""

    def room(self) -> int | None:
        """Return None: there is no file system below."""
        return None

    def _lengthen(self, size: int) -> None:
        if size > len(self.memory):
            raise Invalid(f"the recorded memory has only {len(self.memory)} bytes")
        self.events.append(Resize(size))
        self.size = size
        self.view = self.memory.view[:size]

    def close(self) -> None:
        """Forget the view."""
        self.view = memoryview(b"")

    def note(self, what: str, value: int = 0) -> None:
        """Put a mark among the events."""
        self.events.append(Mark(what, value))
