"""Following the log of a pool that somebody else writes: another process, or another host.

A follower takes no lock and stores nothing, so no writer waits for it or knows of it.  It holds the
pool's objects as they were after some batch of the log, and a refresh applies what was appended.

Its reads copy bytes out of the file (:meth:`Pmem.read`) and check the copy, since the writer may be
overwriting what is being read, or may have given it back to the file system below.  What they may
believe rests on the order in which the writer stores:

- A batch whose checksum holds is whole.  The bytes that it frees are used again only afterwards.
- A half is overwritten from its start on, by batches of another generation, and only after a
  superblock of a higher epoch has made the other half the active one.

So bytes copied out of an extent were the extent's if a refresh afterwards finds no batch that takes
it away.  Stores have to be seen in the order in which they were made, as x86-64 has it, also
between hosts.
"""

import struct
import zlib
from typing import Final

from vfsmap.errors import NotAPool, PoolDamaged, Stale
from vfsmap.pmem.medium import size_of
from vfsmap.pool import superblock
from vfsmap.pool.layout import (
    BATCH,
    BATCH_MAGIC,
    BLOCK,
    EXTENT,
    RECORD,
    SPACE,
    SUPERBLOCKS,
    Superblock,
)
from vfsmap.pool.log import LogHalf, Place, batch_checksum
from vfsmap.pool.pool import Pool
from vfsmap.pool.space import Run

Before = dict[int, bytes | None]
"""For each object that has changed: its record as it was; None: there was no such object."""

_COPIES: Final = SUPERBLOCKS[-1] + BLOCK
_IDENTITY: Final = struct.Struct("<QQ")
_IDENTITY_AT: Final = Superblock.epoch.offset  # epoch and generation lie side by side


class _Lost(Exception):
    """The log that was followed is not there any more."""


