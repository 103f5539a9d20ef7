"""Who maps the pool: /proc/*/maps, compared with how our own mapping shows there.

Bytes that were leased may be reused only when nobody maps them any more, and only the kernel knows:
a holder may have forked, or have passed the descriptor on, and clients outlive a daemon.

A mapping that begins with the pool's first byte is no window, since the superblock is there and
belongs to no file: it is our own, or that of a program that reads the pool as a whole, and copes
with bytes that change.
"""

import os
import re
from typing import Final, NamedTuple

from vfsmap.pmem.libc import address_of
from vfsmap.pmem.pmem import Pmem

_LINE: Final = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) (\S+ \d+)", re.MULTILINE)
_ROUNDS: Final = 4


class Mapped(NamedTuple):
    """A range of the pool that some process maps."""

    start: int
    """Pool offset, bytes."""
    length: int
    pid: int


class Scan(NamedTuple):
    """What was found."""

    ranges: list[Mapped]
    unreadable: set[int]
    """Processes that may map anything: they belong to other users."""

    def covers(self, start: int, length: int) -> bool:
        """Tell whether anybody maps part of a range of the pool."""
        return any(m.start < start + length and start < m.start + m.length for m in self.ranges)


def scan(pmem: Pmem) -> Scan:
    """Return every window over the pool that any process has; other threads may run meanwhile.

    Raises:
        OSError: there is no free descriptor, or no memory, to look.
    """
    found: list[Mapped] = []
    unreadable: set[int] = set()
    wanted = _identity(address_of(pmem.view))
    seen: set[int] = set()
    # a process that is gone before it is looked at may have a child that was not there at first
    for _ in range(_ROUNDS):
        fresh = {int(name) for name in os.listdir("/proc") if name.isdigit()} - seen
        if not fresh:
            break
        seen |= fresh
        for pid in fresh:
            try:
                maps = _maps_of(pid)
            except PermissionError:
                unreadable.add(pid)
            except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
                pass
            else:
                if wanted in maps:
                    found += _windows(maps, wanted, pid)
    return Scan(found, unreadable)


def mapped_ranges(pmem: Pmem) -> list[tuple[int, int]]:
    """Return the pool ranges that anybody has a window over, as start and length."""
    return [(mapped.start, mapped.length) for mapped in scan(pmem).ranges]


def _identity(address: int) -> bytes:
    """Return device and inode as the kernel prints them for the mapping at an address."""
    for match in _LINE.finditer(_read("/proc/self/maps")):
        if int(match[1], 16) <= address < int(match[2], 16):
            return match[4]
    raise AssertionError(f"nothing is mapped at {address:#x}")


def _maps_of(pid: int) -> bytes:
    maps = _read(f"/proc/{pid}/maps")
    if maps:
        return maps
    # a kernel thread, or a process whose first thread has ended: the others have its memory
    for thread in os.listdir(f"/proc/{pid}/task"):
        maps = maps or _read(f"/proc/{pid}/task/{thread}/maps")
    return maps


def _windows(maps: bytes, wanted: bytes, pid: int) -> list[Mapped]:
    return [
        Mapped(int(start, 16), int(high, 16) - int(low, 16), pid)
        for low, high, start, identity in _LINE.findall(maps)
        if identity == wanted and int(start, 16)
    ]


def _read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        pieces = []
        while piece := os.read(fd, 1 << 16):
            pieces.append(piece)
        return b"".join(pieces)
    finally:
        os.close(fd)
