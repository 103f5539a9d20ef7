"""Attributes as the kernel has them, and as the file system has them."""

import stat
from typing import Final, TypedDict

from pyfuse3 import EntryAttributes, RequestContext, SetattrFields, StatvfsData, get_sup_groups

from vfsmap.fs import Inode, StatFs
from vfsmap.pool.layout import BLOCK

FOREVER: Final = 86_400.0
"""Seconds that the kernel may keep names and attributes: nobody changes them behind its back."""
_TIME_MIN, _TIME_MAX = -(1 << 63), (1 << 63) - 1


class Changes(TypedDict, total=False):
    """What :meth:`FileSystem.setattr` takes."""

    mode: int
    uid: int
    gid: int
    size: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int


def entry_of(inode: Inode, keep: float = FOREVER) -> EntryAttributes:
    """Return what the kernel is told about an inode, and may believe for ``keep`` seconds."""
    entry = EntryAttributes()
    entry.st_ino = inode.ino
    entry.entry_timeout = entry.attr_timeout = keep
    entry.st_mode = inode.mode
    entry.st_nlink = inode.nlink
    entry.st_uid = inode.uid
    entry.st_gid = inode.gid
    entry.st_rdev = inode.rdev
    entry.st_size = inode.size
    entry.st_blksize = BLOCK
    entry.st_blocks = inode.blocks
    entry.st_atime_ns = inode.atime_ns
    entry.st_mtime_ns = inode.mtime_ns
    entry.st_ctime_ns = inode.ctime_ns
    return entry


def no_entry(keep: float = FOREVER) -> EntryAttributes:
    """Return what makes the kernel remember for so long that a name does not exist."""
    entry = EntryAttributes()
    entry.st_ino = 0
    entry.entry_timeout = keep
    return entry


def statvfs_of(facts: StatFs) -> StatvfsData:
    """Return what the kernel is told about the whole file system."""
    data = StatvfsData()
    data.f_bsize = data.f_frsize = facts.bsize
    data.f_blocks = facts.blocks
    data.f_bfree = facts.bfree
    data.f_bavail = facts.bavail
    data.f_files = facts.files
    data.f_ffree = data.f_favail = facts.ffree
    data.f_namemax = facts.namemax
    return data


def changes_of(
    inode: Inode, wanted: EntryAttributes, fields: SetattrFields, ctx: RequestContext
) -> Changes:
    """Return what a request changes, with the privileges that go as a consequence.

    The kernel leaves taking away set-user-ID and set-group-ID to us (libfuse asks for that, by
    FUSE_HANDLE_KILLPRIV): a change of owner takes them from everybody's files, a change of size
    only when the caller is not privileged.
    """
    changes: Changes = {}
    if fields.update_mode:
        changes["mode"] = stat.S_IMODE(wanted.st_mode)
    if fields.update_uid:
        changes["uid"] = wanted.st_uid
    if fields.update_gid:
        changes["gid"] = wanted.st_gid
    if fields.update_size:
        changes["size"] = wanted.st_size
    if fields.update_atime:
        changes["atime_ns"] = _storable(wanted.st_atime_ns)
    if fields.update_mtime:
        changes["mtime_ns"] = _storable(wanted.st_mtime_ns)
    if fields.update_ctime:
        changes["ctime_ns"] = _storable(wanted.st_ctime_ns)
    owner = fields.update_uid or fields.update_gid
    if is_privileged(inode) and (owner or (fields.update_size and ctx.uid != 0)):
        mode = changes.get("mode", inode.mode)
        changes["mode"] = disarmed(mode, member=is_member(inode, ctx))
    return changes


def is_privileged(inode: Inode) -> bool:
    """Tell whether a file runs with its owner's or its group's rights."""
    return bool(inode.mode & (stat.S_ISUID | stat.S_ISGID)) and not stat.S_ISDIR(inode.mode)


def disarmed(mode: int, *, member: bool) -> int:
    """Return permissions as a change by somebody without privileges leaves them."""
    if mode & stat.S_IXGRP or not member:
        mode &= ~stat.S_ISGID
    return stat.S_IMODE(mode & ~stat.S_ISUID)


def is_member(inode: Inode, ctx: RequestContext) -> bool:
    """Tell whether a caller has the rights of a file's group."""
    return ctx.uid == 0 or inode.gid == ctx.gid or inode.gid in _groups_of(ctx)


def _groups_of(ctx: RequestContext) -> set[int]:
    try:
        return get_sup_groups(ctx.pid)
    except OSError:  # the caller is gone, or lives in another pid namespace
        return set()


def _storable(time_ns: int) -> int:
    return min(max(time_ns, _TIME_MIN), _TIME_MAX)
