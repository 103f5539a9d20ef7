"""A checkpoint: the live objects, copied to the other half of the log a slice at a time.

Transactions go on meanwhile, and every one is appended to the new half as well.  A slice holds the
objects as they are when it is written, so whatever order slices and transactions come in, the new
half replays to the state of the moment it is switched to.
"""

from collections.abc import Mapping, Sequence

from vfsmap.pool.log import LogHalf
from vfsmap.units import KIB

_SLICE = 32 * KIB


class Checkpoint:
    """One checkpoint under way."""

    def __init__(self, half: LogHalf, objects: Mapping[int, bytes]) -> None:
        """Prepare to copy ``objects``, which goes on changing, to the empty ``half``."""
        self.half = half
        self._objects = objects
        self._to_copy = iter(list(objects))
        self.done = False

    def copy(self, least: int, next_oid: int) -> bool:
        """Copy at least so many bytes of objects, or all that are left; False: no room.

        Crash: the half is not in use yet, so nothing has happened.
        """
        while least > 0 and not self.done:
            records = self._next_slice()
            if not self.follow(records, next_oid):
                return False
            least -= sum(map(len, records))
        return True

    def copy_all(self, next_oid: int) -> bool:
        """Copy all objects that are left; False: no room.

        Crash: the half is not in use yet, so nothing has happened.
        """
        while not self.done:
            if not self.copy(_SLICE, next_oid):
                return False
        return True

    def follow(self, records: Sequence[bytes], next_oid: int) -> bool:
        """Append records that were committed meanwhile; False: no room.

        Crash: the half is not in use yet, so nothing has happened.
        """
        if sum(map(len, records)) > self.half.room:
            return False
        self.half.append(records, next_oid)
        return True

    def _next_slice(self) -> list[bytes]:
        """Return the next records to copy, and note whether they are the last."""
        records: list[bytes] = []
        size = 0
        for oid in self._to_copy:
            rec = self._objects.get(oid)
            if rec is not None:
                records.append(rec)
                size += len(rec)
                if size >= _SLICE:
                    return records
        self.done = True
        return records
