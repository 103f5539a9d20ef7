"""Which pools are mounted where, as the kernel's mount table says."""

import re
from pathlib import Path
from typing import NamedTuple

FILESYSTEM_TYPE = "fuse.vfsmap"
FOLLOWED_TYPE = "fuse.vfsmap-follow"
_MOUNTINFO = Path("/proc/self/mountinfo")
_OCTAL = re.compile(r"\\([0-7]{3})")


class Mount(NamedTuple):
    """One mounted pool."""

    pool: Path
    directory: Path
    writable: bool


def mounted_pools() -> list[Mount]:
    """Return every mounted pool, the newest mount last."""
    mounts = []
    for line in _MOUNTINFO.read_text().splitlines():
        fields = line.split(" ")
        kind, source, options = fields[fields.index("-") + 1 :][:3]
        if kind in (FILESYSTEM_TYPE, FOLLOWED_TYPE):
            writable = "ro" not in options.split(",")
            mounts.append(Mount(Path(_plain(source)), Path(_plain(fields[4])), writable))
    return mounts


def find_mount(directory: Path) -> Mount | None:
    """Return the pool that is mounted exactly on a directory."""
    wanted = directory.absolute()
    found = [m for m in mounted_pools() if m.directory == wanted or m.directory == wanted.resolve()]
    return found[-1] if found else None


def _plain(text: str) -> str:
    """Undo the octal escapes of the mount table."""
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), text)
