"""What the file system keeps in memory: an index of the pool's objects, and who uses what.

The pool's objects are the truth; everything here can be made from them.  An inode is decoded when
it is first asked for.  When a change fails, what it touched is forgotten and decoded again.
"""

import stat
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Final

from vfsmap.errors import (
    Busy,
    Invalid,
    IsADirectory,
    NotADirectory,
    NotAPool,
    NotFound,
    Sealed,
    VfsmapError,
)
from vfsmap.fs.filemap import FileMap, Piece
from vfsmap.fs.inode import ROOT, Inode
from vfsmap.fs.use import Pin, Use
from vfsmap.pool import Pool, Transaction
from vfsmap.pool.layout import (
    EXTENT,
    RECORD,
    SPACE,
    DirentRecord,
    ExtentRecord,
    InodeRecord,
    SealRecord,
    SymlinkRecord,
    TreeExtentRecord,
    WholeRecord,
    XattrRecord,
    packer,
)
from vfsmap.units import Extent

DIRENT: Final = packer(DirentRecord)
SYMLINK: Final = packer(SymlinkRecord)
XATTR: Final = packer(XattrRecord)
_PAYLOAD: Final = RECORD.size
_DIRECTORY: Final = stat.S_IFDIR >> 12
_MOST_CACHED: Final = 1 << 17
_DAY_NS: Final = 86_400 * 10**9
BATCH_PIECES: Final = 1000
"""The most extents that one transaction frees, so that a file in many pieces can be deleted."""


class Change(Transaction):
    """A transaction that, when it fails, makes the file system forget what it touched."""

    __slots__ = ("_state",)

    def __init__(self, state: "State") -> None:
        super().__init__(state.pool.journal)
        self._state = state

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        try:
            if exc is None:
                self.commit()
                return
            self.abort()
        except BaseException:
            self._state.undone()
            raise
        self._state.undone()


