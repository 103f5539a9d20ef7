"""One half of the log: batches appended to it, and replayed from it.

A batch is valid when its magic, generation, sequence and checksum are; the first one that is not
ends the replay.  No batch is stored before the one in front of it is durable, so a valid, newer
batch behind an invalid one can't come from a crash: it is damage.
"""

import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

from vfsmap.errors import PoolDamaged
from vfsmap.pmem import Pmem
from vfsmap.pool.layout import BATCH, BATCH_MAGIC, RECORD

_CHECKSUM = struct.Struct("<I")
_MAGIC_BYTES = BATCH_MAGIC.to_bytes(4, "little")
_MOST_EFFORT = 16  # times that the bytes of a half may be summed in search of newer batches


class Place(NamedTuple):
    """A half of the log in the pool, bytes."""

    start: int
    length: int


def batch_checksum(head: bytes, body: bytes | memoryview, salt: int) -> int:
    """Return a batch's checksum; ``head`` is its header with 0 in the checksum's place."""
    return zlib.crc32(body, zlib.crc32(head, salt))


class LogHalf:
    """Where batches of one generation go, one behind the other."""

    def __init__(self, pmem: Pmem, place: Place, generation: int, salt: int) -> None:
        """Start at the beginning of ``place``; ``salt`` is the CRC-32 of the pool's uuid."""
        self._pmem = pmem
        self.place = place
        self.generation = generation
        self._salt = salt
        self._end = place.start + place.length
        self.tail = place.start
        self.sequence = 0
        self._effort = _MOST_EFFORT * place.length

    @property
    def room(self) -> int:
        """Bytes of records that one more batch can hold."""
        return self._end - self.tail - BATCH.size

    def append(self, records: Sequence[bytes], next_oid: int) -> int:
        """Store one batch and return where it lies; :meth:`Pmem.persist` it, and it is committed.

        Crash: the batch is wholly there, or replay ends in front of it.
        """
        return self.store(self.batch(records, next_oid))

    def batch(self, records: Sequence[bytes], next_oid: int) -> bytes:
        """Return the next batch; what takes memory is done with it."""
        body = b"".join(records)
        length = BATCH.size + len(body)
        head = BATCH.pack(BATCH_MAGIC, 0, self.generation, self.sequence, length, next_oid)
        checksum = batch_checksum(head, body, self._salt)
        return b"%b%b%b%b" % (head[:4], _CHECKSUM.pack(checksum), head[8:], body)

    def store(self, batch: bytes) -> int:
        """Store the next batch; otherwise as :meth:`append`.

        Crash: the batch is wholly there, or replay ends in front of it.
        """
        at = self.tail
        end = at + len(batch)
        assert end <= self._end, "a batch that does not fit would overwrite what is behind"
        self._pmem.store(at, batch)
        self.tail = end
        self.sequence += 1
        return at

    def replay(self, objects: dict[int, bytes]) -> int:
        """Bring ``objects`` up to date with the batches from the tail on, which it advances.

        Returns the smallest number that no object has had.

        Raises:
            PoolDamaged: an invalid batch is followed by valid newer ones.
        """
        next_oid = 0
        while True:
            while batch := self.valid_batch(self.tail, self.sequence):
                length, next_oid = batch
                self.replay_batch(length, objects)
            newer = self.find_newer()
            if newer is None:
                return next_oid
            # a writer may have stored both since we looked
            if not self.valid_batch(self.tail, self.sequence):
                raise PoolDamaged(
                    f"log batch {self.sequence} at {self.tail:#x} is damaged, "
                    f"yet a newer one at {newer[0]:#x} is whole"
                )

    def valid_batch(self, at: int, sequence: int, *, newer: bool = False) -> tuple[int, int] | None:
        """Return length and next_oid of the batch at ``at``, if there is one of that sequence."""
        view = self._pmem.view
        end = self.place.start + self.place.length
        if at + BATCH.size > end:
            return None
        magic, checksum, generation, found, length, next_oid = BATCH.unpack_from(view, at)
        if (
            magic != BATCH_MAGIC
            or generation != self.generation
            or not BATCH.size <= length <= end - at
        ):
            return None
        if found != sequence and not (newer and found > sequence):
            return None
        head = BATCH.pack(BATCH_MAGIC, 0, generation, found, length, next_oid)
        body = view[at + BATCH.size : at + length]
        if batch_checksum(head, body, self._salt) != checksum:
            return None
        return length, next_oid

    def replay_batch(self, batch_length: int, objects: dict[int, bytes]) -> None:
        """Bring ``objects`` up to date with the valid batch at the tail, and go behind it.

        Raises:
            PoolDamaged: a record in it has an impossible length.
        """
        view = self._pmem.view
        unpack = RECORD.unpack_from
        least = RECORD.size
        at, end = self.tail + BATCH.size, self.tail + batch_length
        self.tail = end
        self.sequence += 1
        while at < end:
            length, tag, oid = unpack(view, at) if at + least <= end else (0, 0, 0)
            if length < least or length % 8 or length > end - at:
                raise PoolDamaged(f"log record at {at:#x} has the impossible length {length}")
            if tag:
                objects[oid] = bytes(view[at : at + length])
            else:
                objects.pop(oid, None)
            at += length

    def find_newer(self) -> tuple[int, int] | None:
        """Return place and sequence of the first valid batch behind the tail.

        A crash leaves none there, as no batch is stored before the one in front is durable.

        Raises:
            PoolDamaged: what lies there was made to keep readers busy.
        """
        end = self.place.start + self.place.length
        piece_start = self.tail
        while piece_start < end:
            piece = bytes(self._pmem.view[piece_start : min(piece_start + (1 << 20), end)])
            found = piece.find(_MAGIC_BYTES)
            while found >= 0:
                at = piece_start + found
                if at % 8 == 0:
                    if self.valid_batch(at, self.sequence, newer=True):
                        return at, int.from_bytes(self._pmem.view[at + 16 : at + 24], "little")
                    self._effort -= self._claimed_length(at)
                    if self._effort < 0:
                        raise PoolDamaged(f"the log behind {self.tail:#x} makes no sense")
                found = piece.find(_MAGIC_BYTES, found + 1)
            piece_start += (1 << 20) - 8 if len(piece) == 1 << 20 else len(piece)
        return None

    def _claimed_length(self, at: int) -> int:
        """Return how many bytes were summed in vain for what looked like a batch."""
        end = self.place.start + self.place.length
        if at + BATCH.size > end:
            return 0
        _, _, generation, _, length, _ = BATCH.unpack_from(self._pmem.view, at)
        return length if generation == self.generation and length <= end - at else 0
