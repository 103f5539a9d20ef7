"""Hostile clients: what they do costs them their connection, and nobody else anything.

The server runs in the test's own loop, over socket pairs, so nothing depends on timing: where time
matters, the clock is the test's.
"""

import array
import gc
import logging
import os
import resource
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from vfsmap.daemon.calls import LeaseCall, Nothing
from vfsmap.daemon.closer import Closer
from vfsmap.daemon.connection import Connection, Limits
from vfsmap.daemon.server import Answer, Caller, Method, Server
from vfsmap.daemon.varlink import Call, encode, encode_parameters
from vfsmap.errors import Busy
from vfsmap.tally import Tallies

CORPUS = sorted((Path(__file__).parents[1] / "data" / "varlink").glob("*.bin"))
PING = encode(Call("io.vfsmap.Mapping.Ping"))
PONG = b'{"parameters":{"pong":1}}\0'


class Handlers:
    """A service of four methods."""

    def __init__(self) -> None:
        self.methods = {
            "Ping": Method(Nothing, self._ping),
            "Bug": Method(Nothing, self._bug),
            "Big": Method(Nothing, self._big),
            "Lease": Method(LeaseCall, self._lease),
        }
        self.trusted = True
        self.gone: list[Connection] = []
        self.calls = Tallies()
        self.pings = 0
        self.received: list[int] = []

    async def _ping(self, caller: Caller, _: Nothing) -> Answer:
        self.pings += 1
        self.received += caller._descriptors
        return Answer({"pong": 1})

    async def _bug(self, _: Caller, __: Nothing) -> Answer:
        raise ZeroDivisionError("a bug")

    async def _big(self, _: Caller, __: Nothing) -> Answer:
        return Answer({"big": "x" * 10_000_000})

    async def _lease(self, _: Caller, wanted: LeaseCall) -> Answer:
        raise Busy(f"lease {wanted.lease} is taken")

    async def stream(self, connection: Connection) -> None:
        await connection.wait_hangup()

    def trusts(self, connection: Connection) -> bool:
        return self.trusted

    def hung_up(self, connection: Connection) -> None:
        self.gone.append(connection)


class RecordingCloser(Closer):
    """Closes at once, and remembers what."""

    def __init__(self) -> None:
        super().__init__()
        self.closed: list[int] = []
        self.choked = False

    def close(self, uid: int, descriptors: Any) -> None:
        for fd in descriptors:
            self.closed.append(fd)
            os.close(fd)

    def is_choked(self, uid: int) -> bool:
        return self.choked


