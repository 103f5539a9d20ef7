"""The handlers of a mount whose pool somebody else writes.

Each request is answered from what the writer had finished by then.  What the kernel keeps by itself
is bounded in two ways: names and attributes are believed for :data:`KEEP` seconds, and the pages of
a file that has changed, mapped ones included, are dropped by :func:`keep_current`.
"""

import logging
import os
from collections.abc import Callable, Coroutine, Iterable
from functools import wraps
from inspect import isawaitable, unwrap
from typing import Any, Final, TypeVar, TypeVarTuple, cast

import trio
from pyfuse3 import FileInfo, RequestContext

from vfsmap.errors import VfsmapError
from vfsmap.fs import FollowedFileSystem, Inode
from vfsmap_fuse.edge import answered_later
from vfsmap_fuse.operations import Handle, Operations

log = logging.getLogger("vfsmap.fuse")
KEEP: Final = 0.1
"""Seconds that the kernel believes what it was told."""
POLL: Final = 0.1
"""Seconds after which the log is looked at even if nobody asks for anything."""

S = TypeVar("S", bound=Operations)
Ts = TypeVarTuple("Ts")
R = TypeVar("R")


def _current(
    handler: Callable[[S, *Ts], Coroutine[Any, Any, R]],
) -> Callable[[S, *Ts], Coroutine[Any, Any, R]]:
    """Have a handler see first what the writer has finished; both are one request."""
    bare = unwrap(handler)

    @wraps(bare)
    async def answer(self: S, *args: *Ts) -> R:
        assert isinstance(self.fs, FollowedFileSystem)
        self.fs.refresh()
        result: Any = bare(self, *args)
        return cast("R", (await result) if isawaitable(result) else result)

    return answered_later(answer)


class FollowingOperations(Operations):
    """Request handlers of a followed pool; the kernel lets nothing through that would change it."""

    keep = KEEP

    lookup = _current(Operations.lookup)
    readlink = _current(Operations.readlink)
    getattr = _current(Operations.getattr)
    statfs = _current(Operations.statfs)
    getxattr = _current(Operations.getxattr)
    listxattr = _current(Operations.listxattr)
    open = _current(Operations.open)
    opendir = _current(Operations.opendir)
    readdir = _current(Operations.readdir)

    def _open(self, inode: Inode, flags: int, ctx: RequestContext) -> FileInfo:
        """Return a handle; pages that the kernel has from before may be old, unless sealed."""
        fh = next(self._numbers)
        self._files[fh] = Handle(inode.ino, flags & ~os.O_ACCMODE, cached=True)
        return FileInfo(fh=fh, keep_cache=inode.sealed)


async def keep_current(fs: FollowedFileSystem) -> None:
    """Follow the log also while nobody asks, and have the kernel drop pages that are old."""
    told = ""
    while True:
        await trio.sleep(POLL)
        try:
            fs.refresh()
        except VfsmapError as exc:
            if str(exc) != told:
                log.error("the pool can't be followed now: %s", exc)
            told = str(exc)
        if changed := fs.take_changed():
            # a page may be locked by a request that waits for this very loop
            await trio.to_thread.run_sync(_drop, fs, changed)


def _drop(fs: FollowedFileSystem, changed: Iterable[int]) -> None:
    for ino in changed:
        for invalidate in fs.invalidators:
            invalidate(ino)
