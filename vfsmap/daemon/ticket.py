"""Tickets: asking for one more lease through the mount itself, without a call.

Whoever is granted a read lease can have a ticket with it: the name of an attribute, a secret, and
the pool's path.  To read that attribute of a file, with the range behind its name, is to ask for a
lease on the range.  The kernel asks for the same right as for opening the file to read, and takes
the question to the mount's server, which is the daemon; so it takes one trip where opening the
file, sending its descriptor and closing it take three.

Only what can be granted at once is granted so.  Whatever else is the matter, there is no such
attribute, and the caller finds out by an ordinary call.

The secret is the answer's proof that it is the daemon's: a path may lead to another file system by
the time it is asked, whose attributes are whatever its owner likes.

    attribute  user.vfsmap.lease.TICKET.OFFSET.LENGTH.LEVEL
               decimal numbers; no LENGTH: up to the file's end; LEVEL 0: any
    value      little-endian: the secret (16 bytes), the lease, the length of the range, and for
               each extent its offset, start and length (8 bytes each); at most 4 extents

The value never exceeds 128 bytes: a caller whose buffer is too small would have to ask again, and
hold two leases.
"""

import struct
from typing import Final, NamedTuple

from vfsmap.mapping.lease import Lease
from vfsmap.units import Extent

PREFIX: Final = "user.vfsmap.lease."
VALUE_MAX: Final = 128
"""Bytes of the largest value; what Python's os.getxattr() offers room for at first."""
SECRET_SIZE: Final = 16
_HEAD: Final = struct.Struct(f"<{SECRET_SIZE}sQQ")
_EXTENT: Final = struct.Struct("<3Q")
EXTENTS_MAX: Final = (VALUE_MAX - _HEAD.size) // _EXTENT.size
"""Extents that fit into a value."""


class Ticket(NamedTuple):
    """A connection's ticket."""

    name: str
    """Of the attribute, up to the range."""
    secret: bytes

    def attribute(self, offset: int, length: int | None, level: int) -> str:
        """Return the attribute to read for a lease on a range, in entries of ``level`` bytes."""
        return f"{self.name}.{offset}.{'' if length is None else length}.{level}"

    def value(self, lease: Lease) -> bytes:
        """Return what tells of a lease; it has at most 4 extents."""
        head = _HEAD.pack(self.secret, lease.lease, lease.length)
        return head + b"".join(_EXTENT.pack(*extent) for extent in lease.extents)

    def lease_of(self, value: bytes) -> tuple[int, int, list[Extent]] | None:
        """Return the lease that a value tells of, the range's length, and its extents.

        None: the value is not the daemon's.
        """
        if len(value) < _HEAD.size or (len(value) - _HEAD.size) % _EXTENT.size:
            return None
        secret, lease, length = _HEAD.unpack_from(value)
        if secret != self.secret:
            return None
        return lease, length, [Extent(*e) for e in _EXTENT.iter_unpack(value[_HEAD.size :])]
