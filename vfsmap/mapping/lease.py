"""Leases: who holds a window over which range of which file.

A lease is granted to a holder, becomes an orphan when the holder releases it or hangs up, and ends
when nobody maps its bytes any more.  This is the record of it; pins and scans are the daemon's.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, NewType

from vfsmap.errors import NoMemory, NotFound
from vfsmap.units import Extent

LeaseId = NewType("LeaseId", int)
LEASES_MAX: Final = 65536
"""Leases of one holder: a process can't have more mappings by default (vm.max_map_count)."""


@dataclass(slots=True, eq=False)
class Holder:
    """A process that holds leases, by one of its connections."""

    pid: int
    uid: int


@dataclass(slots=True, eq=False)
class Lease:
    """The record that somebody holds a window."""

    lease: LeaseId
    inode: int
    offset: int
    length: int
    writable: bool
    holder: Holder
    extents: tuple[Extent, ...]
    """What was handed out: the range and the rest of its units."""
    pin: int
    """The file system's pin, which keeps the extents in place."""
    granted_ns: int = field(default_factory=time.time_ns)
    orphaned: bool = False
    """The holder has let go; somebody may map the bytes still."""


class LeaseTable:
    """All leases of a daemon."""

    def __init__(self) -> None:
        self._leases: dict[LeaseId, Lease] = {}
        self._held: dict[Holder, dict[LeaseId, Lease]] = {}
        self._orphans: dict[LeaseId, Lease] = {}
        self._next = 1

    def require_room(self, holder: Holder, most: int = LEASES_MAX) -> None:
        """Do nothing when a holder may have one more lease.

        Raises:
            NoMemory: it may not.
        """
        if len(self._held.get(holder, ())) >= most:
            raise NoMemory(f"process {holder.pid} holds {most} leases already; release some")

    def grant(
        self,
        inode: int,
        offset: int,
        length: int,
        *,
        writable: bool,
        holder: Holder,
        extents: Iterable[Extent],
        pin: int,
    ) -> Lease:
        """Record a new lease."""
        number = LeaseId(self._next)
        self._next += 1
        lease = Lease(number, inode, offset, length, writable, holder, tuple(extents), pin)
        self._leases[number] = lease
        self._held.setdefault(holder, {})[number] = lease
        return lease

    def get(self, number: int, holder: Holder) -> Lease:
        """Return a lease of a holder.

        Raises:
            NotFound: there is none of that number, it is somebody else's, or was released.
        """
        lease = self._held.get(holder, {}).get(LeaseId(number))
        if lease is None:
            raise NotFound(f"this connection holds no lease {number}")
        return lease

    def held_by(self, holder: Holder) -> list[Lease]:
        """Return the leases of a holder."""
        return list(self._held.get(holder, {}).values())

    def orphan(self, lease: Lease) -> None:
        """Take a lease from its holder."""
        held = self._held[lease.holder]
        del held[lease.lease]
        if not held:
            del self._held[lease.holder]
        lease.orphaned = True
        self._orphans[lease.lease] = lease

    def orphans(self) -> list[Lease]:
        """Return the leases that nobody holds any more."""
        return list(self._orphans.values())

    def end(self, lease: Lease) -> bool:
        """Forget an orphan; False: it was forgotten before."""
        self._leases.pop(lease.lease, None)
        return self._orphans.pop(lease.lease, None) is not None

    def counts(self) -> tuple[int, int]:
        """Return how many leases there are, and how many of them may write."""
        return len(self), sum(lease.writable for lease in self._leases.values())

    def after(self, number: int, most: int) -> list[Lease]:
        """Return at most so many leases, the oldest first, of those with larger numbers."""
        return list(islice((one for one in self._leases.values() if one.lease > number), most))

    def __len__(self) -> int:
        return len(self._leases)
