"""A pyfuse3 file system that keeps nothing: what pyfuse3 alone costs.

It remembers names, modes and sizes in two dictionaries, reads zeros and throws away what is
written.  Run it as ``python -m vfsmap_tools.bench.donothing DIR``; a second argument ``busy`` gives
it the mount's busy-polling, to tell what that alone brings.
"""

import contextlib
import errno
import itertools
import stat
import sys
import time

import pyfuse3
import trio

from vfsmap.units import MIB
from vfsmap_fuse.poll import busy_polling

_ZEROS = memoryview(bytes(MIB))
_FOREVER = 3600


class DoNothing(pyfuse3.Operations):
    """Answers what the measured operations ask, at the least cost Python allows."""

    def __init__(self) -> None:
        self._names: dict[tuple[int, bytes], int] = {}
        self._files = {pyfuse3.ROOT_INODE: (stat.S_IFDIR | 0o777, 0)}
        self._numbers = itertools.count(pyfuse3.ROOT_INODE + 1)
        self._now = time.time_ns()

    def _attributes(self, ino: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = ino
        entry.st_mode, entry.st_size = self._files[ino]
        entry.entry_timeout = entry.attr_timeout = _FOREVER
        entry.st_nlink = 1
        entry.st_blksize = 4096
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = self._now
        return entry

    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Find a name."""
        ino = self._names.get((parent_inode, name))
        if ino is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._attributes(ino)

    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        """Tell mode and size."""
        return self._attributes(inode)

    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        """Take a new size, ignore the rest."""
        if fields.update_size:
            self._files[inode] = self._files[inode][0], attr.st_size
        return self._attributes(inode)

    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        """Remember a name."""
        entry = await self.mkdir(parent_inode, name, mode, ctx)
        return pyfuse3.FileInfo(fh=entry.st_ino, keep_cache=False), entry

    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Remember a name."""
        ino = next(self._numbers)
        self._names[parent_inode, name] = ino
        self._files[ino] = mode, 0
        return self._attributes(ino)

    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        """Forget a name."""
        del self._files[self._names.pop((parent_inode, name))]

    rmdir = unlink

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Use the inode number as the handle."""
        return pyfuse3.FileInfo(fh=inode, keep_cache=False)

    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        """Use the inode number as the handle."""
        return inode

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """List nothing."""

    # pyfuse3 says bytes, and takes any buffer
    async def read(self, fh: int, off: int, size: int) -> memoryview:  # type: ignore[override]
        """Read zeros."""
        return _ZEROS[: min(size, self._files[fh][1] - off)]

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Throw the bytes away, remember the size."""
        mode, size = self._files[fh]
        self._files[fh] = mode, max(size, off + len(buf))
        return len(buf)

    async def release(self, fh: int) -> None:
        """Do nothing."""


def main() -> None:
    """Serve until somebody unmounts."""
    mountpoint, *mode = sys.argv[1:]
    polling = busy_polling() if mode == ["busy"] else contextlib.nullcontext()
    options = set(pyfuse3.default_options) | {"fsname=donothing"}
    pyfuse3.init(DoNothing(), mountpoint, options)
    try:
        with polling:
            trio.run(pyfuse3.main)
    finally:
        pyfuse3.close()


if __name__ == "__main__":
    main()
