"""A file system that somebody else writes, as it is by now: for reading only.

The index of names, extents and attributes is changed record by record, as the log is followed.
File data is copied, and believed only if the log says, after the copy was taken, that the file has
lost none of its bytes: what is freed may be another file's a moment later.
"""

import stat
import struct
from typing import Final

from vfsmap.errors import MediumError, NotFound, PoolDamaged, Stale
from vfsmap.fs.filemap import FileMap, Piece
from vfsmap.fs.filesystem import FileSystem
from vfsmap.fs.inode import Inode
from vfsmap.fs.state import DIRENT, XATTR
from vfsmap.pool import Follower, Pool
from vfsmap.pool.follower import Before
from vfsmap.pool.layout import (
    EXTENT,
    RECORD,
    USER_TAG,
    DirentRecord,
    ExtentRecord,
    InodeRecord,
    SealRecord,
    SymlinkRecord,
    TreeExtentRecord,
    XattrRecord,
)

_AT: Final = RECORD.size


class FollowedFileSystem(FileSystem):
    """A file system in a pool that was opened for reading beside its writer.

    Nothing but :meth:`refresh` and :meth:`read` looks for what is new.  An inode that is gone is
    :class:`Stale`: whoever had the file open here kept it from nothing.
    """

    def __init__(self, pool: Pool) -> None:
        """Index the pool, and follow it from now on.

        Raises:
            NotAPool: the pool holds no file system.
            PoolDamaged: its log is damaged, so that nobody can tell what is new.
        """
        if pool.failed is not None:
            raise PoolDamaged(f"{pool.path} can't be followed: {pool.failed}")
        super().__init__(pool)
        self._follower = Follower(pool)
        self._lost: set[int] = set()
        self._changed: set[int] = set()

    def refresh(self) -> None:
        """See all that the writer has finished.

        Raises:
            PoolDamaged, NotAPool, Stale: as :meth:`Follower.refresh`.
        """
        if self.pool.failed is not None:
            raise self.pool.failed
        before = self._follower.refresh()
        if before:
            try:
                self._follow(before)
            except (struct.error, LookupError) as exc:
                self.pool.fail(PoolDamaged(f"what follows in the log makes no sense: {exc!r}"))
                raise PoolDamaged(f"{self.pool.path}: {self.pool.failed}") from exc

    def take_changed(self) -> set[int]:
        """Return the inodes that were changed, and not ended, since this was asked last."""
        changed, self._changed = self._changed, set()
        return changed

    def get(self, ino: int) -> Inode:
        """Return an inode.

        Raises:
            Stale: there is none of that number, or not any more.
        """
        try:
            return super().get(ino)
        except NotFound as exc:
            raise Stale(f"there is no inode {ino}, or not any more") from exc

    def read(self, ino: int, offset: int, size: int, *, noatime: bool = False) -> bytes:
        """Return up to ``size`` bytes, as they were at a moment between call and return.

        Raises:
            Stale: the file has been deleted.
            IsADirectory, Invalid: it is no regular file.
            MediumError: the medium can't be read.
            PoolDamaged, NotAPool: as :meth:`refresh`.
        """
        self.refresh()
        while True:
            self._lost.clear()
            data = self._copy(ino, offset, min(offset + size, self.file(ino).size))
            self.refresh()
            if ino not in self._lost:
                return data

    def _copy(self, ino: int, offset: int, end: int) -> bytes:
        pieces: list[bytes] = []
        at = offset
        for extent in self.map_of(ino).overlapping(offset, end):
            if extent.offset > at:
                pieces.append(bytes(extent.offset - at))
            piece = self.pool.pmem.read(extent.start, extent.length)
            if len(piece) < extent.length:
                raise MediumError(f"{self.pool.path} ends before {extent.start + extent.length:#x}")
            pieces.append(piece)
            at = extent.offset + extent.length
        if end > at:
            pieces.append(bytes(end - at))
        return b"".join(pieces)  # which copies nothing where there is one piece

    # the index

    def _follow(self, before: Before) -> None:
        """Bring the index up to date; what is new may have the place of what is old."""
        self._lost.clear()
        objects = self.pool.objects
        for oid, old in before.items():
            if old is not None:
                self._leave(oid, old, before)
        for oid, old in before.items():
            new = objects.get(oid)
            if new is not None:
                self._enter(oid, new)
                self.inode_count += old is None and _tag(new) == InodeRecord.TAG
            elif old is not None and _tag(old) == InodeRecord.TAG:
                self._forget_inode(oid)
                self._changed.discard(oid)

    def _leave(self, oid: int, old: bytes, before: Before) -> None:
        """Take an object out of the index as it was."""
        tag, owner = _tag(old), _owner(old)
        if tag == ExtentRecord.TAG and owner:
            self._map_before(owner, before).remove(_piece(oid, old))
            if not _covers(self.pool.objects.get(oid), old):
                self._lost.add(owner)
            self._note(owner)
        elif tag == InodeRecord.TAG:
            self._note(oid)
        elif tag == DirentRecord.TAG:
            _, _, length, _ = DIRENT.unpack_from(old, _AT)
            at = _AT + DIRENT.size
            self._names[owner].pop(old[at : at + length])
        elif tag == XattrRecord.TAG:
            _, _, length = XATTR.unpack_from(old, _AT)
            at = _AT + XATTR.size
            self._xattrs[owner].pop(old[at : at + length])
        elif tag == SymlinkRecord.TAG:
            self._symlinks.pop(owner)
        elif tag == SealRecord.TAG:
            self._seals.pop(owner)
        elif tag == TreeExtentRecord.TAG:
            self._trees[owner] = tuple(other for other in self._trees[owner] if other != oid)

    def _enter(self, oid: int, new: bytes) -> None:
        """Put an object into the index as it is."""
        tag, owner = _tag(new), _owner(new)
        if tag == ExtentRecord.TAG:
            if owner:
                self.map_of(owner).insert(_piece(oid, new))
                self._note(owner)
        elif tag == InodeRecord.TAG:
            self._note(oid)
        elif tag == DirentRecord.TAG:
            _, ino, length, kind = DIRENT.unpack_from(new, _AT)
            at = _AT + DIRENT.size
            self._names.setdefault(owner, {})[new[at : at + length]] = oid
            if kind == stat.S_IFDIR >> 12:
                self._parents[ino] = owner
        elif tag < USER_TAG:
            self._index_other(oid, tag, new)

    def _note(self, ino: int) -> None:
        """Note that what is decoded of an inode, and cached by a kernel, is not so any more."""
        self._inodes.pop(ino, None)
        self._changed.add(ino)

    def _map_before(self, ino: int, before: Before) -> FileMap:
        """Return a file's map, made from the records as they were if nobody has asked for it."""
        if ino not in self._maps:
            objects = self.pool.objects
            oids = self._extents_of(ino)
            pieces = sorted(_piece(oid, before.get(oid) or objects[oid]) for oid in oids)
            self._extents.pop(ino, None)
            self._maps[ino] = FileMap(pieces, sum(piece.length for piece in pieces))
        return self._maps[ino]


def _tag(rec: bytes) -> int:
    return int.from_bytes(rec[4:8], "little")


def _owner(rec: bytes) -> int:
    return int.from_bytes(rec[_AT : _AT + 8], "little")


def _piece(oid: int, rec: bytes) -> Piece:
    _, offset, start, length = EXTENT.unpack_from(rec, _AT)
    return Piece(offset, start, length, oid)


def _covers(new: bytes | None, old: bytes) -> bool:
    """Tell whether an extent has but grown."""
    if new is None or _tag(new) != _tag(old) or _owner(new) != _owner(old):
        return False
    first, second = _piece(0, new), _piece(0, old)
    same_place = first.start - first.offset == second.start - second.offset
    return same_place and first.offset <= second.offset and second.end <= first.end
