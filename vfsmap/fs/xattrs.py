"""Extended attributes."""

import time
from typing import Final

from vfsmap.errors import Exists, Invalid, NameTooLong, NoData, NoSpace
from vfsmap.fs.state import XATTR, State
from vfsmap.pool.layout import RECORD, XattrRecord

XATTR_NAME_MAX: Final = 255
XATTR_LIST_MAX: Final = 65536
"""Bytes of all names, with a NUL behind each: more can't be listed (linux/limits.h)."""
XATTR_SIZE_MAX: Final = 1 << 16  # include/uapi/linux/limits.h
XATTR_CREATE: Final = 1
XATTR_REPLACE: Final = 2


class Xattrs(State):
    """Operations on extended attributes."""

    def getxattr(self, ino: int, name: bytes) -> bytes:
        """Return an attribute's value.

        Raises:
            NoData: there is no such attribute.
        """
        oid = self._xattrs.get(ino, {}).get(name)
        if oid is None:
            self.get(ino)
            raise NoData(f"inode {ino} has no attribute {name!r}")
        rec = self.pool.objects[oid]
        _, value_length, name_length = XATTR.unpack_from(rec, RECORD.size)
        at = RECORD.size + XATTR.size + name_length
        return rec[at : at + value_length]

    def has_xattr(self, ino: int, name: bytes) -> bool:
        """Tell whether an inode has an attribute."""
        return name in self._xattrs.get(ino, ())

    def listxattr(self, ino: int) -> list[bytes]:
        """Return the names of an inode's attributes."""
        self.get(ino)
        return list(self._xattrs.get(ino, ()))

    def setxattr(self, ino: int, name: bytes, value: bytes, flags: int = 0) -> None:
        """Set an attribute; XATTR_CREATE and XATTR_REPLACE say what must, or must not, be there.

        Raises:
            Exists, NoData: what the flags demand is not so.
            NameTooLong, NoSpace, Invalid: name or value don't fit.

        Crash: the old value or the new one.
        """
        inode = self.get(ino)
        oid = self._xattrs.get(ino, {}).get(name)
        if flags & XATTR_CREATE and oid is not None:
            raise Exists(f"inode {ino} has an attribute {name!r}")
        if flags & XATTR_REPLACE and oid is None:
            raise NoData(f"inode {ino} has no attribute {name!r}")
        if len(name) > XATTR_NAME_MAX:
            raise NameTooLong(f"an attribute's name has at most {XATTR_NAME_MAX} bytes")
        if not name:
            raise Invalid("an attribute needs a name")
        if len(value) > XATTR_SIZE_MAX:
            raise NoSpace(f"an attribute has at most {XATTR_SIZE_MAX} bytes, not {len(value)}")
        if oid is None:
            named = sum(len(other) + 1 for other in self._xattrs.get(ino, ()))
            if named + len(name) + 1 > XATTR_LIST_MAX:
                raise NoSpace(f"a file's attributes have names of at most {XATTR_LIST_MAX} bytes")
        with self.change() as tx:
            oid = oid or tx.new_oid()
            tx.put(oid, XattrRecord.TAG, XATTR.pack(ino, len(value), len(name)) + name + value)
            inode.ctime_ns = time.time_ns()
            self.put(tx, inode)
        self._xattrs.setdefault(ino, {})[name] = oid

    def removexattr(self, ino: int, name: bytes) -> None:
        """Remove an attribute.

        Raises:
            NoData: there is no such attribute.

        Crash: it is there, or not.
        """
        inode = self.get(ino)
        oid = self._xattrs.get(ino, {}).get(name)
        if oid is None:
            raise NoData(f"inode {ino} has no attribute {name!r}")
        with self.change() as tx:
            tx.end(oid)
            inode.ctime_ns = time.time_ns()
            self.put(tx, inode)
        del self._xattrs[ino][name]
