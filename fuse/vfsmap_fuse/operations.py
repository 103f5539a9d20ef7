"""What the kernel asks for, answered from the file system: one handler for each request.

Handlers are thin: the kernel checks permissions (``default_permissions``), the file system does the
work, :mod:`vfsmap_fuse.edge` turns errors into errnos.  Metadata is touched only by handlers that
never wait, so each of them is atomic.

Who keeps an inode whose last name is gone?  The kernel, while it knows the inode: it counts what it
was told (``_known``) and forgets it again.  The file system is told to hold such an inode when its
name goes, not at every lookup.
"""

import itertools
import logging
import os
import re
import stat
import time
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Final

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, RequestContext, SetattrFields, StatvfsData

from vfsmap.errors import NoSpace, NotFound, Sealed, VfsmapError
from vfsmap.fs import FileSystem, Inode
from vfsmap.tally import Tallies
from vfsmap.units import MIB
from vfsmap_fuse.attributes import (
    FOREVER,
    changes_of,
    disarmed,
    entry_of,
    is_member,
    is_privileged,
    no_entry,
    statvfs_of,
)
from vfsmap_fuse.edge import answered, answered_later
from vfsmap_fuse.xattr import Seal, VirtualXattrs, require_namespace

log = logging.getLogger("vfsmap.fuse")
_DOT, _DOTDOT = 1, 2  # the cookies of "." and ".."; the file system's own are larger
_TURNS: Final = 4  # to wake another worker, have it find the descriptor readable, and read it
_READ_AGAIN: Final = MIB
_UNCACHED: Final = os.O_DIRECT | os.O_DSYNC
_LINUX: Final = tuple(map(int, re.findall(r"\d+", os.uname().release)[:2]))
DROPS_WRITTEN_PAGES: Final = _LINUX >= (6, 18)
"""Whether the kernel drops cached pages of what is written past them, also behind the write."""
_CAPABILITY: Final = b"security.capability"
Sync = Callable[[], Awaitable[None]]


class Handle:
    """An open file."""

    __slots__ = ("by_root", "cached", "durable", "ino", "member", "noatime", "writer")

    def __init__(self, ino: int, flags: int, *, cached: bool) -> None:
        self.ino = ino
        self.cached = cached
        self.writer = flags & os.O_ACCMODE != os.O_RDONLY and flags & _UNCACHED != _UNCACHED
        """Whether it counts as open for writing; where it serves a window, the lease counts."""
        self.durable = bool(flags & os.O_DSYNC) and not cached
        """Whether each write is to be durable; of cached ones the kernel takes care."""
        self.noatime = bool(flags & os.O_NOATIME)
        self.by_root = False
        self.member = False
        """Whether the one who opened it has the rights of its group."""


class Listing:
    """An open directory: its entries as they were when the listing began."""

    __slots__ = ("entries", "ino")

    def __init__(self, ino: int) -> None:
        self.ino = ino
        self.entries: list[tuple[int, bytes, int]] | None = None


