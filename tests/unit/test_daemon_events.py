import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import trio
import trio.testing

from vfsmap.daemon.closer import Closer
from vfsmap.daemon.connection import DEFAULT_LIMITS, Connection
from vfsmap.daemon.events import Events
from vfsmap.mapping.lease import Holder, LeaseTable

WHO = Holder(7, 8)


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[Connection, socket.socket]]:
    ours, theirs = socket.socketpair()
    connection = Connection(ours, Closer(), DEFAULT_LIMITS)
    yield connection, theirs
    theirs.close()
    connection.close()


def received(sock: socket.socket) -> list[dict[str, object]]:
    sock.setblocking(False)
    raw = b""
    while True:
        try:
            raw += sock.recv(1 << 16)
        except BlockingIOError:
            break
    replies = [msgspec.json.decode(part) for part in raw.split(b"\0")[:-1]]
    assert all(reply["continues"] for reply in replies)
    return [reply["parameters"]["event"] for reply in replies]


async def test_who_listens_is_told_at_once_that_he_does_and_then_everything() -> None:
    events = Events(100)
    events.emit("refused", WHO, detail="before anybody listened")
    lease = LeaseTable().grant(5, 0, 10, writable=True, holder=WHO, extents=[], pin=0)
    async with connected() as (connection, peer), trio.open_nursery() as nursery:
        nursery.start_soon(events.stream, connection)
        await trio.testing.wait_all_tasks_blocked()
        events.emit("granted", WHO, lease)
        events.emit("refused", WHO, detail="no")
        await trio.testing.wait_all_tasks_blocked()
        seen = received(peer)
        nursery.cancel_scope.cancel()
    assert [event["kind"] for event in seen] == ["ready", "granted", "refused"]
    assert {k: seen[1][k] for k in ("lease", "inode", "writable", "pid", "uid")} == {
        "lease": 1,
        "inode": 5,
        "writable": True,
        "pid": 7,
        "uid": 8,
    }
    assert "lease" not in seen[2]


async def test_who_reads_too_slowly_loses_the_oldest_and_is_told_how_many() -> None:
    events = Events(3)
    async with connected() as (connection, peer), trio.open_nursery() as nursery:
        nursery.start_soon(events.stream, connection)
        await trio.testing.wait_all_tasks_blocked()
        for number in range(10):  # nothing is sent before we wait
            events.emit("refused", WHO, detail=str(number))
        await trio.testing.wait_all_tasks_blocked()
        seen = received(peer)[1:]
        nursery.cancel_scope.cancel()
    assert [event["detail"] for event in seen] == ["7", "8", "9"]
    assert [event.get("lost") for event in seen] == [7, None, None]


async def test_the_stream_ends_when_the_listener_hangs_up_or_talks() -> None:
    events = Events(3)
    for farewell in (b"", b"x"):
        async with connected() as (connection, peer), trio.open_nursery() as nursery:
            nursery.start_soon(events.stream, connection)
            await trio.testing.wait_all_tasks_blocked()
            if farewell:
                peer.send(farewell)
            else:
                peer.close()
    assert not events._listeners


async def test_who_is_hung_up_on_while_he_listens_is_no_bug() -> None:
    events = Events(100)
    async with connected() as (connection, _), trio.open_nursery() as nursery:
        nursery.start_soon(events.stream, connection)
        await trio.testing.wait_all_tasks_blocked()
        connection.close()
    assert not events._listeners
