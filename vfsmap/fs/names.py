"""The tree: names in directories, made, linked, renamed and removed."""

import stat
import time
from typing import Final

from vfsmap.errors import (
    Denied,
    Exists,
    Invalid,
    IsADirectory,
    NameTooLong,
    NotADirectory,
    NotEmpty,
    NotFound,
    TooManyLinks,
)
from vfsmap.fs.inode import ALIGN_MASK, ROOT, Inode
from vfsmap.fs.state import BATCH_PIECES, SYMLINK, State
from vfsmap.pool import Transaction
from vfsmap.pool.layout import RECORD, DirentRecord, SymlinkRecord, WholeRecord, record_packer

NAME_MAX: Final = 255
TARGET_MAX: Final = 4095
LINK_MAX: Final = 65_000  # as ext4 has it
RENAME_NOREPLACE: Final = 1
RENAME_EXCHANGE: Final = 2
_INO_AT: Final = RECORD.size + 8
_DIRENT: Final = record_packer(DirentRecord, padded=False)


class Names(State):
    """Operations on names."""

    def lookup(self, parent: int, name: bytes) -> Inode:
        """Return the inode that a directory has under a name.

        Raises:
            NotFound: no such name, or no such directory.
            NotADirectory: ``parent`` is none.
        """
        names = self._names.get(parent)
        if names is not None and (oid := names.get(name)) is not None:
            return self.get(self._target(oid))
        self.directory(parent)
        if name == b".":
            return self.get(parent)
        if name == b"..":
            return self.get(self._parents[parent])
        if len(name) > NAME_MAX:
            raise NameTooLong(f"a name has at most {NAME_MAX} bytes, not {len(name)}")
        raise NotFound(f"no such name: {name!r}")

    def entries(self, ino: int) -> list[tuple[int, bytes, int]]:
        """Return a directory's entries as cookie, name and inode number, ascending by cookie.

        A cookie belongs to one entry as long as it lives, and is never used again.
        """
        self.directory(ino)
        names = self._names.get(ino, {})
        return sorted((oid, name, self._target(oid)) for name, oid in names.items())

    def entry_alive(self, ino: int, name: bytes, cookie: int) -> bool:
        """Tell whether an entry that was listed is there still."""
        return self._names.get(ino, {}).get(name) == cookie

    def parent(self, ino: int) -> int:
        """Return the directory that a directory is in; the root is in itself."""
        return self._parents[ino]

    def create(self, parent: int, name: bytes, mode: int, uid: int, gid: int) -> Inode:
        """Make an empty regular file.

        Raises:
            Exists, NotFound, NotADirectory, NameTooLong, NoSpace, ReadOnly.

        Crash: the file is there, or not.
        """
        return self._make(parent, name, stat.S_IFREG | stat.S_IMODE(mode), uid, gid)

    def mkdir(self, parent: int, name: bytes, mode: int, uid: int, gid: int) -> Inode:
        """Make an empty directory; raises and crashes as :meth:`create`."""
        return self._make(parent, name, stat.S_IFDIR | stat.S_IMODE(mode), uid, gid)

    def mknod(self, parent: int, name: bytes, mode: int, rdev: int, uid: int, gid: int) -> Inode:
        """Make a FIFO, a socket, a device node or a regular file, as the mode's type says."""
        kind = stat.S_IFMT(mode) or stat.S_IFREG
        if kind not in (stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK):
            raise Invalid(f"mode {mode:o} is not of a type that mknod makes")
        return self._make(parent, name, kind | stat.S_IMODE(mode), uid, gid, rdev=rdev)

    def symlink(self, parent: int, name: bytes, target: bytes, uid: int, gid: int) -> Inode:
        """Make a symbolic link.

        Raises:
            NameTooLong: the target has more than 4095 bytes.
            NotFound: the target is empty.  Others as :meth:`create`.

        Crash: the link is there, or not.
        """
        if len(target) > TARGET_MAX:
            raise NameTooLong(f"a target has at most {TARGET_MAX} bytes, not {len(target)}")
        if not target:
            raise NotFound("a symbolic link can't be empty")
        return self._make(parent, name, stat.S_IFLNK | 0o777, uid, gid, target=target)

    def readlink(self, ino: int) -> bytes:
        """Return a symbolic link's target.

        Raises:
            NotFound, Invalid: it is no symbolic link.
        """
        oid = self._symlinks.get(ino)
        if oid is None:
            self.get(ino)
            raise Invalid(f"inode {ino} is not a symbolic link")
        rec = self.pool.objects[oid]
        with WholeRecord(f"link {ino}"):
            _, length = SYMLINK.unpack_from(rec, RECORD.size)
        at = RECORD.size + SYMLINK.size
        return rec[at : at + length]

    def link(self, ino: int, parent: int, name: bytes) -> Inode:
        """Give a file one more name.

        Raises:
            Invalid: it is a directory.
            TooManyLinks: it has 65,000 already.
            NotFound: it has no name left.  Others as :meth:`create`.

        Crash: the name is there and counted, or neither.
        """
        inode = self.get(ino)
        if inode.is_directory:
            raise Invalid("a directory can't have a second name")
        if inode.nlink >= LINK_MAX:
            raise TooManyLinks(f"inode {ino} has {inode.nlink} names already")
        if inode.nlink == 0:
            raise NotFound(f"inode {ino} has no name left")
        self._require_free(parent, name)
        now = time.time_ns()
        with self.change() as tx:
            inode.nlink += 1
            inode.ctime_ns = now
            self.put(tx, inode)
            oid = self._put_name(tx, parent, name, inode)
            self._touch(tx, parent, now)
        self._names.setdefault(parent, {})[name] = oid
        return inode

    def unlink(self, parent: int, name: bytes) -> int:
        """Remove a name that is not a directory's, and return its inode's number.

        Raises:
            NotFound, NotADirectory.
            IsADirectory: rmdir is for those.

        Crash: the name is there, or not; a file whose last name went is gone with it, or at the
            next open.
        """
        inode = self.lookup(parent, name)
        if inode.is_directory:
            raise IsADirectory(f"{name!r} is a directory")
        self._remove(parent, name, inode)
        return inode.ino

    def rmdir(self, parent: int, name: bytes) -> int:
        """Remove an empty directory, and return its inode's number.

        Raises:
            NotFound, NotADirectory, NotEmpty.

        Crash: the directory is there, or not.
        """
        if name in (b".", b".."):
            raise Invalid(f"{name!r} can't be removed")
        inode = self.lookup(parent, name)
        if not inode.is_directory:
            raise NotADirectory(f"{name!r} is not a directory")
        if self._names.get(inode.ino):
            raise NotEmpty(f"{name!r} is not empty")
        self._remove(parent, name, inode)
        return inode.ino

    def _remove(self, parent: int, name: bytes, inode: Inode) -> None:
        now = time.time_ns()
        names = self._names[parent]
        with self.change() as tx:
            tx.end(names[name])
            ended = self._lose_name(tx, inode, now)
            self._touch(tx, parent, now, links=-inode.is_directory)
        del names[name]
        self._lost_name(inode, ended)

    def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int = 0
    ) -> None:
        """Move a name, replacing what has the new one, or exchange two names.

        Args:
            parent: the directory of the old name.
            name: the old name.
            new_parent: the directory of the new name.
            new_name: the new name.
            flags: RENAME_NOREPLACE or RENAME_EXCHANGE.

        Raises:
            NotFound, Exists, NotEmpty, IsADirectory, NotADirectory, NameTooLong.
            Invalid: a directory would be moved into itself, or the flags are unknown.

        Crash: the old name or the new one, never both and never neither.
        """
        if flags not in (0, RENAME_NOREPLACE, RENAME_EXCHANGE):
            raise Invalid(f"rename flags {flags:#x} are not supported")
        if name in (b".", b".."):
            raise Invalid(f"{name!r} can't be moved")
        moved = self.lookup(parent, name)
        target = self._names.get(self.directory(new_parent).ino, {}).get(new_name)
        replaced = self.get(self._target(target)) if target is not None else None
        if replaced is None:
            self._require_free(new_parent, new_name)
        elif flags == RENAME_NOREPLACE:
            raise Exists(f"{new_name!r} exists")
        elif replaced.ino == moved.ino:
            return
        if moved.is_directory:
            self._require_outside(moved, new_parent)
        if flags == RENAME_EXCHANGE:
            self._exchange((parent, name, moved), (new_parent, new_name, replaced))
            return
        if replaced is not None:
            self._require_replaceable(moved, replaced)
        self._move((parent, name, moved), (new_parent, new_name, replaced))

    def _move(self, old: tuple[int, bytes, Inode], new: tuple[int, bytes, Inode | None]) -> None:
        parent, name, moved = old
        new_parent, new_name, replaced = new
        now = time.time_ns()
        # a directory's ".." is a link to its parent
        lost = moved.is_directory
        gained = lost - (replaced is not None and replaced.is_directory)
        ended = False
        with self.change() as tx:
            tx.end(self._names[parent][name])
            oid = self._put_name(tx, new_parent, new_name, moved)
            if replaced is not None:
                tx.end(self._names[new_parent][new_name])
                ended = self._lose_name(tx, replaced, now)
            moved.ctime_ns = now
            self.put(tx, moved)
            if parent == new_parent:
                self._touch(tx, parent, now, links=gained - lost)
            else:
                self._touch(tx, parent, now, links=-lost)
                self._touch(tx, new_parent, now, links=gained)
        del self._names[parent][name]
        self._names.setdefault(new_parent, {})[new_name] = oid
        if moved.is_directory:
            self._parents[moved.ino] = new_parent
        if replaced is not None:
            self._lost_name(replaced, ended)

    def _exchange(
        self, one: tuple[int, bytes, Inode], other: tuple[int, bytes, Inode | None]
    ) -> None:
        parent, name, first = one
        new_parent, new_name, second = other
        if second is None:
            raise NotFound(f"no such name: {new_name!r}")
        if second.is_directory:
            self._require_outside(second, parent)
        now = time.time_ns()
        shift = second.is_directory - first.is_directory
        with self.change() as tx:
            tx.end(self._names[parent][name])
            tx.end(self._names[new_parent][new_name])
            first_oid = self._put_name(tx, new_parent, new_name, first)
            second_oid = self._put_name(tx, parent, name, second)
            for inode in (first, second):
                inode.ctime_ns = now
                self.put(tx, inode)
            self._touch(tx, parent, now, links=shift if parent != new_parent else 0)
            if parent != new_parent:
                self._touch(tx, new_parent, now, links=-shift)
        self._names[parent][name] = second_oid
        self._names[new_parent][new_name] = first_oid
        for inode, home in ((first, new_parent), (second, parent)):
            if inode.is_directory:
                self._parents[inode.ino] = home

    # the parts

    def _target(self, oid: int) -> int:
        return int.from_bytes(self.pool.objects[oid][_INO_AT : _INO_AT + 8], "little")

    def _make(
        self,
        parent: int,
        name: bytes,
        mode: int,
        uid: int,
        gid: int,
        *,
        rdev: int = 0,
        target: bytes = b"",
    ) -> Inode:
        home = self._require_free(parent, name)
        directory = stat.S_ISDIR(mode)
        if home.mode & stat.S_ISGID:
            gid = home.gid
            mode |= stat.S_ISGID if directory else 0
        now = time.time_ns()
        with self.change() as tx:
            inode = Inode(tx.new_oid(), mode, uid, gid, now, nlink=1 + directory, rdev=rdev)
            if directory or stat.S_ISREG(mode):
                inode.flags = home.flags & ALIGN_MASK
            inode.size = len(target)
            self.put(tx, inode)
            oid = self._put_name(tx, parent, name, inode)
            self._touch(tx, parent, now, links=int(directory))
            if target:
                link = tx.new_oid()
                payload = SYMLINK.pack(inode.ino, len(target)) + target
                tx.put(link, SymlinkRecord.TAG, payload)
        if target:
            self._symlinks[inode.ino] = link
        if directory:
            self._parents[inode.ino] = parent
        try:
            self._names[parent][name] = oid
        except KeyError:
            self._names[parent] = {name: oid}
        self.remember(inode)
        self.inode_count += 1
        return inode

    def _put_name(self, tx: Transaction, parent: int, name: bytes, inode: Inode) -> int:
        oid = tx.new_oid()
        size = len(name)
        padding = -(_DIRENT.size + size) % 8
        length = _DIRENT.size + size + padding
        fields = (length, DirentRecord.TAG, oid, parent, inode.ino, size, inode.mode >> 12)
        tx.put_record(oid, _DIRENT.pack(*fields) + name + bytes(padding))
        return oid

    def _touch(self, tx: Transaction, ino: int, now: int, *, links: int = 0) -> None:
        directory = self.get(ino)
        directory.mtime_ns = directory.ctime_ns = now
        directory.nlink += links
        self.put(tx, directory)

    def _lose_name(self, tx: Transaction, inode: Inode, now: int) -> bool:
        """Take one name away; tell whether the inode, that nobody uses, ends with it."""
        self.name_goes(inode.ino)
        inode.nlink = 0 if inode.is_directory else inode.nlink - 1
        inode.ctime_ns = now
        if inode.nlink == 0 and inode.ino not in self._uses:
            oids = self._belongings(inode.ino)
            if len(oids) < BATCH_PIECES:
                self._end_objects(tx, oids)
                tx.end(inode.ino)
                return True
        self.put(tx, inode)
        return False

    def _lost_name(self, inode: Inode, ended: bool) -> None:
        if ended:
            self._forget_inode(inode.ino)
        elif inode.nlink == 0 and inode.ino not in self._uses:
            self.end_inode(inode.ino)

    def _require_free(self, parent: int, name: bytes) -> Inode:
        home = self.directory(parent)
        if home.nlink == 0:
            raise NotFound(f"directory {parent} is removed")
        if name in (b".", b"..") or name in self._names.get(parent, ()):
            raise Exists(f"{name!r} exists")
        if len(name) > NAME_MAX:
            raise NameTooLong(f"a name has at most {NAME_MAX} bytes, not {len(name)}")
        if not name or b"/" in name or b"\0" in name:
            raise Invalid(f"{name!r} can't be a name")
        return home

    def _require_replaceable(self, moved: Inode, replaced: Inode) -> None:
        if replaced.is_directory:
            if not moved.is_directory:
                raise IsADirectory("a directory can only be replaced by another")
            if self._names.get(replaced.ino):
                raise NotEmpty("the directory to be replaced is not empty")
        elif moved.is_directory:
            raise NotADirectory("a directory can only replace another")

    def _require_outside(self, moved: Inode, parent: int) -> None:
        at = parent
        while at != ROOT:
            if at == moved.ino:
                raise Invalid("a directory can't be moved into itself")
            at = self._parents[at]
        if moved.ino == ROOT:
            raise Denied("the root can't be moved")
