"""What is free on a mounted file system, as GETFSMAP tells (ioctl_getfsmap(2)); ext4 and xfs."""

import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

# _IOWR('X', 59, struct fsmap_head); the structures: include/uapi/linux/fsmap.h
_GETFSMAP: Final = 0xC0C0583B
_HEAD: Final = struct.Struct("=IIII6Q")
_KEY: Final = struct.Struct("=IIQQQQ3Q")
_SPECIAL_OWNER: Final = 0x10
_LAST: Final = 0x20
_FREE: Final = 1
_BATCH: Final = 1024
_MOST: Final = (1 << 64) - 1


def free_runs(directory: Path) -> Iterator[tuple[int, int]]:
    """Yield start and length, in bytes of the device, of what is free, in order."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        low = _KEY.pack(0, 0, 0, 0, 0, 0, 0, 0, 0)
        high = _KEY.pack(0xFFFFFFFF, 0xFFFFFFFF, _MOST, _MOST, _MOST, 0, 0, 0, 0)
        while True:
            request = bytearray(_HEAD.size + (2 + _BATCH) * _KEY.size)
            _HEAD.pack_into(request, 0, 0, 0, _BATCH, 0, 0, 0, 0, 0, 0, 0)
            request[_HEAD.size : _HEAD.size + 2 * _KEY.size] = low + high
            fcntl.ioctl(fd, _GETFSMAP, request)
            entries = _HEAD.unpack_from(request)[3]
            if not entries:
                return
            for number in range(entries):
                at = _HEAD.size + (2 + number) * _KEY.size
                _, flags, start, owner, _, length, *_ = _KEY.unpack_from(request, at)
                if flags & _SPECIAL_OWNER and owner == _FREE:
                    yield start, length
            if flags & _LAST:
                return
            low = bytes(request[at : at + _KEY.size])  # go on behind the last one
    finally:
        os.close(fd)
