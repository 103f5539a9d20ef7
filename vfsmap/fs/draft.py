"""The objects of a file system while it is checked: decoded, and changed where they are wrong.

Checking mends a draft as it goes, so that one fault is reported once and not again as every fault
that follows from it; repairing a pool is writing the draft back.
"""

import stat
import struct
from collections.abc import Mapping
from typing import Final, NamedTuple

from vfsmap.fs.inode import ROOT, Inode
from vfsmap.fs.state import DIRENT, SYMLINK, XATTR
from vfsmap.pool.layout import (
    EXTENT,
    RECORD,
    USER_TAG,
    DirentRecord,
    ExtentRecord,
    InodeRecord,
    Root,
    SealRecord,
    SymlinkRecord,
    TreeExtentRecord,
    XattrRecord,
    packer,
    record,
)

_AT: Final = RECORD.size
_SEAL: Final = packer(SealRecord)
_PATH_MAX: Final = 64


class Finding(NamedTuple):
    """Something that is not as it should be."""

    code: str
    """What kind it is of, for programs."""
    where: str
    what: str
    remedy: str
    """What mends it."""
    harmless: bool = False
    """Whether a crash leaves it so, and the next mount mends it by itself."""

    def __str__(self) -> str:
        """Return it as a line for people."""
        return f"{self.where}: {self.what}; {self.remedy}"


class Dirent(NamedTuple):
    """A name."""

    parent: int
    ino: int
    kind: int
    name: bytes


class Run(NamedTuple):
    """An extent's record."""

    owner: int
    offset: int
    start: int
    length: int


class Attribute(NamedTuple):
    """An extended attribute's name, and whose it is."""

    ino: int
    name: bytes