class Follower:
    """Keeps a pool that was opened for reading as its writer has it.

    A refresh costs what was appended since the last one.  Three things cost a pass over all
    objects: a log that has moved to larger halves, two changes of halves since the last refresh,
    and each change of halves on a medium that commits in groups (what was pending is in the new
    half only).  The writer has then stored as much itself.
    """

    def __init__(self, pool: Pool) -> None:
        """Follow ``pool`` from the state on that it was opened in."""
        self._pool = pool
        self._pmem = pool.pmem
        self._journal = pool.journal
        self._salt = zlib.crc32(bytes(pool.journal.superblock.uuid))
        self._before: Before = {}
        self._accounted = pool.journal.superblock
        """The superblock whose halves and size the free space knows."""
        self._damage: tuple[int, PoolDamaged] | None = None
        self._last: tuple[int, bytes] | None = None
        """The place and the header of the last batch that was applied."""

    def refresh(self) -> Before:
        """Apply what the writer has finished, and return what the objects changed were before.

        Raises:
            PoolDamaged, NotAPool: the log can't be followed; the objects stay as they were, and
                what their extents hold by now nobody knows.
            Stale: another pool was made in the file.
        """
        while True:
            try:
                self._apply_log()
                sb = self._newer_superblock()
                if sb is None:
                    break
                self._adopt(sb)
            except _Lost:
                self._reload()
        before, self._before = self._before, {}
        if before or self._journal.superblock is not self._accounted:
            self._follow_space(before)
        return before

    # the log

    def _apply_log(self) -> None:
        """Apply the batches behind the last one."""
        log = self._journal.log
        if self._last is None:
            self._last = self._walk(log, log.sequence)
        self._require_intact()
        while (batch := self._batch(log)) is not None:
            for oid, rec in _records(batch):
                self._put(oid, rec)
            self._last = self._advance(log, batch)
            self._journal.next_oid = BATCH.unpack_from(batch)[-1]

    def _require_intact(self) -> None:
        """Do nothing while the last batch that was applied is there.

        Raises:
            _Lost: it was overwritten; or a host that lost power has lost it with its CPU's caches.
        """
        assert self._last is not None
        at, head = self._last
        if self._pmem.read(at, BATCH.size) != head:
            raise _Lost

    def _advance(self, half: LogHalf, batch: bytes) -> tuple[int, bytes]:
        last = half.tail, batch[: BATCH.size]
        half.tail += len(batch)
        half.sequence += 1
        return last

    def _batch(self, half: LogHalf) -> bytes | None:
        """Return a copy of the batch at the tail if there is a whole one.

        Raises:
            PoolDamaged: there is none, but one behind it.
        """
        batch, length = self._copy(half, half.tail, half.sequence)
        if batch is not None or not length:
            return batch
        # torn, if the writer was killed or is storing it just now; then nothing is behind it
        behind, _ = self._copy(half, half.tail + length, half.sequence + 1)
        if behind is None:
            return None
        batch, _ = self._copy(half, half.tail, half.sequence)
        if batch is None and self._newer_superblock() is None:
            raise PoolDamaged(f"log batch {half.sequence} at {half.tail:#x} is damaged")
        return batch

    def _copy(self, half: LogHalf, at: int, sequence: int) -> tuple[bytes | None, int]:
        """Return a copy of a batch, or None, and the length that its header claims, or 0."""
        head = self._head(half, at, sequence)
        if head is None:
            return None, 0
        _, checksum, generation, found, length, next_oid = BATCH.unpack(head)
        batch = self._pmem.read(at, length)
        plain = BATCH.pack(BATCH_MAGIC, 0, generation, found, length, next_oid)
        body = memoryview(batch)[BATCH.size :]
        whole = batch.startswith(head) and batch_checksum(plain, body, self._salt) == checksum
        return batch if whole else None, length

    def _head(self, half: LogHalf, at: int, sequence: int) -> bytes | None:
        """Return the header of the batch that may be there."""
        end = half.place.start + half.place.length
        if at + BATCH.size > end:
            return None
        head = self._pmem.read(at, BATCH.size)
        if len(head) < BATCH.size:
            return None
        magic, _, generation, found, length, _ = BATCH.unpack(head)
        if (magic, generation, found) != (BATCH_MAGIC, half.generation, sequence):
            return None
        return head if BATCH.size <= length <= end - at else None

    def _walk(self, half: LogHalf, count: int) -> tuple[int, bytes]:
        """Go behind the first ``count`` batches of a half, by their headers; return the last."""
        at, last = half.place.start, (half.place.start, b"")
        for sequence in range(count):
            head = self._head(half, at, sequence)
            if head is None:
                raise _Lost
            last = at, head
            at += BATCH.unpack(head)[4]
        half.tail, half.sequence = at, count
        return last

    def _put(self, oid: int, rec: bytes | None) -> None:
        objects = self._journal.objects
        old = objects.get(oid)
        self._before.setdefault(oid, old)
        if rec is None:
            objects.pop(oid, None)
        else:
            objects[oid] = rec
        self._journal.live += len(rec or b"") - len(old or b"")

    # the superblock

    def _newer_superblock(self) -> Superblock | None:
        """Return the superblock that holds, unless it is the one known."""
        known = _identity(self._journal.superblock)
        identity, read = _IDENTITY.pack(*known), self._pmem.read
        if all(read(at + _IDENTITY_AT, len(identity)) == identity for at in SUPERBLOCKS):
            return None
        for last in (False, False, True):  # the writer may be storing one copy after the other
            raw = read(0, _COPIES).ljust(_COPIES, b"\0")
            try:
                sb, _ = superblock.load(memoryview(raw), size_of(self._pmem.fd))
                return sb if _identity(sb) != known else None
            except (NotAPool, PoolDamaged):
                if last:
                    raise
        return None

    def _adopt(self, sb: Superblock) -> None:
        """Go on with another superblock."""
        journal = self._journal
        if bytes(sb.uuid) != bytes(journal.superblock.uuid):
            raise Stale(f"another pool was made in {self._pool.path}; mount it again")
        if sb.generation == journal.superblock.generation:
            journal.superblock = sb  # another size, or another number of durable batches
        else:
            self._change_halves(sb)
        self._damage = None

    def _change_halves(self, sb: Superblock) -> None:
        """Go behind the checkpoint in the other half, which holds what we hold.

        Raises:
            _Lost: it is not certain that it does.
        """
        journal = self._journal
        self._apply_log()  # what was committed until the change
        moved = _halves(sb) != _halves(journal.superblock)
        if moved or sb.epoch != journal.superblock.epoch + 1 or journal.grouped:
            raise _Lost
        # what overwrites the half begins at its start: it has not come to where we stopped reading
        self._require_intact()
        half = self._active_half(sb)
        self._last = self._walk(half, sb.batches)
        journal.superblock, journal.log = sb, half

    def _active_half(self, sb: Superblock) -> LogHalf:
        place = Place(sb.halves[sb.active].start, sb.halves[sb.active].length)
        return LogHalf(self._pmem, place, sb.generation, self._salt)

    def _reload(self) -> None:
        """Read the active half from its start on, and take over whatever is different.

        Raises:
            PoolDamaged: batches that were durable are missing.
        """
        journal = self._journal
        sb = self._newer_superblock() or journal.superblock
        if bytes(sb.uuid) != bytes(journal.superblock.uuid):
            self._adopt(sb)
        if self._damage is not None and self._damage[0] == sb.epoch:
            raise self._damage[1]
        half, theirs = self._active_half(sb), dict[int, bytes]()
        last, next_oid = None, journal.next_oid
        while (batch := self._batch(half)) is not None:
            for oid, rec in _records(batch):
                if rec is None:
                    theirs.pop(oid, None)
                else:
                    theirs[oid] = rec
            last, next_oid = self._advance(half, batch), BATCH.unpack_from(batch)[-1]
        if last is None or half.sequence < sb.batches:
            self._damaged(sb, half)
            return  # it was overwritten meanwhile: look again
        for oid in journal.objects.keys() - theirs.keys():
            self._put(oid, None)
        for oid, rec in theirs.items():
            if journal.objects.get(oid) != rec:
                self._put(oid, rec)
        journal.superblock, journal.log, journal.next_oid = sb, half, next_oid
        self._last, self._damage = last, None

    def _damaged(self, sb: Superblock, half: LogHalf) -> None:
        """Do nothing when ``sb`` does not hold any more.

        Raises:
            PoolDamaged: it does, and batches that it counts are missing.
        """
        latest = self._newer_superblock() or self._journal.superblock
        if latest.epoch == sb.epoch:
            error = PoolDamaged(f"log batch {half.sequence} at {half.tail:#x} is damaged")
            self._damage = sb.epoch, error
            raise error

    # free space

    def _follow_space(self, before: Before) -> None:
        """Let the free space be what no extent and no half covers."""
        space = self._pool.space
        sb, old_sb = self._journal.superblock, self._accounted
        self._accounted = sb
        objects = self._journal.objects
        old = [run for rec in before.values() for run in _runs(rec)] + _halves(old_sb)
        new = [run for oid in before for run in _runs(objects.get(oid))] + _halves(sb)
        if sb.size > old_sb.size:
            space.free(old_sb.size, sb.size - old_sb.size)
        for start, length in old:
            space.free(start, length)
        for start, length in new:
            space.withhold(start, length)
        space.promoted.clear()  # what is given back to the file system below is the writer's affair


def _records(batch: bytes) -> list[tuple[int, bytes | None]]:
    """Return the objects of a batch and their new records; None: they end."""
    found: list[tuple[int, bytes | None]] = []
    at = BATCH.size
    while at < len(batch):
        length, tag, oid = RECORD.unpack_from(batch.ljust(at + RECORD.size, b"\0"), at)
        if length < RECORD.size or length > len(batch) - at:
            raise PoolDamaged(f"a log record has the impossible length {length}")
        found.append((oid, batch[at : at + length] if tag else None))
        at += length
    return found


def _identity(sb: Superblock) -> tuple[int, int]:
    """Return what differs when another superblock was written, or another pool made."""
    return sb.epoch, sb.generation


def _halves(sb: Superblock) -> list[Run]:
    return [(half.start, half.length) for half in sb.halves]


def _runs(rec: bytes | None) -> list[Run]:
    """Return the pool bytes that a record owns."""
    if (
        rec is None
        or RECORD.unpack_from(rec)[1] not in SPACE
        or len(rec) < RECORD.size + EXTENT.size
    ):
        return []
    _, _, start, length = EXTENT.unpack_from(rec, RECORD.size)
    return [(start, length)]
