"""How transactions reach the medium: the active half of the log, its checkpoints, group commits."""

import os
import threading
import zlib
from collections.abc import Iterable
from contextlib import suppress

from vfsmap.errors import MediumError, NoSpace, PoolDamaged, ReadOnly, VfsmapError
from vfsmap.pmem import Commit as CommitKind
from vfsmap.pmem import Pmem
from vfsmap.pool import superblock
from vfsmap.pool.checkpoint import Checkpoint
from vfsmap.pool.layout import BATCH, Superblock, end_record
from vfsmap.pool.log import LogHalf, Place
from vfsmap.pool.space import Run, Space
from vfsmap.units import KIB, PMD, PTE, align_up

RESERVE = 64 * KIB
"""Kept free in every half, so that a pool whose log is full can still delete."""
_SLICE = 16 * KIB
_FULL = "the pool's log is full and can't grow: delete something, or make the pool larger"


class Journal:
    """The log of one open pool and the objects that it replays to.

    Shapes: ``objects`` maps each object's number to its record, header included; ``live`` is the
    sum of their lengths.
    """

    def __init__(self, pmem: Pmem, sb: Superblock) -> None:
        self.pmem = pmem
        self.grouped = pmem.medium.commit is CommitKind.SYNC
        """Whether transactions wait in memory for a group commit."""
        self.superblock = sb
        self.objects: dict[int, bytes] = {}
        self.live = 0
        self.next_oid = 1
        self.space = Space(pmem)
        self.failed: VfsmapError | None = None
        self._salt = zlib.crc32(bytes(sb.uuid))
        self.log = LogHalf(pmem, self.halves[sb.active], sb.generation, self._salt)
        self._checkpoint: Checkpoint | None = None
        self._larger: tuple[Place, Place] | None = None
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._pending_free: list[Run] = []
        self._in_flight: Commit | None = None
        self.io = threading.Lock()
        self.doubts = 0
        """Grows whenever an operation that ends for want of memory from now on would leave what is
        held here, or by those above, half changed."""

    @property
    def superblock(self) -> Superblock:
        """The superblock that holds."""
        return self._superblock

    @superblock.setter
    def superblock(self, sb: Superblock) -> None:
        self._superblock = sb
        first, second = (Place(h.start, h.length) for h in sb.halves)
        self.halves = first, second
        self._shorter = min(first.length, second.length)
        self.capacity = (self._shorter - RESERVE) * 255 // 256
        """Bytes of live records that the log can hold without growing."""

    @property
    def pending(self) -> bool:
        """Tell whether transactions wait for a group commit."""
        return bool(self._pending)

    @property
    def quiet(self) -> bool:
        """Tell whether everything that was done is durable."""
        return not self._pending and self._in_flight is None

    def replay(self) -> None:
        """Read the log.

        Raises:
            PoolDamaged: an invalid batch is followed by valid newer ones, or is one of those that
                the superblock counts; what comes before it is in ``objects``.
        """
        try:
            self.next_oid = max(1, self.log.replay(self.objects))
        finally:
            self.live = sum(map(len, self.objects.values()))
        if self.log.sequence < self.superblock.batches:
            raise PoolDamaged(
                f"log batch {self.log.sequence} at {self.log.tail:#x} is damaged: "
                f"{self.superblock.batches} batches were durable"
            )

    def close(self) -> None:
        """Note how many batches are durable, so that damage to the last ones will be seen.

        Raises:
            MediumError: the medium refused.

        Crash: the old or the new number holds, and both are right.
        """
        if self.log.sequence > self.superblock.batches:
            sb = Superblock.from_buffer_copy(self.superblock)
            sb.batches = self.log.sequence
            superblock.write(self.pmem, sb)
            self.superblock = sb

    def require_writable(self) -> None:
        """Do nothing when the pool takes changes.

        Raises:
            ReadOnly: it does not; the message says why.
        """
        if self.failed is not None:
            raise ReadOnly(f"the pool turned read-only: {self.failed}")
        if not self.pmem.writable:
            raise ReadOnly("the pool was opened read-only")

    def fail(self, reason: VfsmapError) -> None:
        """Turn read-only, for the reason given; the first reason stays."""
        self.failed = self.failed or reason

    def apply(self, put: dict[int, bytes], ended: Iterable[int], freed: list[Run]) -> None:
        """Commit changes, and free runs once that is durable.

        Args:
            put: objects that get a new content, and their records.
            ended: objects that end; none of those in ``put``.
            freed: pool bytes that nobody owns any more.

        Raises:
            NoSpace: the log can't hold them.
            ReadOnly: the pool can't be written.
            MediumError: the medium refused; the pool is read-only from now on.

        Crash: all or nothing; on a grouped medium durable with the next group.
        """
        if self.failed is not None or not self.pmem.writable:
            self.require_writable()
        objects = self.objects
        growth = 0
        for oid, rec in put.items():
            growth += len(rec) - len(objects.get(oid, b""))
        records = list(put.values())
        for oid in ended:
            growth -= len(objects.get(oid, b""))
            records.append(end_record(oid))
        size = sum(map(len, records))
        self._make_room(size, growth)
        if self.grouped:
            self.doubts += 1
            self._pending += records
            self._pending_bytes += size
            self._pending_free += freed
        else:
            self._store(records)
        objects.update(put)
        for oid in ended:
            objects.pop(oid, None)
        self.live += growth
        if self._checkpoint is not None:
            self._advance(self._checkpoint, records, size)
        if not self.grouped:
            self._free(freed)

    def _store(self, records: list[bytes]) -> None:
        try:
            self.pmem.fence()  # the data that the records speak of comes first
            batch = self.log.batch(records, self.next_oid)
            self.doubts += 1
            at = self.log.store(batch)
            self.pmem.persist(at, self.log.tail - at)  # the commit point
        except VfsmapError as exc:
            self.fail(exc)
            raise

    def _free(self, runs: list[Run]) -> None:
        try:
            for start, length in runs:
                self.space.free(start, length)
        except MemoryError:
            self.doubts += 1
            raise

    # room in the log

    def _make_room(self, size: int, growth: int) -> None:
        if growth > 0 and self.live + growth > self.capacity:
            self._settle()  # it may be the very commit that makes the log larger
            if self.live + growth > self.capacity:
                self._grow(growth)
        room = self.log.room - self._pending_bytes - size
        if self._in_flight is not None:
            room -= self._in_flight.size
        # half full of live records, a checkpoint would soon be due again: put it off to the last
        length = self.log.place.length
        if room >= (length // 8 if self.live * 2 <= length else 0):
            return
        if self._checkpoint is None:
            self._start_checkpoint()
        if room < 0:
            self._finish_checkpoint()
            if self.log.room < size:
                raise NoSpace(_FULL)

    def _grow(self, growth: int) -> None:
        self._drop_checkpoint()
        self.reclaim()
        self._larger = self._take_larger(self.live + growth)
        if self._larger is None:
            raise NoSpace(_FULL)
        self._start_checkpoint()
        self._finish_checkpoint()

    def _take_larger(self, live: int) -> tuple[Place, Place] | None:
        """Take room for two halves of twice, or a little more than, the live records."""
        for wanted in (2 * live + 2 * RESERVE, live + live // 8 + 2 * RESERVE):
            level = PMD if wanted >= PMD.size else PTE
            length = align_up(wanted, level.size)
            if length <= self._shorter:
                break
            taken: list[Place] = []
            try:
                taken.extend(Place(*self.space.take(length, level)) for _ in range(2))
                return taken[0], taken[1]
            except MemoryError:
                self.doubts += 1
                raise
            except NoSpace:
                self._free([(place.start, place.length) for place in taken])
        return None

    def _start_checkpoint(self) -> Checkpoint:
        self._settle()
        if self._larger is None and self.live * 2 + 2 * RESERVE > self._shorter:
            self._larger = self._take_larger(self.live)
        spare = self.halves[1 - self.superblock.active]
        place = self._larger[0] if self._larger else spare
        half = LogHalf(self.pmem, place, new_generation(), self._salt)
        self._checkpoint = Checkpoint(half, self.objects)
        return self._checkpoint

    def _advance(self, checkpoint: Checkpoint, records: list[bytes], size: int) -> None:
        """Copy a slice: enough, for every byte logged, to be done before the log is full."""
        fits = False
        try:
            fits = checkpoint.follow(records, self.next_oid) and checkpoint.copy(
                max(_SLICE, 16 * size), self.next_oid
            )
        finally:
            if not fits:
                self._drop_checkpoint()
        if fits and checkpoint.done and not self.grouped:
            # the records are durable already: whoever commits next is told that the pool failed
            with suppress(MediumError):
                self._switch(checkpoint)

    def compact(self) -> None:
        """Copy the live objects to the other half, and go on there.

        Raises:
            NoSpace: they don't fit.
            MediumError: the medium refused; the pool is read-only from now on.

        Crash: the old half, whole, or the new one; they replay to the same objects.
        """
        self.require_writable()
        self._settle()
        if self._checkpoint is None:
            self._start_checkpoint()
        self._finish_checkpoint()

    def _drop_checkpoint(self) -> None:
        self._checkpoint = None
        larger, self._larger = self._larger, None
        if larger:
            self._free([(place.start, place.length) for place in larger])

    def _finish_checkpoint(self) -> None:
        checkpoint = self._checkpoint or self._start_checkpoint()
        if not self._copy_all(checkpoint):
            # what was copied in slices, and has changed since, took too much room
            checkpoint = self._start_checkpoint()
            if not self._copy_all(checkpoint):
                raise NoSpace(_FULL)
        if self.grouped:
            self.sync()
        else:
            self._switch(checkpoint)

    def _copy_all(self, checkpoint: Checkpoint) -> bool:
        """Copy what is left to copy; where that does not fit, the checkpoint is dropped."""
        fits = False
        try:
            fits = checkpoint.copy_all(self.next_oid)
        finally:
            if not fits:
                self._drop_checkpoint()
        return fits

    def _switch(self, checkpoint: Checkpoint) -> None:
        """Make the checkpoint's half the active one.

        Crash: the old half, whole, or the new one; they replay to the same objects.
        """
        half = checkpoint.half
        self.doubts += 1
        try:
            self.pmem.persist(half.place.start, half.tail - half.place.start)
            new = self.write_switched(half)
        except VfsmapError as exc:
            self.fail(exc)
            raise
        self.log = half
        self._checkpoint = None
        self.switched(new)

    def write_switched(self, half: LogHalf) -> Superblock:
        """Write, and return, a superblock in which ``half``, durable by now, is active.

        Crash: the old or the new half is active.
        """
        sb = Superblock.from_buffer_copy(self.superblock)
        sb.generation = half.generation
        sb.active = 1 - sb.active
        sb.batches = half.sequence
        if self._larger:
            sb.active = 0
            for mine, place in zip(sb.halves, self._larger, strict=True):
                mine.start, mine.length = place
        superblock.write(self.pmem, sb)
        return sb

    def switched(self, sb: Superblock) -> None:
        """Forget the old half, now that ``sb`` is durable."""
        old, self.superblock = self.halves, sb
        if self._larger:
            self._larger = None
            self._free([(place.start, place.length) for place in old])

    # group commits

    def begin_commit(self) -> "Commit":
        """Take what is pending; the commit's ``run`` may then block in another thread."""
        self._settle()
        self.doubts += 1
        checkpoint = self._checkpoint
        switch = self.grouped and checkpoint is not None and checkpoint.done
        if checkpoint and switch:
            self.log = checkpoint.half  # which the pending records have followed into
            self._checkpoint = None
        records = [] if switch else self._pending
        commit = Commit(self, records, self._pending_free, switch=switch)
        self._pending, self._pending_free, self._pending_bytes = [], [], 0
        self._in_flight = commit
        return commit

    def reclaim(self, least: int = 1) -> bool:
        """Commit, if at least so many bytes are free once that is done; tell whether it was done.

        Raises:
            MediumError: the medium refused; the pool is read-only from now on.

        Crash: everything or nothing of the group that was pending.
        """
        in_flight = self._in_flight.freed if self._in_flight else []
        if sum(length for _, length in (*in_flight, *self._pending_free)) < least:
            return False
        self.sync()
        return True

    def _settle(self) -> None:
        """Wait for the commit in flight, if there is one."""
        if self._in_flight is not None:
            self._in_flight.run()
            self._in_flight.finish()

    def settled(self, commit: "Commit") -> None:
        """Note that ``commit`` is over."""
        if self._in_flight is commit:
            self._in_flight = None

    def sync(self) -> None:
        """Make everything done so far as durable as the medium promises; blocks.

        Raises:
            MediumError: the medium refused; the pool is read-only from now on.

        Crash: everything or nothing of the group that was pending.
        """
        commit = self.begin_commit()
        commit.run()
        commit.finish()


def new_generation() -> int:
    """Return a number for a half's batches that no batch in the pool has.

    A half may hold batches of a checkpoint that was given up, or that a crash ended; they must not
    be taken for those of the next one, and nobody must be able to store some that will.
    """
    return int.from_bytes(os.urandom(8), "little")


class Commit:
    """One group of transactions on its way to a page-cache medium."""

    def __init__(
        self, journal: Journal, records: list[bytes], freed: list[Run], *, switch: bool
    ) -> None:
        self.size = BATCH.size + sum(map(len, records))
        """Bytes that the group takes in the log."""
        self.freed = freed
        """Runs that are free once the group is durable."""
        self._journal = journal
        self._records = records
        self._next_oid = journal.next_oid
        self._log = journal.log
        self._switch = switch
        self._superblock: Superblock | None = None
        self._error: VfsmapError | None = None
        self._ran = False

    def run(self) -> None:
        """Write the data back, then the log; blocks, and may run in any thread.

        Raises:
            MediumError: the medium refused; the pool is read-only from now on.

        Crash: all transactions of the group or none; data of existing extents page by page.
        """
        with self._journal.io:
            if not self._ran:
                self._ran = True
                try:
                    self._write()
                except VfsmapError as exc:
                    self._error = exc
                    self._journal.fail(exc)
                except MemoryError as exc:
                    self._error = MediumError(f"a group commit was broken off: {exc!r}")
                    self._journal.fail(self._error)
        if self._error is not None:
            raise self._error

    def _write(self) -> None:
        journal = self._journal
        if journal.failed is not None:
            raise ReadOnly(f"the pool turned read-only: {journal.failed}")
        journal.pmem.sync()
        if self._switch:
            self._superblock = journal.write_switched(self._log)
        elif self._records:
            at = self._log.append(self._records, self._next_oid)
            journal.pmem.persist(at, self._log.tail - at)  # the commit point

    def finish(self) -> None:
        """Free what the group freed; in the owner's thread, after ``run``.

        What nobody has run, as whoever was to do it was cancelled or got no thread, is run here.

        Raises:
            MediumError: the medium refused; the pool is read-only from now on.
        """
        if not self._ran:
            self.run()
        if self._superblock is not None:
            self._journal.switched(self._superblock)
            self._superblock = None
        if self._error is None:
            freed, self.freed = self.freed, []
            for start, length in freed:
                self._journal.space.free(start, length)
        self._journal.settled(self)
