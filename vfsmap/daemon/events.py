"""Events: what happens to leases, for those who listen."""

import time
from collections import deque
from contextlib import suppress
from typing import Any, Literal, get_args

import msgspec
import trio

from vfsmap.daemon.connection import Connection
from vfsmap.daemon.varlink import Reply
from vfsmap.errors import ProtocolError
from vfsmap.mapping.lease import Holder, Lease

Kind = Literal["ready", "granted", "ended", "refused", "violation"]


class Event(msgspec.Struct, omit_defaults=True):
    """Something that has happened; the fields are those of the interface."""

    time_ns: int
    kind: Kind
    pid: int
    uid: int
    lease: int | None = None
    inode: int | None = None
    offset: int | None = None
    length: int | None = None
    writable: bool | None = None
    detail: str | None = None
    lost: int | None = None


class _Listener:
    """One who listens, and what it has not been told yet."""

    def __init__(self, events_max: int) -> None:
        self._events: deque[Event] = deque()
        self._events_max = events_max
        self._lost = 0
        self._some = trio.Event()

    def put(self, event: Event) -> None:
        """Add an event; the oldest goes when there are too many."""
        if len(self._events) >= self._events_max:
            self._events.popleft()
            self._lost += 1
        self._events.append(event)
        self._some.set()

    async def get(self) -> Event:
        """Return the next event, which tells how many before it were lost."""
        while not self._events:
            self._some = trio.Event()
            await self._some.wait()
        event = self._events.popleft()
        if self._lost:
            event, self._lost = msgspec.structs.replace(event, lost=self._lost), 0
        return event


class Events:
    """Tells all who listen."""

    def __init__(self, events_max: int) -> None:
        self._events_max = events_max
        self._listeners: set[_Listener] = set()
        self.counts: dict[str, int] = dict.fromkeys(get_args(Kind), 0)
        """How many events of each kind there have been, heard by somebody or not."""

    def emit(self, kind: Kind, who: Holder, lease: Lease | None = None, **about: Any) -> None:
        """Tell of something that has happened now; ``who`` did it, ``about`` are fields."""
        self.counts[kind] += 1
        if not self._listeners:
            return
        event = Event(time.time_ns(), kind, who.pid, who.uid)
        if lease is not None:
            event.lease, event.inode, event.writable = lease.lease, lease.inode, lease.writable
            event.offset, event.length = lease.offset, lease.length
        event = msgspec.structs.replace(event, **about)
        for listener in self._listeners:
            listener.put(event)

    async def stream(self, connection: Connection) -> None:
        """Send events until the client hangs up, says something, or stops reading."""
        who = connection.holder
        listener = _Listener(self._events_max)
        listener.put(Event(time.time_ns(), "ready", who.pid, who.uid))
        self._listeners.add(listener)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_forward, connection, listener, nursery.cancel_scope)
                with suppress(trio.ClosedResourceError):  # we hung up: its process is gone
                    await connection.wait_hangup()
                nursery.cancel_scope.cancel()
        finally:
            self._listeners.discard(listener)


async def _forward(connection: Connection, listener: _Listener, scope: trio.CancelScope) -> None:
    try:
        while True:
            event = await listener.get()
            await connection.send(Reply({"event": event}, continues=True))
    except (OSError, ProtocolError):
        scope.cancel()
