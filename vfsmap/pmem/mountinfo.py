"""The kernel's table of mounts, as this process sees it (Documentation/filesystems/proc.rst)."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

_MOUNTINFO: Final = Path("/proc/self/mountinfo")
_OCTAL: Final = re.compile(rb"\\([0-7]{3})")


class Mounted(NamedTuple):
    """One mount."""

    device: str
    """Major and minor number of its files, with a colon between."""
    directory: str
    kind: str
    source: str
    options: str
    """Of the file system, not of this mount of it."""


def mounts() -> Iterator[Mounted]:
    """Yield all mounts, the newest last; names may have any bytes, as file names in Python."""
    for line in _MOUNTINFO.read_bytes().split(b"\n"):
        fields = line.split(b" ")
        if len(fields) > 6:
            kind, source, options = fields[fields.index(b"-") + 1 :][:3]
            found = (fields[2], _plain(fields[4]), kind, _plain(source), options)
            yield Mounted(*map(os.fsdecode, found))


def mount_of(device: int) -> Mounted | None:
    """Return a mount of the file system with this device number, or None."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    return next((each for each in mounts() if each.device == wanted), None)


def _plain(field: bytes) -> bytes:
    """Undo the octal escapes of blanks, newlines and backslashes."""
    return _OCTAL.sub(lambda match: bytes([int(match[1], 8)]), field)