class Draft:
    """Objects by kind, each by its number; a change goes into the decoded and the raw form."""

    def __init__(
        self, objects: Mapping[int, bytes], written: Mapping[int, int], next_oid: int
    ) -> None:
        """Decode objects; those that can't be are ended."""
        self.objects = dict(objects)
        self.next_oid = next_oid
        self.findings: list[Finding] = []
        self.changed = False
        self.inodes: dict[int, Inode] = {}
        self.names: dict[int, Dirent] = {}
        self.extents: dict[int, Run] = {}
        self.trees: dict[int, Run] = {}
        self.symlinks: dict[int, tuple[int, int]] = {}
        self.xattrs: dict[int, Attribute] = {}
        self.seals: dict[int, int] = {}
        self._written = written
        self._homes: dict[int, Dirent] | None = None
        for oid, rec in objects.items():
            self._decode(oid, rec)

    def _decode(self, oid: int, rec: bytes) -> None:
        _, tag, _ = RECORD.unpack_from(rec)
        try:
            wrong = self._sort(oid, tag, rec)
        except struct.error:
            wrong = "is too short"
        if wrong:
            self.note("object", f"object {oid}", f"its record {wrong}", "end it")
            self.end(oid)

    def _sort(self, oid: int, tag: int, rec: bytes) -> str:
        """Put an object where it belongs; return what is wrong with it."""
        if (tag == Root.TAG) != (oid == 0):
            return "is in the place of another kind"
        if tag == Root.TAG:
            return "" if len(rec) == _AT + 8 else "has an impossible length"
        if tag in (ExtentRecord.TAG, TreeExtentRecord.TAG):
            runs = self.extents if tag == ExtentRecord.TAG else self.trees
            runs[oid] = Run(*EXTENT.unpack_from(rec, _AT))
        elif tag == InodeRecord.TAG:
            inode = Inode.decode(rec)
            if inode.mode >> 16:
                return "has an impossible mode"
            self.inodes[oid] = inode
        elif tag == SealRecord.TAG:
            self.seals[oid] = _SEAL.unpack_from(rec, _AT)[0]
        elif not tag & USER_TAG:
            return self._sort_with_text(oid, tag, rec)
        return ""

    def _sort_with_text(self, oid: int, tag: int, rec: bytes) -> str:
        """Do the same for a record whose fields have text behind them."""
        if tag == DirentRecord.TAG:
            parent, ino, length, kind = DIRENT.unpack_from(rec, _AT)
            at = _AT + DIRENT.size
            end = at + length
            self.names[oid] = Dirent(parent, ino, kind, rec[at:end])
        elif tag == SymlinkRecord.TAG:
            ino, length = SYMLINK.unpack_from(rec, _AT)
            end = _AT + SYMLINK.size + length
            self.symlinks[oid] = (ino, length)
        elif tag == XattrRecord.TAG:
            ino, value_length, length = XATTR.unpack_from(rec, _AT)
            at = _AT + XATTR.size
            end = at + length + value_length
            self.xattrs[oid] = Attribute(ino, rec[at : at + length])
        else:
            return f"has the unknown tag {tag}"
        return "is shorter than its text" if end > len(rec) else ""

    def holds_files(self) -> bool:
        """Tell whether there is anything of a file system, and not only a program's objects."""
        kinds = (self.inodes, self.names, self.symlinks, self.xattrs, self.seals, self.trees)
        return any(kinds) or any(run.owner for run in self.extents.values())

    def note(
        self, code: str, where: str, what: str, remedy: str, *, harmless: bool = False
    ) -> None:
        """Add a finding."""
        self.findings.append(Finding(code, where, what, remedy, harmless))

    def age(self, oid: int) -> tuple[int, int]:
        """Return what orders objects by when they were written last, and then by number."""
        return self._written.get(oid, 1 << 64), oid

    # changes

    def new_oid(self) -> int:
        """Return a number that no object has had."""
        self.next_oid += 1
        return self.next_oid - 1

    def _put(self, oid: int, tag: int, payload: bytes) -> None:
        self.objects[oid] = record(oid, tag, payload)
        self.changed = True

    def end(self, oid: int) -> None:
        """End an object."""
        del self.objects[oid]
        for kind in (
            self.inodes,
            self.names,
            self.extents,
            self.trees,
            self.symlinks,
            self.xattrs,
            self.seals,
        ):
            kind.pop(oid, None)
        self.changed = True

    def put_root(self) -> None:
        """Make the root directory the pool's root."""
        self._put(0, Root.TAG, ROOT.to_bytes(8, "little"))

    def put_inode(self, inode: Inode) -> None:
        """Store an inode."""
        self.inodes[inode.ino] = inode
        self._put(inode.ino, InodeRecord.TAG, inode.encode())

    def put_name(self, oid: int, parent: int, ino: int, name: bytes) -> None:
        """Store a name."""
        kind = self.inodes[ino].mode >> 12
        self.names[oid] = Dirent(parent, ino, kind, name)
        self._put(oid, DirentRecord.TAG, DIRENT.pack(parent, ino, len(name), kind) + name)

    def put_extent(self, oid: int, run: Run) -> None:
        """Store an extent of a file, or of a Merkle tree."""
        if oid in self.trees:
            self.trees[oid] = run
            self._put(oid, TreeExtentRecord.TAG, EXTENT.pack(*run))
        else:
            self.extents[oid] = run
            self._put(oid, ExtentRecord.TAG, EXTENT.pack(*run))

    def cut_extent(self, oid: int, parts: list[Run]) -> None:
        """Let an extent keep only parts of itself: one in its record, each other in a new one."""
        runs = self.trees if oid in self.trees else self.extents
        if not parts:
            self.end(oid)
        for at, part in enumerate(parts):
            number = self.new_oid() if at else oid
            runs[number] = part
            self.put_extent(number, part)

    # words

    def named(self, ino: int) -> str:
        """Return how to call an inode in a message: its number, and a path if it has one."""
        if self._homes is None:
            self._homes = {dirent.ino: dirent for dirent in self.names.values()}
        homes = self._homes
        parts: list[bytes] = []
        at = ino
        while at != ROOT and at in homes and len(parts) < _PATH_MAX:
            parts.append(homes[at].name)
            at = homes[at].parent
        if at != ROOT or not parts:
            return f"inode {ino}"
        return f"inode {ino} (/{b'/'.join(reversed(parts)).decode(errors='backslashreplace')})"

    def owner_named(self, run: Run) -> str:
        """Return how to call what an extent belongs to."""
        return self.named(run.owner) if run.owner else "arena"


def new_directory(ino: int) -> Inode:
    """Return an empty directory of root's, which nobody else may look into."""
    return Inode(ino, stat.S_IFDIR | 0o700, 0, 0, 0, nlink=2)
