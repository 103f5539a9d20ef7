"""An inode: everything about a file but its name and its bytes."""

import stat
from typing import Final, Self

from vfsmap.pool.layout import RECORD, InodeRecord, packer, record_packer

_FIELDS: Final = packer(InodeRecord)
_RECORD: Final = record_packer(InodeRecord)
_SEALED: Final = 1
_ALIGN_SHIFT: Final = 8
ALIGN_MASK: Final = 0xFF << _ALIGN_SHIFT
"""The flags that hold the alignment hint."""

ROOT: Final = 1
"""The root directory's inode number."""


class Inode:
    """What stat(2) tells of a file; the file system's own copy, not to be changed by others."""

    __slots__ = (
        "atime_ns",
        "blocks",
        "btime_ns",
        "ctime_ns",
        "flags",
        "gid",
        "ino",
        "mode",
        "mtime_ns",
        "nlink",
        "rdev",
        "size",
        "uid",
    )

    def __init__(
        self, ino: int, mode: int, uid: int, gid: int, now_ns: int, *, nlink: int = 1, rdev: int = 0
    ) -> None:
        self.ino = ino
        self.mode = mode
        self.nlink = nlink
        self.uid = uid
        self.gid = gid
        self.rdev = rdev
        self.flags = 0
        self.size = 0
        self.atime_ns = self.mtime_ns = self.ctime_ns = self.btime_ns = now_ns
        self.blocks = 0
        """Units of 512 bytes; not stored, but counted from the extents."""

    @classmethod
    def decode(cls, rec: bytes) -> Self:
        """Return the inode that a record holds."""
        inode = cls.__new__(cls)
        inode.ino = int.from_bytes(rec[8:16], "little")
        (
            inode.mode,
            inode.nlink,
            inode.uid,
            inode.gid,
            inode.rdev,
            inode.flags,
            inode.size,
            inode.atime_ns,
            inode.mtime_ns,
            inode.ctime_ns,
            inode.btime_ns,
        ) = _FIELDS.unpack_from(rec, RECORD.size)
        inode.blocks = 0
        return inode

    def encode(self) -> bytes:
        """Return the payload of the inode's record."""
        return self.record()[RECORD.size :]

    def record(self) -> bytes:
        """Return the inode's record, header and all."""
        return _RECORD.pack(
            _RECORD.size,
            InodeRecord.TAG,
            self.ino,
            self.mode,
            self.nlink,
            self.uid,
            self.gid,
            self.rdev,
            self.flags,
            self.size,
            self.atime_ns,
            self.mtime_ns,
            self.ctime_ns,
            self.btime_ns,
        )

    @property
    def is_directory(self) -> bool:
        """Tell whether this is a directory."""
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        """Tell whether this is a regular file."""
        return stat.S_ISREG(self.mode)

    @property
    def sealed(self) -> bool:
        """Tell whether the content can never change again."""
        return bool(self.flags & _SEALED)

    def seal(self) -> None:
        """Mark the content as fixed."""
        self.flags |= _SEALED

    @property
    def align(self) -> int:
        """The alignment hint: log2 of the unit that extents shall be laid out in; 0 for none."""
        return (self.flags & ALIGN_MASK) >> _ALIGN_SHIFT

    @align.setter
    def align(self, shift: int) -> None:
        self.flags = self.flags & ~ALIGN_MASK | shift << _ALIGN_SHIFT
