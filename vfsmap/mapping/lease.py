"""Leases: who holds a window over which range of which file."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NewType

from vfsmap.errors import NotFound
from vfsmap.units import Extent

LeaseId = NewType("LeaseId", int)


@dataclass(slots=True)
class Holder:
    """A process that holds leases, by its connection."""

    pid: int
    uid: int


@dataclass(slots=True)
class Lease:
    """The record that somebody holds a window."""

    lease: LeaseId
    inode: int
    offset: int
    length: int
    writable: bool
    holder: Holder
    extents: list[Extent]
    pin: int
    """The file system's pin, which keeps the extents in place."""
    granted_ns: int = field(default_factory=time.time_ns)
    orphaned: bool = False
    """The holder has let go, but somebody maps the bytes still."""


class LeaseTable:
    """All leases of a daemon."""

    def __init__(self) -> None:
        self._leases: dict[LeaseId, Lease] = {}
        self._next = 1

    def grant(
        self,
        inode: int,
        offset: int,
        length: int,
        *,
        writable: bool,
        holder: Holder,
        extents: list[Extent],
        pin: int,
    ) -> Lease:
        """Record a new lease."""
        number = LeaseId(self._next)
        self._next += 1
        lease = Lease(number, inode, offset, length, writable, holder, extents, pin)
        self._leases[number] = lease
        return lease

    def get(self, number: int, holder: Holder) -> Lease:
        """Return a lease of a holder.

        Raises:
            NotFound: there is none of that number, or it is somebody else's.
        """
        lease = self._leases.get(LeaseId(number))
        if lease is None or lease.holder is not holder or lease.orphaned:
            raise NotFound(f"there is no lease {number}")
        return lease

    def held_by(self, holder: Holder) -> list[Lease]:
        """Return the leases of a holder."""
        return [lease for lease in self._leases.values() if lease.holder is holder]

    def orphans(self) -> list[Lease]:
        """Return the leases whose holder has let go."""
        return [lease for lease in self._leases.values() if lease.orphaned]

    def end(self, lease: Lease) -> None:
        """Forget a lease."""
        del self._leases[lease.lease]

    def __iter__(self) -> Iterator[Lease]:
        """Yield all leases, the oldest first."""
        return iter(list(self._leases.values()))

    def __len__(self) -> int:
        return len(self._leases)