class State:
    """The index, and the ways into it that every part of the file system shares."""

    def __init__(self, pool: Pool) -> None:
        """Index the objects of an open pool.

        Raises:
            NotAPool: the pool holds no file system.
        """
        if pool.root != ROOT or ROOT not in pool.objects:
            raise NotAPool(f"{pool.path} holds no file system; make one with: vfsmap format")
        self.pool = pool
        self._inodes: dict[int, Inode] = {}
        self._maps: dict[int, FileMap] = {}
        self._extents: dict[int, int | list[int]] = {}
        """The extents of files whose map was not asked for: one number, as is usual, or many."""
        self._trees: dict[int, tuple[int, ...]] = {}
        self._names: dict[int, dict[bytes, int]] = {}
        self._parents: dict[int, int] = {ROOT: ROOT}
        self._xattrs: dict[int, dict[bytes, int]] = {}
        self._symlinks: dict[int, int] = {}
        self._seals: dict[int, int] = {}
        self._uses: dict[int, Use] = {}
        self._pins: dict[int, Pin] = {}
        self._next_pin = 1
        self.noatime = False
        """Do not note when files are read."""
        self._frozen: set[int] = set()
        self._clean_tails: set[int] = set()
        """Files whose extents are known to hold nothing but zeros behind the file's end."""
        self.end_stale_pins: Callable[[], None] = lambda: None
        """Set by whoever pins: unpins, right now, what is pinned for nobody any more."""
        self.name_goes: Callable[[int], None] = lambda ino: None
        """Set by whoever else knows inodes: called before one loses a name, and may hold it."""
        self.inode_count = 0
        self._orphans: list[int] = []
        with WholeRecord("a name or an attribute"):
            self._index()

    def _index(self) -> None:
        no_links = bytes(4)
        names, extents = self._names, self._extents
        unpack_dirent, name_at = DIRENT.unpack_from, _PAYLOAD + DIRENT.size
        for oid, rec in self.pool.objects.items():
            tag = rec[4]
            if rec[7] or rec[5]:
                continue
            if tag == DirentRecord.TAG:
                parent, ino, length, kind = unpack_dirent(rec, _PAYLOAD)
                try:
                    names[parent][rec[name_at : name_at + length]] = oid
                except KeyError:
                    names[parent] = {rec[name_at : name_at + length]: oid}
                if kind == _DIRECTORY:
                    self._parents[ino] = parent
            elif tag == InodeRecord.TAG:
                self.inode_count += 1
                if rec[_PAYLOAD + 4 : _PAYLOAD + 8] == no_links:
                    self._orphans.append(oid)
            elif tag == ExtentRecord.TAG:
                owner = int.from_bytes(rec[_PAYLOAD : _PAYLOAD + 8], "little")
                others = extents.setdefault(owner, oid)
                if isinstance(others, list):
                    others.append(oid)
                elif others != oid:
                    extents[owner] = [others, oid]
            else:
                self._index_other(oid, tag, rec)

    def _index_other(self, oid: int, tag: int, rec: bytes) -> None:
        ino = int.from_bytes(rec[_PAYLOAD : _PAYLOAD + 8], "little")
        if tag == SymlinkRecord.TAG:
            self._symlinks[ino] = oid
        elif tag == XattrRecord.TAG:
            _, _, length = XATTR.unpack_from(rec, _PAYLOAD)
            at = _PAYLOAD + XATTR.size
            self._xattrs.setdefault(ino, {})[rec[at : at + length]] = oid
        elif tag == SealRecord.TAG:
            self._seals[ino] = oid
        elif tag == TreeExtentRecord.TAG:
            self._trees[ino] = (*self._trees.get(ino, ()), oid)

    # inodes

    def get(self, ino: int) -> Inode:
        """Return an inode.

        Raises:
            NotFound: there is none of that number.
        """
        inode = self._inodes.get(ino)
        if inode is None:
            rec = self.pool.objects.get(ino)
            if rec is None or rec[4] != InodeRecord.TAG or rec[7]:
                raise NotFound(f"there is no inode {ino}")
            with WholeRecord(f"inode {ino}"):
                inode = Inode.decode(rec)
            if ino in self._maps or ino in self._extents:
                inode.blocks = self.map_of(ino).allocated >> 9
            self.remember(inode)
        return inode

    def file(self, ino: int) -> Inode:
        """Return the inode of a regular file.

        Raises:
            NotFound, IsADirectory, Invalid: it is something else.
        """
        inode = self.get(ino)
        if not inode.is_file:
            if inode.is_directory:
                raise IsADirectory(f"inode {ino} is a directory")
            raise Invalid(f"inode {ino} is not a regular file")
        return inode

    def unsealed(self, ino: int) -> Inode:
        """Return the inode of a regular file whose content may change.

        Raises:
            Sealed: it may not.
        """
        inode = self.file(ino)
        if inode.sealed:
            raise Sealed(f"inode {ino} is sealed: its content can't change any more")
        if ino in self._frozen:
            raise Busy(f"inode {ino} is being sealed")
        return inode

    def directory(self, ino: int) -> Inode:
        """Return the inode of a directory.

        Raises:
            NotFound, NotADirectory: it is none.
        """
        inode = self.get(ino)
        if not inode.is_directory:
            raise NotADirectory(f"inode {ino} is not a directory")
        return inode

    def change(self) -> Change:
        """Return a transaction for a ``with`` statement."""
        return Change(self)

    def put(self, tx: Transaction, inode: Inode) -> None:
        """Store an inode as part of a transaction.

        Raises:
            Invalid: an attribute is too large for its field.
        """
        try:
            tx.put_record(inode.ino, inode.record())
        except struct.error as exc:
            raise Invalid(f"an attribute of inode {inode.ino} is out of range: {exc}") from exc

    def undone(self) -> None:
        """Forget what a change that failed may have touched."""
        self._clean_tails.clear()
        self.forget_inodes()

    def remember(self, inode: Inode) -> None:
        """Keep an inode at hand."""
        if len(self._inodes) >= _MOST_CACHED:
            self.forget_inodes()
        self._inodes[inode.ino] = inode

    def forget_inodes(self) -> None:
        """Drop what is decoded; it is decoded again from the pool's objects when asked for."""
        self._inodes.clear()
        if len(self._maps) >= _MOST_CACHED:
            for ino, map_ in self._maps.items():
                if map_.pieces:
                    self._extents[ino] = [piece.oid for piece in map_.pieces]
            self._maps.clear()

    def map_of(self, ino: int) -> FileMap:
        """Return where a file's bytes lie."""
        map_ = self._maps.get(ino)
        if map_ is None:
            pieces = self._pieces(ino)
            map_ = self._maps[ino] = FileMap(pieces, sum(piece.length for piece in pieces))
            self._extents.pop(ino, None)
        return map_

    def _pieces(self, ino: int) -> list[Piece]:
        objects = self.pool.objects
        pieces = []
        with WholeRecord(f"an extent of inode {ino}"):
            for oid in self._extents_of(ino):
                _, offset, start, length = EXTENT.unpack_from(objects[oid], _PAYLOAD)
                pieces.append(Piece(offset, start, length, oid))
        pieces.sort()
        return pieces

    def owners_of_extents(self) -> list[int]:
        """Return the numbers of all files that own extents."""
        return [*self._extents, *(ino for ino, map_ in self._maps.items() if map_.pieces)]

    def size_and_extents(self, ino: int) -> tuple[int, list[Extent]]:
        """Return a file's size, and where it lies; of a file that is gone nothing.

        This way all files can be looked at without all of them being kept at hand.
        """
        rec = self.pool.objects.get(ino)
        if rec is None or rec[4] != InodeRecord.TAG:
            return 0, []
        inode, map_ = self._inodes.get(ino), self._maps.get(ino)
        pieces = self._pieces(ino) if map_ is None else map_.pieces
        size = Inode.decode(rec).size if inode is None else inode.size
        return size, [Extent(piece.offset, piece.start, piece.length) for piece in pieces]

    def _extents_of(self, ino: int) -> Sequence[int]:
        """Return the numbers of a file's extents, in no particular order."""
        map_ = self._maps.get(ino)
        if map_ is not None:
            return [piece.oid for piece in map_.pieces]
        oids = self._extents.get(ino, ())
        return (oids,) if isinstance(oids, int) else oids

    def touch_atime(self, inode: Inode) -> None:
        """Note a read, as relatime does: when the last one is a day or a change old.

        Crash: the old or the new time.
        """
        if self.noatime:
            return
        now = time.time_ns()
        if self.is_atime_due(inode, now) and self.pool.writable:
            # what is read needs no room, and no medium that still takes stores
            with suppress(VfsmapError), self.change() as tx:
                inode.atime_ns = now
                self.put(tx, inode)

    def is_atime_due(self, inode: Inode, now: int) -> bool:
        """Tell whether the next read changes the time of access."""
        atime = inode.atime_ns
        return not (inode.mtime_ns < atime > inode.ctime_ns and now - atime < _DAY_NS)

    # who uses what

    def use(self, ino: int) -> Use:
        """Return who uses an inode."""
        return self._uses.get(ino) or Use()

    def hold(self, ino: int, *, writer: bool = False, cached: bool = False) -> None:
        """Keep an inode even when its last name goes: an open handle, or a kernel reference."""
        use = self._uses.get(ino)
        if use is None:
            use = self._uses[ino] = Use()
        use.holds += 1
        use.writers += writer
        use.cached_writers += writer and cached

    def drop(self, ino: int, *, writer: bool = False, cached: bool = False, count: int = 1) -> None:
        """End ``count`` holds; the last one ends an inode that has no name.

        Crash: an inode without a name ends when the pool is opened next.
        """
        use = self._uses.get(ino)
        if use is None or use.holds < count:
            raise Invalid(f"inode {ino} is not held so often")
        use.holds -= count
        use.writers -= writer
        use.cached_writers -= writer and cached
        if self._is_unused(ino, use):
            self.end_inode(ino)

    def drop_all(self, inos: Iterable[int]) -> None:
        """End one hold of each inode; those without a name and a user end, many at a time.

        Crash: an inode without a name ends when the pool is opened next.
        """
        ending: list[int] = []
        for ino in inos:
            use = self._uses[ino]
            use.holds -= 1
            if self._is_unused(ino, use):
                ending.append(ino)
        self._end_inodes(ending)

    def pin(self, ino: int, offset: int, length: int, *, writable: bool) -> int:
        """Keep a range's extents where they are, for a lease; return the pin's number."""
        self.file(ino)
        pin = Pin(ino, offset, offset + length, writable=writable)
        number = self._next_pin
        self._next_pin += 1
        self._pins[number] = pin
        use = self._uses.setdefault(ino, Use())
        use.pins[number] = pin
        use.writable_pins += writable
        return number

    def unpin(self, number: int) -> None:
        """End a pin; the last one ends an inode that has no name.

        Crash: an inode without a name ends when the pool is opened next.
        """
        pin = self._pins.pop(number)
        use = self._uses[pin.ino]
        del use.pins[number]
        use.writable_pins -= pin.writable
        if pin.writable:
            self._clean_tails.discard(pin.ino)
        if self._is_unused(pin.ino, use):
            self.end_inode(pin.ino)

    def has_cached_writer(self, ino: int) -> bool:
        """Tell whether the kernel may have dirty pages of a file."""
        use = self._uses.get(ino)
        return use is not None and use.cached_writers > 0

    def has_writable_lease(self, ino: int) -> bool:
        """Tell whether windows may store into a file, after asking whether they are gone."""
        if not self.use(ino).writable_pins:
            return False
        self.end_stale_pins()
        return self.use(ino).writable_pins > 0

    def is_leased(self, ino: int, offset: int, end: int) -> bool:
        """Tell whether a lease covers part of the range, after asking whether it has ended."""
        if not self.is_pinned(ino, offset, end):
            return False
        self.end_stale_pins()
        return self.is_pinned(ino, offset, end)

    def is_pinned(self, ino: int, offset: int, end: int) -> bool:
        """Tell whether a lease covers part of the range."""
        use = self._uses.get(ino)
        return use is not None and any(
            pin.offset < end and offset < pin.end for pin in use.pins.values()
        )

    def _is_unused(self, ino: int, use: Use) -> bool:
        """Forget a use that has come to its end; tell whether the inode has to end with it."""
        if use.holds or use.pins:
            return False
        del self._uses[ino]
        return ino in self.pool.objects and self.get(ino).nlink == 0 and self.pool.writable

    def end_inode(self, ino: int) -> None:
        """End an inode that has no name and no user, and all that belongs to it.

        Crash: the inode is an orphan still, perhaps with fewer extents, and ends at the next open.
        """
        self._end_inodes([ino])

    def _end_inodes(self, inos: Iterable[int]) -> None:
        ending: list[int] = []
        oids: list[int] = []
        for ino in inos:
            ending.append(ino)
            oids += (*self._belongings(ino), ino)
            if len(oids) >= BATCH_PIECES:
                self._end_batch(ending, oids)
                ending, oids = [], []
        self._end_batch(ending, oids)

    def _end_batch(self, inos: list[int], oids: list[int]) -> None:
        """End inodes; ``oids`` are the numbers of all that belongs to them, and their own."""
        for at in range(0, len(oids), BATCH_PIECES):
            with self.change() as tx:
                self._end_objects(tx, oids[at : at + BATCH_PIECES])
        for ino in inos:
            self._forget_inode(ino)

    def _belongings(self, ino: int) -> list[int]:
        """Return the numbers of all objects that an inode owns."""
        oids = list(self._extents_of(ino))
        if ino in self._trees:
            oids += self._trees[ino]
        if ino in self._xattrs:
            oids += self._xattrs[ino].values()
        oids += (index[ino] for index in (self._symlinks, self._seals) if ino in index)
        return oids

    def _end_objects(self, tx: Transaction, oids: Iterable[int]) -> None:
        """End objects as part of a transaction, and free their bytes."""
        objects = self.pool.objects
        for oid in oids:
            rec = objects.get(oid)
            if rec is not None:
                if rec[4] in SPACE:
                    tx.release(*EXTENT.unpack_from(rec, _PAYLOAD)[2:])
                tx.end(oid)

    def _forget_inode(self, ino: int) -> None:
        """Forget an inode that was ended."""
        for index in (
            self._maps,
            self._extents,
            self._trees,
            self._xattrs,
            self._symlinks,
            self._seals,
            self._inodes,
            self._names,
            self._parents,
        ):
            index.pop(ino, None)
        self._clean_tails.discard(ino)
        self.inode_count -= 1
