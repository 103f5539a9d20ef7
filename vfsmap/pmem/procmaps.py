"""Who maps the pool: /proc/*/maps, compared with how our own mapping shows there.

A lease may end, and its bytes be reused, only when nobody maps them any more.  Only the kernel
knows: a holder may have forked, or have passed the descriptor on.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple

from vfsmap.pmem.libc import address_of
from vfsmap.pmem.pmem import Pmem

_PROC = Path("/proc")
_LINE = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) (\S+) ([0-9a-f]+) (\S+ \d+)")


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
    """Processes of other users, that may map anything."""

    def covers(self, start: int, length: int) -> bool:
        """Tell whether anybody maps part of a range of the pool."""
        return any(m.start < start + length and start < m.start + m.length for m in self.ranges)


def scan(pmem: Pmem) -> Scan:
    """Return every mapping of the pool's file in this system but the medium's own."""
    base = address_of(pmem.view)
    own = _identity(base)
    found: list[Mapped] = []
    unreadable: set[int] = set()
    if own is None:
        return Scan(found, unreadable)
    for name in os.listdir(_PROC):
        if not name.isdigit():
            continue
        pid = int(name)
        try:
            maps = _read(f"/proc/{name}/maps")
        except PermissionError:
            unreadable.add(pid)
            continue
        except OSError:  # it has ended meanwhile
            continue
        if own not in maps:
            continue
        for low, _, start, length in _mappings(maps, own):
            if pid != os.getpid() or not base <= low < base + pmem.size:
                found.append(Mapped(start, length, pid))
    return Scan(found, unreadable)


def mapped_ranges(pmem: Pmem) -> list[tuple[int, int]]:
    """Return the pool ranges that anybody maps, as start and length."""
    return [(mapped.start, mapped.length) for mapped in scan(pmem).ranges]


def _read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        pieces = []
        while piece := os.read(fd, 1 << 16):
            pieces.append(piece)
        return b"".join(pieces)
    finally:
        os.close(fd)


def _identity(address: int) -> bytes | None:
    """Return device and inode as the kernel prints them for the mapping at an address."""
    for match in _LINE.finditer(_read("/proc/self/maps")):
        if int(match[1], 16) <= address < int(match[2], 16):
            return match[5]
    return None


def _mappings(maps: bytes, identity: bytes) -> list[tuple[int, bytes, int, int]]:
    return [
        (int(m[1], 16), m[3], int(m[4], 16), int(m[2], 16) - int(m[1], 16))
        for m in _LINE.finditer(maps)
        if m[5] == identity
    ]
