"""The file system: made in a pool, opened, and asked about itself."""

import os
import stat
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple, Self

from vfsmap.errors import Invalid
from vfsmap.fs.data import Data
from vfsmap.fs.inode import ROOT, Inode
from vfsmap.fs.names import NAME_MAX, Names
from vfsmap.fs.seals import Seals
from vfsmap.fs.xattrs import Xattrs
from vfsmap.pool import Oid, Pool
from vfsmap.pool.layout import BLOCK, EXTENT, RECORD, ExtentRecord, InodeRecord
from vfsmap.pool.space import Run

_RECORD_BYTES = 256
"""About what a new file takes in the log."""


class StatFs(NamedTuple):
    """What statvfs(3) tells."""

    bsize: int
    blocks: int
    bfree: int
    bavail: int
    files: int
    ffree: int
    namemax: int


class FileSystem(Names, Data, Seals, Xattrs):
    """A file system in an open pool; for one thread.

    Permissions are the business of whoever serves it: here everybody is root.
    """

    def __init__(self, pool: Pool) -> None:
        """Index the pool, which it takes over.

        Raises:
            NotAPool: the pool holds no file system.
        """
        super().__init__(pool)
        self.invalidators: list[Callable[[int], None]] = []
        """Called, in a worker thread, with the number of an inode that windows have changed."""
        self.lease_by_attribute: Callable[[int, bytes, int, int], bytes] | None = None
        """Set by the mapping daemon: the value of an attribute whose name asks for a lease.

        Called with the inode, the name, and the thread and the user that ask."""
        self._withheld: list[Run] = []
        self._withheld_pins: dict[int, Run] = {}

    @classmethod
    def format(cls, pool: Pool, *, uid: int | None = None, gid: int | None = None) -> Self:
        """Make an empty file system, whose root belongs to the caller, and open it.

        Raises:
            Invalid: the pool is in use for something else.

        Crash: there is a file system, or none.
        """
        if pool.objects or pool.next_oid != ROOT:
            raise Invalid(f"{pool.path} holds objects already")
        uid = os.getuid() if uid is None else uid
        gid = os.getgid() if gid is None else gid
        with pool.transaction() as tx:
            root = Inode(tx.new_oid(), stat.S_IFDIR | 0o755, uid, gid, time.time_ns(), nlink=2)
            tx.put(root.ino, InodeRecord.TAG, root.encode())
            tx.root = Oid(root.ino)
        pool.sync()
        return cls(pool)

    def end_orphans(self) -> int:
        """End the inodes that a crash left without a name; return how many.

        Crash: those that are left end at the next open.
        """
        orphans = [ino for ino in self._orphans if ino not in self._uses]
        self._orphans = []
        for ino in orphans:
            self.end_inode(ino)
        return len(orphans)

    def setattr(
        self,
        ino: int,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        size: int | None = None,
        atime_ns: int | None = None,
        mtime_ns: int | None = None,
        ctime_ns: int | None = None,
    ) -> Inode:
        """Change attributes; what is None stays, but the change time is now unless given.

        Raises:
            NotFound, Sealed, TooBig, NoSpace, ReadOnly.
            Busy: the size would cut what a lease covers.

        Crash: all or nothing.
        """
        inode = self.get(ino)
        if mode is not None:
            mode = stat.S_IFMT(inode.mode) | stat.S_IMODE(mode)
        now = time.time_ns()
        if size is not None:
            mtime_ns = now if mtime_ns is None else mtime_ns
        wanted = {
            "mode": mode,
            "uid": uid,
            "gid": gid,
            "atime_ns": atime_ns,
            "mtime_ns": mtime_ns,
            "ctime_ns": now if ctime_ns is None else ctime_ns,
        }
        changes = {name: value for name, value in wanted.items() if value is not None}
        if size is not None:
            return self.truncate(ino, size, changes)
        with self.change() as tx:
            for name, value in changes.items():
                setattr(inode, name, value)
            self.put(tx, inode)
        return inode

    def statfs(self) -> StatFs:
        """Return sizes and counts; no more is free than the file system below has room for."""
        free = self.pool.space.free_bytes
        room = self.pool.pmem.room()
        used = self.pool.size - free
        available = free if room is None else max(0, min(free, room - used))
        files = self.inode_count
        return StatFs(
            bsize=BLOCK,
            blocks=self.pool.size // BLOCK,
            bfree=free // BLOCK,
            bavail=available // BLOCK,
            files=files + available // _RECORD_BYTES,
            ffree=available // _RECORD_BYTES,
            namemax=NAME_MAX,
        )

    # what processes that outlived the daemon still map

    def withhold(self, mapped: Iterable[Run]) -> None:
        """Keep pool ranges from reuse: they are mapped by processes that hold no lease.

        To be called before :meth:`end_orphans`, so that orphans among them live on.
        """
        runs = sorted(mapped)
        for start, length in runs:
            self._withheld += self.pool.space.withhold(start, length)
        if not runs:
            return
        for rec in list(self.pool.objects.values()):
            if rec[4] == ExtentRecord.TAG and not rec[7]:
                owner, offset, start, length = EXTENT.unpack_from(rec, RECORD.size)
                if owner and _overlaps(runs, start, length):
                    pin = self.pin(owner, offset, length, writable=True)
                    self._withheld_pins[pin] = (start, length)

    def release_withheld(self, mapped: Iterable[Run]) -> None:
        """Let go of withheld ranges, except those that are mapped still."""
        runs = sorted(mapped)
        kept = []
        for start, length in self._withheld:
            if _overlaps(runs, start, length):
                kept.append((start, length))
            else:
                self.pool.space.free(start, length)
        self._withheld = kept
        for pin, (start, length) in list(self._withheld_pins.items()):
            if not _overlaps(runs, start, length):
                del self._withheld_pins[pin]
                self.unpin(pin)

    @property
    def withheld(self) -> bool:
        """Tell whether anything is withheld still."""
        return bool(self._withheld or self._withheld_pins)

    def close(self) -> None:
        """Close the pool; whatever is open ends.

        Raises:
            BufferError: somebody holds a view of the pool.
        """
        self.pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _overlaps(runs: list[Run], start: int, length: int) -> bool:
    return any(first < start + length and start < first + size for first, size in runs)
