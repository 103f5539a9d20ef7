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

_NAME: Final = re.compile(re.escape(PREFIX).encode() + rb"(\d+)\.(\d+)\.(\d*)\.(\d+)")
Grant = Callable[[Connection, int, int, int | None, int], Lease | None]
"""Grants a read lease at once: connection, inode, offset, length, level; None: it can't be."""


class Tickets:
    """The tickets of a daemon's connections."""

    def __init__(self, grant: Grant) -> None:
        self._grant = grant
        self._numbers: dict[Connection, int] = {}
        self._tickets: dict[int, tuple[Connection, Ticket]] = {}
        self._next = 1

    def of(self, connection: Connection) -> Ticket:
        """Return a connection's ticket."""
        number = self._numbers.get(connection)
        if number is None:
            number, self._next = self._next, self._next + 1
            self._numbers[connection] = number
            ticket = Ticket(f"{PREFIX}{number}", secrets.token_bytes(SECRET_SIZE))
            self._tickets[number] = connection, ticket
        return self._tickets[number][1]

    def end(self, connection: Connection) -> None:
        """Forget the ticket of a client that has hung up."""
        number = self._numbers.pop(connection, None)
        if number is not None:
            del self._tickets[number]

    def lease(self, ino: int, name: bytes, pid: int, uid: int) -> bytes:
        """Return an attribute's value: the lease that a thread (``pid``) of a user asks for.

        Raises:
            NoData: there is no such ticket, it is not that process's, or the lease can't be had so.

        Crash: the lease is gone, as all are; what maps its bytes still is found at the next start.
        """
        asked = _NAME.fullmatch(name)
        if asked is not None:
            number, offset, length, level = asked.groups()
            connection, ticket = self._tickets.get(int(number), (None, None))
            if connection is not None and ticket is not None and _is_of(connection, pid, uid):
                lease = self._try(connection, ino, offset, length, level)
                if lease is not None:
                    return ticket.value(lease)
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
