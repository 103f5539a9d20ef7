"""The file system: inodes, names, attributes and file data in a pool; no FUSE here."""

from vfsmap.fs.filesystem import FileSystem, StatFs
from vfsmap.fs.following import FollowedFileSystem
from vfsmap.fs.inode import ROOT, Inode
from vfsmap.fs.names import RENAME_EXCHANGE, RENAME_NOREPLACE
from vfsmap.fs.use import Use
from vfsmap.fs.xattrs import XATTR_CREATE, XATTR_REPLACE

__all__ = [
    "RENAME_EXCHANGE",
    "RENAME_NOREPLACE",
    "ROOT",
    "XATTR_CREATE",
    "XATTR_REPLACE",
    "FileSystem",
    "FollowedFileSystem",
    "Inode",
    "StatFs",
    "Use",
]
