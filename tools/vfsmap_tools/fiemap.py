"""Where a file's bytes lie on its device, as FIEMAP tells, and which parts of it are data."""

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from typing import Final

from vfsmap.units import Extent

# _IOWR('f', 11, struct fiemap); struct fiemap and fiemap_extent: include/uapi/linux/fiemap.h
_FS_IOC_FIEMAP: Final = 0xC020660B
_HEAD: Final = struct.Struct("=QQLLLL")
_EXTENT: Final = struct.Struct("=QQQ16xL12x")
_SYNC: Final = 0x1
_LAST: Final = 0x1
_BATCH: Final = 256
_UNKNOWN: Final = 0x2 | 0x200  # no place yet, or inside the inode


def placed_extents(fd: int, size: int) -> list[Extent] | None:
    """Return the file's extents by device offset; None: its file system has no such thing."""
    extents: list[Extent] = []
    at = 0
    while at < size:
        request = bytearray(_HEAD.size + _BATCH * _EXTENT.size)
        _HEAD.pack_into(request, 0, at, size - at, _SYNC, 0, _BATCH, 0)
        try:
            fcntl.ioctl(fd, _FS_IOC_FIEMAP, request)
        except OSError as exc:
            if exc.errno in (errno.EOPNOTSUPP, errno.ENOTTY):
                return None
            raise
        found = _HEAD.unpack_from(request)[3]
        flags = _LAST
        for number in range(found):
            place = _HEAD.size + number * _EXTENT.size
            offset, start, length, flags = _EXTENT.unpack_from(request, place)
            at = offset + length
            if not flags & _UNKNOWN:
                extents.append(Extent(offset, start, length))
        if flags & _LAST:
            break
    return extents


def data_ranges(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield start and end of each part of the file that is no hole."""
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:
                return
            raise
        at = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        yield start, at
