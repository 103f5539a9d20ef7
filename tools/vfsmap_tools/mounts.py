"""Which pools are mounted where, as the kernel's mount table says."""

from pathlib import Path
from typing import NamedTuple

from vfsmap.pmem.mountinfo import mounts

FILESYSTEM_TYPE = "fuse.vfsmap"
FOLLOWED_TYPE = "fuse.vfsmap-follow"


class Mount(NamedTuple):
    """One mounted pool."""

    pool: Path
    directory: Path
    writable: bool


def mounted_pools() -> list[Mount]:
    """Return every mounted pool, the newest mount last."""
    return [
        Mount(Path(each.source), Path(each.directory), "ro" not in each.options.split(","))
        for each in mounts()
        if each.kind in (FILESYSTEM_TYPE, FOLLOWED_TYPE)
    ]


def find_mount(directory: Path) -> Mount | None:
    """Return the pool that is mounted exactly on a directory."""
    wanted = directory.absolute()
    found = [m for m in mounted_pools() if m.directory == wanted or m.directory == wanted.resolve()]
    return found[-1] if found else None
