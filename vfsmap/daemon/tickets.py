"""The daemon's side of tickets: who has which, and the leases that are asked for with them."""

import os
import re
import secrets
from collections.abc import Callable
from typing import Final

from vfsmap.daemon.connection import Connection
from vfsmap.daemon.ticket import PREFIX, SECRET_SIZE, Ticket
from vfsmap.daemon.varlink import INT_MAX
from vfsmap.errors import NoData, VfsmapError
from vfsmap.mapping.lease import Lease

_NAME: Final = re.compile(rb"(.+)\.(\d+)\.(\d*)\.(\d+)")
_NUMBER_BITS: Final = 63
Grant = Callable[[Connection, int, int, int | None, int], Lease | None]
"""Grants a read lease at once: connection, inode, offset, length, level; None: it can't be."""


class Tickets:
    """The tickets of a daemon's connections.

    Their numbers are random, so that a question that comes to another daemon than it was meant for
    finds no ticket there.
    """

    def __init__(self, grant: Grant) -> None:
        self._grant = grant
        self._given: dict[Connection, Ticket] = {}
        self._holders: dict[bytes, Connection] = {}

    def of(self, connection: Connection) -> Ticket | None:
        """Return a connection's ticket; None: its process can't be told from others."""
        if not connection.holder.pid:  # it is in no process namespace that we know
            return None
        ticket = self._given.get(connection)
        if ticket is None:
            name = f"{PREFIX}{secrets.randbits(_NUMBER_BITS)}"
            ticket = self._given[connection] = Ticket(name, secrets.token_bytes(SECRET_SIZE))
            self._holders[name.encode()] = connection
        return ticket

    def end(self, connection: Connection) -> None:
        """Forget the ticket of a client that has hung up."""
        ticket = self._given.pop(connection, None)
        if ticket is not None:
            del self._holders[ticket.name.encode()]

    def lease(self, ino: int, name: bytes, pid: int, uid: int) -> bytes:
        """Return an attribute's value: the lease that a thread (``pid``) of a user asks for.

        Raises:
            NoData: there is no such ticket, it is not that process's, or the lease can't be had so.

        Crash: the lease is gone, as all are; what maps its bytes still is found at the next start.
        """
        asked = _NAME.fullmatch(name)
        connection = self._holders.get(asked[1]) if asked is not None else None
        if asked is not None and connection is not None and _is_of(connection, pid, uid):
            lease = self._try(connection, ino, *asked.groups()[1:])
            if lease is not None:
                return self._given[connection].value(lease)
        raise NoData("no lease can be had so: call Map")

    def _try(
        self, connection: Connection, ino: int, offset: bytes, length: bytes, level: bytes
    ) -> Lease | None:
        numbers = int(offset), int(length) if length else None, int(level)
        if max(number or 0 for number in numbers) > INT_MAX:
            return None
        try:
            return self._grant(connection, ino, *numbers)
        except VfsmapError:  # the call says why
            return None


def _is_of(connection: Connection, pid: int, uid: int) -> bool:
    """Tell whether a thread is one of the process at a connection's other end."""
    holder = connection.holder
    return (
        not connection.closed
        and uid == holder.uid
        and (pid == holder.pid or os.path.exists(f"/proc/{holder.pid}/task/{pid}"))
    )