class Peer:
    """The hostile end of a connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.raw = sock
        self.stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    def pass_descriptors(self, data: bytes, fd: int, count: int) -> None:
        rights = array.array("i", [fd] * count)
        self.raw.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])

    async def receive(self) -> bytes:
        """Return what comes up to the next NUL byte, or up to the end."""
        data = b""
        while not data.endswith(b"\0"):
            piece = await self.stream.receive_some(1)
            if not piece:
                break
            data += piece
        return data

    async def is_cut_off(self) -> bool:
        try:
            return await self.stream.receive_some(100) == b""
        except trio.BrokenResourceError:
            return True


class World:
    """A server with its clients."""

    def __init__(self, nursery: trio.Nursery, limits: Limits) -> None:
        self.nursery = nursery
        self.limits = limits
        self.handlers = Handlers()
        self.closer = RecordingCloser()
        self.server = Server(self.handlers, self.closer, limits)
        self.peers: list[Peer] = []

    def connect(self) -> Peer:
        ours, theirs = socket.socketpair(socket.AF_UNIX)
        connection = Connection(ours, self.closer, self.limits)
        self.nursery.start_soon(self.server.serve, connection)
        self.peers.append(Peer(theirs))
        return self.peers[-1]

    async def let_in(self) -> Peer:
        """Connect, and wait until the server has decided what to do about it."""
        peer = self.connect()
        await trio.testing.wait_all_tasks_blocked()
        return peer

    async def require_good_service(self) -> None:
        """Check that somebody else is still served."""
        peer = self.connect()
        await peer.send(PING)
        assert await peer.receive() == PONG
        await peer.stream.aclose()


@asynccontextmanager
async def world(**limits: Any) -> AsyncIterator[World]:
    async with trio.open_nursery() as nursery:
        made = World(nursery, Limits(**{"leisure": 0, "penalty": 0, **limits}))
        yield made
        await made.require_good_service()
        for peer in made.peers:
            await peer.stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert len(made.handlers.gone) == len(made.peers)


@pytest.fixture
def null() -> Iterator[int]:
    fd = os.open("/dev/null", os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.fixture(autouse=True)
def no_descriptor_is_leaked() -> Iterator[None]:
    gc.collect()  # what earlier tests have left is closed now, not meanwhile
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) <= before


async def test_a_call_is_answered() -> None:
    async with world() as w:
        peer = w.connect()
        await peer.send(PING)
        assert await peer.receive() == PONG


async def test_calls_sent_at_once_are_answered_in_their_order() -> None:
    async with world() as w:
        peer = w.connect()
        await peer.send(PING + encode(Call("io.vfsmap.Mapping.Nope")) + PING)
        assert await peer.receive() == PONG
        assert b"MethodNotFound" in await peer.receive()
        assert await peer.receive() == PONG


async def test_a_oneway_call_gets_no_answer_not_even_an_error() -> None:
    async with world() as w:
        peer = w.connect()
        await peer.send(encode(Call("io.vfsmap.Mapping.Nope", oneway=True)))
        await peer.send(encode(Call("io.vfsmap.Mapping.Ping", oneway=True)))
        await peer.send(PING)
        assert await peer.receive() == PONG
        assert w.handlers.pings == 2


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("io.vfsmap.Mapping.Nope", b"org.varlink.service.MethodNotFound"),
        ("io.vfsmap.Mapping.__class__", b"org.varlink.service.MethodNotFound"),
        ("io.vfsmap.Mapping.", b"org.varlink.service.MethodNotFound"),
        ("org.varlink.service.Nope", b"org.varlink.service.MethodNotFound"),
        ("com.example.Ping", b"org.varlink.service.InterfaceNotFound"),
        ("Ping", b"org.varlink.service.InterfaceNotFound"),
        ("", b"org.varlink.service.InterfaceNotFound"),
        ("io.vfsmap.Mapping.Lease", b"org.varlink.service.InvalidParameter"),
        ("io.vfsmap.Mapping.Events", b"org.varlink.service.ExpectedMore"),
    ],
)
async def test_a_call_that_does_not_fit_is_an_error_and_no_more(method: str, error: bytes) -> None:
    async with world() as w:
        peer = w.connect()
        await peer.send(encode(Call(method)))
        assert error in await peer.receive()
        await peer.send(PING)
        assert await peer.receive() == PONG


async def test_an_error_of_ours_goes_by_its_name() -> None:
    async with world() as w:
        peer = w.connect()
        await peer.send(encode(Call("io.vfsmap.Mapping.Lease", encode_parameters({"lease": 7}))))
        reply = msgspec.json.decode((await peer.receive())[:-1])
        assert reply == {
            "error": "io.vfsmap.Mapping.Busy",
            "parameters": {"message": "lease 7 is taken"},
        }


async def test_a_bug_is_logged_and_costs_nobody_a_connection(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with world() as w:
        peer = w.connect()
        await peer.send(encode(Call("io.vfsmap.Mapping.Bug")))
        assert b"io.vfsmap.Mapping.VfsmapError" in await peer.receive()
        assert "ZeroDivisionError: a bug" in caplog.text
        await peer.send(PING)
        assert await peer.receive() == PONG


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
async def test_whatever_is_sent_the_next_client_is_served(path: Path) -> None:
    data = path.read_bytes()  # noqa: ASYNC240  # a small file, and nobody waits
    async with world() as w:
        peer = w.connect()
        with suppress(trio.BrokenResourceError):  # cut off already
            await peer.send(data)


@pytest.mark.parametrize(
    "data",
    [b"\0", b"hello\0", b"{}\0", b"[" * 60_000 + b"\0", b'{"method":1}\0', b"x" * 70_000],
    ids=["empty", "no-json", "no-method", "deep", "wrong-type", "endless"],
)
async def test_what_is_no_call_costs_the_connection(data: bytes) -> None:
    async with world() as w:
        peer = w.connect()
        await peer.send(data)
        assert await peer.is_cut_off()


async def test_a_hangup_in_the_middle_of_a_call_is_nothing_special(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with world() as w:
        for data in (b"", b'{"meth', PING[:-1], PING, PING * 100):
            peer = w.connect()
            await peer.send(data)
            await peer.stream.aclose()
    assert caplog.text == ""


async def test_half_a_call_may_take_ten_seconds_and_no_longer(
    mock_clock: trio.testing.MockClock,
) -> None:
    async with world(patience=10) as w:
        slow, idle = w.connect(), w.connect()
        for byte in PING[:9]:
            await slow.send(bytes([byte]))
            await trio.testing.wait_all_tasks_blocked()
            mock_clock.jump(1)  # each byte comes in time, the whole does not
        await slow.send(PING[9:10])
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(2)
        assert await slow.is_cut_off()
        mock_clock.jump(100_000)  # who has not begun may take for ever
        await idle.send(PING)
        assert await idle.receive() == PONG


async def test_descriptors_without_a_call_may_take_no_longer_either(
    mock_clock: trio.testing.MockClock, null: int
) -> None:
    async with world(patience=10) as w:
        peer = w.connect()
        peer.pass_descriptors(b"{", null, 3)
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(11)
        assert await peer.is_cut_off()
        assert len(w.closer.closed) >= 3


async def test_a_reply_that_is_not_taken_costs_the_connection(
    mock_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with world(patience=10) as w:
        peer = w.connect()
        await peer.send(encode(Call("io.vfsmap.Mapping.Big")))
        await trio.testing.wait_all_tasks_blocked()
        await w.require_good_service()
        mock_clock.jump(11)
        await trio.testing.wait_all_tasks_blocked()
        assert "a reply was not taken within 10 seconds" in caplog.text


async def test_a_reply_larger_than_the_socket_holds_arrives_whole() -> None:
    async with world() as w:
        peer = w.connect()
        await peer.send(encode(Call("io.vfsmap.Mapping.Big")))
        size = len(b'{"parameters":{"big":""}}\0') + 10_000_000
        while size:
            size -= len(await peer.stream.receive_some(1 << 20))


async def test_descriptors_are_closed_when_the_call_has_ended(null: int) -> None:
    async with world() as w:
        peer = w.connect()
        peer.pass_descriptors(PING, null, 8)
        assert await peer.receive() == PONG
        await trio.testing.wait_all_tasks_blocked()
        assert len(w.handlers.received) == 8
        assert w.closer.closed == w.handlers.received


async def test_a_ninth_descriptor_costs_the_connection_and_all_are_closed(null: int) -> None:
    async with world() as w:
        peer = w.connect()
        peer.pass_descriptors(PING, null, 9)
        assert await peer.is_cut_off()
        assert w.handlers.pings == 0


async def test_as_many_descriptors_as_the_kernel_passes_at_once_are_all_closed(null: int) -> None:
    async with world() as w:
        peer = w.connect()
        peer.pass_descriptors(PING, null, 253)
        assert await peer.is_cut_off()
        assert len(w.closer.closed) == 253 + 1  # and the connection's own


async def test_ten_thousand_descriptors_are_never_held_at_once(null: int) -> None:
    async with world() as w:
        peer = w.connect()
        sent = 0
        with suppress(OSError):  # the kernel, or the socket, has had enough
            for _ in range(40):
                peer.pass_descriptors(b"x", null, 250)
                sent += 250
        assert await peer.is_cut_off()
        assert sent >= 250
        assert len(os.listdir("/proc/self/fd")) < 300


async def test_out_of_descriptors_of_our_own_it_is_the_sender_who_is_cut_off(null: int) -> None:
    async with world() as w:
        peer, good = w.connect(), w.connect()
        await trio.testing.wait_all_tasks_blocked()
        with no_free_descriptors(null):
            peer.pass_descriptors(PING, null, 8)
            assert await peer.is_cut_off()
            await good.send(PING)
            assert await good.receive() == PONG


@contextmanager
def no_free_descriptors(fd: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    copies = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        with suppress(OSError):
            while True:
                copies.append(os.dup(fd))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for copy in copies:
            os.close(copy)


async def test_a_flood_of_calls_waits_for_its_turn(null: int) -> None:
    async with world() as w:
        flood = w.connect()
        flooding = PING * 1000  # in the socket at once

        async def read_all() -> None:
            left = len(PONG) * 1000
            while left:
                left -= len(await flood.stream.receive_some(1 << 16))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood.send, flooding)
            nursery.start_soon(read_all)
            good = w.connect()
            before = w.handlers.pings
            await good.send(PING)
            assert await good.receive() == PONG
            # each gets its turn: the good one is not served after a thousand others
            assert w.handlers.pings - before < 100


async def test_who_is_not_trusted_is_served_at_leisure(
    mock_clock: trio.testing.MockClock,
) -> None:
    async with world(leisure=1) as w:
        w.handlers.trusted = False
        peer = w.connect()
        await peer.send(PING * 3)
        assert await peer.receive() == PONG
        await trio.testing.wait_all_tasks_blocked()
        assert w.handlers.pings == 1
        mock_clock.jump(1)
        assert await peer.receive() == PONG
        await peer.stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(1)
        w.handlers.trusted = True


async def test_a_stranger_who_breaks_a_rule_is_hung_up_on_at_leisure_and_others_at_once(
    mock_clock: trio.testing.MockClock,
) -> None:
    async with world(leisure=1, connections_max=2) as w:
        w.handlers.trusted = False
        peer = w.connect()
        await peer.send(b"nonsense\0")
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(BlockingIOError):
            peer.raw.recv(1, socket.MSG_DONTWAIT)
        # only so many are kept waiting: they hold descriptors
        other = w.connect()
        await other.send(b"nonsense\0")
        assert await other.is_cut_off()
        mock_clock.jump(1)
        assert await peer.is_cut_off()
        w.handlers.trusted = True


async def test_one_untrusted_user_has_so_many_connections_and_no_more() -> None:
    async with world(stranger_connections_max=3) as w:
        w.handlers.trusted = False
        peers = [await w.let_in() for _ in range(5)]
        assert [await peer.is_cut_off() for peer in peers[3:]] == [True, True]
        for peer in peers[:3]:
            await peer.send(PING)
            assert await peer.receive() == PONG
        await peers[0].stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        again = w.connect()
        await again.send(PING)
        assert await again.receive() == PONG
        w.handlers.trusted = True


async def test_untrusted_users_together_leave_half_of_the_connections_to_others() -> None:
    async with world(connections_max=6) as w:
        w.handlers.trusted = False
        strangers = [await w.let_in() for _ in range(4)]
        assert await strangers[3].is_cut_off()
        w.handlers.trusted = True
        for _ in range(2):
            peer = w.connect()
            await peer.send(PING)
            assert await peer.receive() == PONG


async def test_who_has_too_much_waiting_to_be_closed_does_not_get_in() -> None:
    async with world() as w:
        w.handlers.trusted = False
        w.closer.choked = True
        assert await w.connect().is_cut_off()
        w.handlers.trusted = True


async def test_who_listens_to_events_and_talks_is_cut_off() -> None:
    async with world() as w:
        peer = w.connect()
        await peer.send(encode(Call("io.vfsmap.Mapping.Events", more=True)))
        await trio.testing.wait_all_tasks_blocked()
        await peer.send(PING)
        assert await peer.is_cut_off()
        impatient = w.connect()
        await impatient.send(encode(Call("io.vfsmap.Mapping.Events", more=True)) + PING)
        assert await impatient.is_cut_off()


async def test_strangers_can_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with world() as w:
        w.handlers.trusted = False
        for _ in range(5):
            peer = w.connect()
            await peer.send(b"rubbish\0")
            assert await peer.is_cut_off()
        w.handlers.trusted = True
    assert caplog.text == ""


async def test_who_is_not_trusted_and_breaks_a_rule_can_not_come_back_at_once(
    mock_clock: trio.testing.MockClock, null: int
) -> None:
    async with world(penalty=1) as w:
        w.handlers.trusted = False
        peer = w.connect()
        peer.pass_descriptors(b"x", null, 9)
        await trio.testing.wait_all_tasks_blocked()
        assert len(w.closer.closed) == 9  # they are not kept meanwhile
        assert w.handlers.gone == []
        mock_clock.jump(1.1)
        assert await peer.is_cut_off()
        w.handlers.trusted = True
