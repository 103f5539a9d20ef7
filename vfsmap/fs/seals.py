"""Sealing: a file's content is fixed for ever, and its digest with it."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from vfsmap.errors import Busy, Exists
from vfsmap.fs.inode import Inode
from vfsmap.fs.state import State
from vfsmap.pool import Transaction
from vfsmap.pool.layout import BLOCK, EXTENT, RECORD, SealRecord, TreeExtentRecord, WholeRecord
from vfsmap.units import Extent, align_up


class Seals(State):
    """Operations that seal files, and tell of sealed ones."""

    def require_sealable(self, ino: int) -> Inode:
        """Return the inode of a file that can be sealed now.

        Raises:
            Exists: it is sealed already.
            Busy: it is open for writing, or mapped writable.
        """
        inode = self.file(ino)
        if inode.sealed:
            raise Exists(f"inode {ino} is sealed already")
        if self.use(ino).writers or self.has_writable_lease(ino):
            raise Busy(f"inode {ino} is open for writing: close it, then seal it")
        return inode

    @contextmanager
    def frozen(self, ino: int) -> Iterator[Inode]:
        """Keep a file that is about to be sealed from changing, while its digest is computed.

        Raises:
            Exists, Busy: it can't be sealed now.
        """
        inode = self.require_sealable(ino)
        if ino in self._frozen:
            raise Busy(f"inode {ino} is being sealed")
        self._frozen.add(ino)
        self.hold(ino)
        try:
            yield inode
        finally:
            self._frozen.discard(ino)
            self.drop(ino)

    def seal(self, ino: int, descriptor: bytes, tree: Iterable[bytes]) -> None:
        """Fix a file's content for ever.

        Args:
            ino: a regular file that nobody writes.
            descriptor: its fs-verity descriptor, 256 bytes.
            tree: the blocks of its Merkle tree, in order.

        Raises:
            Exists, Busy, NoSpace, ReadOnly.

        Crash: sealed, with its whole tree, or not sealed.
        """
        inode = self.require_sealable(ino)
        oids: list[int] = []
        with self.change() as tx:
            self._store_tree(tx, ino, b"".join(tree), oids)
            seal = tx.new_oid()
            payload = ino.to_bytes(8, "little") + descriptor.ljust(256, b"\0")
            tx.put(seal, SealRecord.TAG, payload)
            inode.seal()
            inode.ctime_ns = time.time_ns()
            self.put(tx, inode)
        self._seals[ino] = seal
        if oids:
            self._trees[ino] = tuple(oids)

    def _store_tree(self, tx: Transaction, ino: int, tree: bytes, oids: list[int]) -> None:
        offset = 0
        while offset < len(tree):
            wanted = align_up(len(tree) - offset, BLOCK)
            start, got = tx.take(wanted, minimum=BLOCK)
            piece = tree[offset : offset + got].ljust(got, b"\0")
            self.pool.pmem.store(start, piece)
            self.pool.pmem.flush(start, got)
            oids.append(tx.new_oid())
            tx.put(oids[-1], TreeExtentRecord.TAG, EXTENT.pack(ino, offset, start, got))
            offset += got

    def seal_of(self, ino: int) -> bytes | None:
        """Return a sealed file's fs-verity descriptor, 256 bytes, or None."""
        oid = self._seals.get(ino)
        at = RECORD.size + 8
        return self.pool.objects[oid][at : at + 256] if oid is not None else None

    def sealed_inodes(self) -> list[int]:
        """Return the numbers of the sealed files."""
        return list(self._seals)

    def tree_extents(self, ino: int) -> list[Extent]:
        """Return where a sealed file's Merkle tree lies, ascending."""
        records = (self.pool.objects[oid] for oid in self._trees.get(ino, ()))
        with WholeRecord("a Merkle tree's extent"):
            fields = [EXTENT.unpack_from(rec, RECORD.size) for rec in records]
        return sorted(Extent(offset, start, length) for _, offset, start, length in fields)
