"""A checkpoint: the live objects, copied to the other half of the log a slice at a time.

Transactions go on meanwhile, and every one is appended to the new half as well.  A slice holds the
objects as they are when it is written, so whatever order slices and transactions come in, the new
half replays to the state of the moment it is switched to.
"""

from collections.abc import Mapping, Sequence
from itertools import islice

from vfsmap.pool.layout import BATCH
from vfsmap.pool.log import LogHalf

_MOST_OBJECTS = 512


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
        copied = 0
        while copied < least and not self.done:
            oids = list(islice(self._to_copy, _MOST_OBJECTS))
            records = [r for oid in oids if (r := self._objects.get(oid)) is not None]
            if not self.follow(records, next_oid):
                return False
            self.done = len(oids) < _MOST_OBJECTS
            copied += BATCH.size + sum(map(len, records))
        return True

    def follow(self, records: Sequence[bytes], next_oid: int) -> bool:
        """Append records that were committed meanwhile; False: no room.

        Crash: the half is not in use yet, so nothing has happened.
        """
        if sum(map(len, records)) > self.half.room:
            return False
        self.half.append(records, next_oid)
        return True