class Operations(pyfuse3.Operations):
    """The request handlers of one mount."""

    keep: float = FOREVER
    """Seconds that the kernel may believe what it was told of names and attributes."""

    def __init__(
        self,
        fs: FileSystem,
        *,
        sync: Sync,
        seal: Seal,
        socket: Path | None = None,
        writeback: bool = False,
        tallies: Tallies | None = None,
    ) -> None:
        self.fs = fs
        self.tallies = Tallies() if tallies is None else tallies
        self._reads, self._writes = self.tallies["read"], self.tallies["write"]
        self.enable_writeback_cache = writeback
        self._sync = sync
        self._virtual = VirtualXattrs(fs, seal, socket)
        self._numbers = itertools.count(1)
        self._files: dict[int, Handle] = {}
        self._listings: dict[int, Listing] = {}
        self._known: dict[int, int] = {}
        self._held: set[int] = set()
        self._forgotten: list[int] = []
        """Held inodes that the kernel knows no more; soon they are let go, many at a time."""
        self._ender = trio.lowlevel.ParkingLot()
        fs.name_goes = self._hold_known

    # names

    @answered
    def lookup(self, parent: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        """Find a name; the kernel remembers that there is none."""
        if name == b".":  # asked of files too, when a file handle from before is opened
            inode = self.fs.get(parent)
            if inode.nlink == 0:
                raise NotFound(f"inode {parent} has no name left")
            return self._known_entry(inode)
        try:
            inode = self.fs.lookup(parent, name)
        except NotFound:
            return no_entry(self.keep)
        return self._known_entry(inode)

    @answered
    def mknod(
        self, parent: int, name: bytes, mode: int, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        """Make a file of any kind but a directory or a link."""
        return self._known_entry(self.fs.mknod(parent, name, mode, rdev, ctx.uid, ctx.gid))

    @answered
    def mkdir(self, parent: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        """Make a directory."""
        return self._known_entry(self.fs.mkdir(parent, name, mode, ctx.uid, ctx.gid))

    @answered
    def symlink(
        self, parent: int, name: bytes, target: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        """Make a symbolic link."""
        return self._known_entry(self.fs.symlink(parent, name, target, ctx.uid, ctx.gid))

    @answered
    def link(
        self, ino: int, new_parent: int, new_name: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        """Give a file one more name."""
        return self._known_entry(self.fs.link(ino, new_parent, new_name))

    @answered
    def unlink(self, parent: int, name: bytes, ctx: RequestContext) -> None:
        """Remove a name."""
        self.fs.unlink(parent, name)

    @answered
    def rmdir(self, parent: int, name: bytes, ctx: RequestContext) -> None:
        """Remove an empty directory."""
        self.fs.rmdir(parent, name)

    @answered
    def rename(
        self,
        parent: int,
        name: bytes,
        new_parent: int,
        new_name: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        """Move a name, or exchange two."""
        self.fs.rename(parent, name, new_parent, new_name, flags)

    @answered
    def readlink(self, ino: int, ctx: RequestContext) -> bytes:
        """Return a symbolic link's target."""
        target = self.fs.readlink(ino)
        self.fs.touch_atime(self.fs.get(ino))
        return target

    # what the kernel knows

    def _known_entry(self, inode: Inode) -> EntryAttributes:
        """Return an entry that the kernel will forget some day."""
        known = self._known
        known[inode.ino] = known.get(inode.ino, 0) + 1
        return entry_of(inode, self.keep)

    def _hold_known(self, ino: int) -> None:
        """Have an inode outlive its last name for as long as the kernel knows it."""
        if ino in self._known and ino not in self._held:
            self._held.add(ino)
            self.fs.hold(ino)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Note that the kernel has forgotten what it was told so many times."""
        known = self._known
        for ino, count in inode_list:
            left = known.get(ino, 0) - count
            if left > 0:
                known[ino] = left
            else:
                known.pop(ino, None)
                if ino in self._held:
                    self._forgotten.append(ino)
        if self._forgotten:
            self._ender.unpark()

    async def end_forgotten_soon(self) -> None:
        """Let go of what was forgotten whenever the handlers give way to other tasks.

        A busy client's next request does not wait for it, and one transaction serves many.
        """
        while True:
            await self._ender.park()
            self._end_forgotten()

    def _end_forgotten(self) -> None:
        """Let go of held inodes that the kernel knows no more; those without a name end."""
        forgotten = set(self._forgotten).difference(self._known) & self._held
        self._forgotten.clear()
        self._held -= forgotten
        try:
            self.fs.drop_all(forgotten)
        except (VfsmapError, MemoryError) as exc:
            log.error("deleted files are not freed before the pool is opened next: %s", exc)

    async def _let_forget(self) -> None:
        """Let requests that forget inodes catch up: the kernel lets others overtake them.

        Without this, what was deleted a moment ago would still take room.
        """
        for _ in range(_TURNS):
            await trio.lowlevel.checkpoint()
        self._end_forgotten()

    def forget_all(self) -> None:
        """Forget what the kernel knows and has open; it is gone."""
        for handle in self._files.values():
            self._end_writer(handle)
        self._files.clear()
        self._known.clear()
        self._forgotten += self._held
        self._end_forgotten()

    # attributes

    @answered
    def getattr(self, ino: int, ctx: RequestContext) -> EntryAttributes:
        """Return an inode's attributes."""
        return entry_of(self.fs.get(ino), self.keep)

    @answered
    def setattr(
        self,
        ino: int,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: int | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        """Change an inode's attributes."""
        changes = changes_of(self.fs.get(ino), attr, fields, ctx)
        return entry_of(self.fs.setattr(ino, **changes))

    @answered_later
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        """Tell sizes and free space."""
        if self._held:
            await self._let_forget()
        return statvfs_of(self.fs.statfs())

    @answered
    def getxattr(self, ino: int, name: bytes, ctx: RequestContext) -> bytes:
        """Return an extended attribute."""
        if name in self._virtual:
            return self._virtual.get(ino, name, ctx.pid, ctx.uid)
        require_namespace(name)
        return self.fs.getxattr(ino, name)

    @answered_later
    async def setxattr(self, ino: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        """Set an extended attribute; pyfuse3 has looked after the flags."""
        if name in self._virtual:
            await self._virtual.set(ino, name, value)
            return
        require_namespace(name)
        self.fs.setxattr(ino, name, value)

    @answered
    def removexattr(self, ino: int, name: bytes, ctx: RequestContext) -> None:
        """Remove an extended attribute."""
        if name in self._virtual:
            self._virtual.remove(ino, name)
            return
        require_namespace(name)
        self.fs.removexattr(ino, name)

    @answered
    def listxattr(self, ino: int, ctx: RequestContext) -> list[bytes]:
        """Name the stored attributes, to everybody but root without the trusted ones."""
        names = self.fs.listxattr(ino)
        return [name for name in names if ctx.uid == 0 or not name.startswith(b"trusted.")]

    # open files

    @answered
    def create(
        self, parent: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        """Make a file and open it."""
        inode = self.fs.create(parent, name, mode, ctx.uid, ctx.gid)
        return self._open(inode, flags, ctx), self._known_entry(inode)

    @answered
    def open(self, ino: int, flags: int, ctx: RequestContext) -> FileInfo:
        """Open a file; libfuse has asked for O_TRUNC to be left to us."""
        inode = self.fs.get(ino)
        if flags & os.O_ACCMODE and inode.sealed:
            raise Sealed(f"inode {ino} is sealed: it can't be opened for writing")
        if flags & os.O_TRUNC:
            mode = None
            if ctx.uid and is_privileged(inode):
                mode = disarmed(inode.mode, member=is_member(inode, ctx))
            self.fs.setattr(ino, size=0, mode=mode)
        return self._open(inode, flags, ctx)

    def _must_see_reads(self, inode: Inode, flags: int) -> bool:
        """Tell whether a read has to reach us, not just the page cache, to note its time.

        Only of what is read again by few requests: a large file's cache is worth more.
        """
        return (
            inode.size <= _READ_AGAIN
            and flags & os.O_ACCMODE != os.O_WRONLY
            and not (flags & os.O_NOATIME or self.fs.noatime)
            and self.fs.pool.writable
            and self.fs.is_atime_due(inode, time.time_ns())
        )

    def _writes_past_cache(self, ino: int, flags: int) -> bool:
        """Tell whether what a descriptor writes need not be cached, since that is all it does.

        It can't be mapped, and what it writes is in the pool anyway (decision 0024): the cache
        would keep a second copy.  But a shared map of another descriptor may be dirty in the same
        page, and where a write may have to be durable at once only the kernel knows of which.
        """
        return (
            flags & (os.O_ACCMODE | os.O_APPEND) == os.O_WRONLY
            and DROPS_WRITTEN_PAGES
            and not self.enable_writeback_cache
            and not self.fs.pool.grouped
            and not self.fs.has_cached_writer(ino)
        )

    def _open(self, inode: Inode, flags: int, ctx: RequestContext) -> FileInfo:
        """Return a handle: one that ignores the page cache while windows may store to the file.

        O_DIRECT alone does not make one: such a descriptor may still be mapped, and then it has
        dirty pages (decision 0020).  Together with O_DSYNC it does.
        """
        ino = inode.ino
        ignored = flags & _UNCACHED == _UNCACHED or self.fs.has_writable_lease(ino)
        direct = ignored or self._writes_past_cache(ino, flags)
        fh = next(self._numbers)
        handle = self._files[fh] = Handle(ino, flags, cached=not direct)
        if handle.writer:
            self.fs.hold(ino, writer=True, cached=handle.cached)
        handle.by_root = ctx.uid == 0
        handle.member = bool(inode.mode & stat.S_ISGID) and is_member(inode, ctx)
        keep_cache = not (ignored or self._must_see_reads(inode, flags))
        return FileInfo(fh=fh, direct_io=direct, keep_cache=keep_cache)

    @answered
    def read(  # type: ignore[override]  # pyfuse3 says bytes, and takes any buffer
        self, fh: int, off: int, size: int
    ) -> bytes | memoryview:
        """Return bytes of a file: where that is possible a view of the pool, copied by nobody."""
        handle = self._files[fh]
        data = self.fs.read(handle.ino, off, size, noatime=handle.noatime)
        self._reads.moved += len(data)
        return data

    @answered_later
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Store bytes."""
        handle = self._files[fh]
        try:
            written = self._write(handle, off, buf)
        except NoSpace:
            if not self._held:
                raise
            await self._let_forget()
            written = self._write(handle, off, buf)
        if handle.durable:
            await self._durable()
        return written

    def _write(self, handle: Handle, off: int, buf: bytes) -> int:
        """Store bytes; set-user-ID goes when the file was not opened by root, capabilities always.

        Where the kernel caches, it takes the capabilities away itself.
        """
        self._writes.moved += len(buf)
        inode = self.fs.get(handle.ino)
        if not (handle.cached or inode.sealed) and self.fs.has_xattr(inode.ino, _CAPABILITY):
            self.fs.removexattr(inode.ino, _CAPABILITY)
        if handle.by_root or not is_privileged(inode):
            return self.fs.write(handle.ino, off, buf)
        mode = disarmed(inode.mode, member=handle.member)
        written = self.fs.write(handle.ino, off, buf, mode=mode)
        pyfuse3.invalidate_inode(handle.ino, attr_only=True)
        return written

    @answered
    def release(self, fh: int) -> None:
        """Close a file."""
        handle = self._files.pop(fh)
        self._end_writer(handle)

    def _end_writer(self, handle: Handle) -> None:
        if handle.writer:
            self.fs.drop(handle.ino, writer=True, cached=handle.cached)

    @answered_later
    async def fsync(self, fh: int, datasync: bool) -> None:
        """Return when a file is as durable as the medium promises."""
        await self._durable()

    @answered_later
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Return when a directory is as durable as the medium promises."""
        await self._durable()

    async def _durable(self) -> None:
        if self.fs.pool.grouped:  # elsewhere, every request is durable when it is answered
            await self._sync()

    # directories

    @answered
    def opendir(self, ino: int, ctx: RequestContext) -> int:
        """Open a directory."""
        fh = next(self._numbers)
        self._listings[fh] = Listing(ino)
        return fh

    @answered
    def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """List a directory from an entry on, with attributes.

        What is added meanwhile shows when the listing is begun anew, what is removed is left out.
        """
        listing, fs = self._listings[fh], self.fs
        if start_id == 0 or listing.entries is None:
            listing.entries = fs.entries(listing.ino)
            fs.touch_atime(fs.get(listing.ino))
        if start_id < _DOTDOT and not self._list_dots(listing.ino, start_id, token):
            return
        first = bisect_right(listing.entries, start_id, key=itemgetter(0))
        known = self._known
        for cookie, name, ino in itertools.islice(listing.entries, first, None):
            if not fs.entry_alive(listing.ino, name, cookie):
                continue
            if not pyfuse3.readdir_reply(token, name, entry_of(fs.get(ino), self.keep), cookie):
                return
            known[ino] = known.get(ino, 0) + 1

    def _list_dots(self, ino: int, start_id: int, token: pyfuse3.ReaddirToken) -> bool:
        """List "." and ".."; the kernel does not count these as known."""
        dots = ((_DOT, b".", ino), (_DOTDOT, b"..", self.fs.parent(ino)))
        return all(
            pyfuse3.readdir_reply(token, name, entry_of(self.fs.get(target), self.keep), cookie)
            for cookie, name, target in dots[start_id:]
        )

    @answered
    def releasedir(self, fh: int) -> None:
        """Close a directory."""
        del self._listings[fh]
