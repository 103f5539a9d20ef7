"""The client against a peer that says what the test wants it to."""

import array
import gc
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vfsmap.daemon import attach, client
from vfsmap.daemon.client import Client, close_all, medium_of, mounter_of
from vfsmap.errors import (
    Busy,
    DaemonUnreachable,
    Invalid,
    IsADirectory,
    NotFound,
    ProtocolError,
    Unsupported,
)
from vfsmap.pmem import Commit, Medium, libc
from vfsmap.units import PMD


class Peer:
    """A daemon of a few lines: answers each call by what its method is told to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.answers: dict[str, bytes] = {}
        self.descriptors: tuple[int, ...] = ()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self.sock: socket.socket | None = None

    def _run(self) -> None:
        while True:
            sock, _ = self._listener.accept()
            self.sock = sock
            with sock:
                if self._serve(sock):
                    return

    def _serve(self, sock: socket.socket) -> bool:
        data = b""
        while True:
            try:
                piece = sock.recv(1 << 16)
            except OSError:
                return False
            if not piece:
                return False
            data += piece
            while b"\0" in data:
                raw, _, data = data.partition(b"\0")
                call = msgspec.json.decode(raw)
                method = call["method"].rpartition(".")[2]
                if method == "Stop":
                    return True
                self.seen.append((method, call.get("parameters", {})))
                if call.get("oneway"):
                    continue
                answer = self.answers.get(method, b"{}\0")
                if not answer:
                    return False
                rights = array.array("i", self.descriptors)
                with suppress(BrokenPipeError):  # who has asked is gone
                    sock.sendmsg([answer], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])

    def stop(self) -> None:
        with socket.socket(socket.AF_UNIX) as last:
            if self.sock is not None:
                with suppress(OSError):
                    self.sock.shutdown(socket.SHUT_RDWR)
            last.connect(str(self.path))
            last.send(b'{"method":"a.Stop"}\0')
            self._thread.join()
        self._listener.close()


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    made = Peer(tmp_path / "s")
    yield made
    made.stop()


def test_a_call_returns_the_result_and_the_descriptors(peer: Peer) -> None:
    peer.answers["Do"] = b'{"parameters":{"x":1}}\0'
    peer.descriptors = (0, 1)
    with Client(peer.path) as one:
        result, descriptors = one.call("Do", a=1, b="two")
    assert result == {"x": 1}
    assert len(descriptors) == 2
    assert peer.seen == [("Do", {"a": 1, "b": "two"})]
    for fd in descriptors:
        assert not os.get_inheritable(fd)
        os.close(fd)


def test_an_error_is_raised_as_its_class_and_leaks_no_descriptor(peer: Peer) -> None:
    peer.answers["Do"] = b'{"error":"io.vfsmap.Mapping.Busy","parameters":{"message":"m"}}\0'
    peer.descriptors = (0,)
    with Client(peer.path) as one:
        close_all(one.call("Hello")[1])
        gc.collect()  # what earlier tests have left is closed now, not meanwhile
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(Busy, match=r"^m$"):
            one.call("Do")
        assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("answer", [b"rubbish\0", b"[]\0", b'{"parameters":[1]}x\0', b"\0"])
def test_an_answer_that_makes_no_sense_is_a_protocol_error(peer: Peer, answer: bytes) -> None:
    peer.answers["Do"] = answer
    peer.descriptors = (0,)
    with Client(peer.path) as one:
        close_all(one.call("Hello")[1])
        gc.collect()  # what earlier tests have left is closed now, not meanwhile
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(ProtocolError):
            one.call("Do")
        assert len(os.listdir("/proc/self/fd")) <= before


def test_a_daemon_that_hangs_up_or_is_not_there_is_unreachable(peer: Peer, tmp_path: Path) -> None:
    peer.answers["Do"] = b""
    with Client(peer.path) as one:
        close_all(one.call("Hello")[1])
        with pytest.raises(DaemonUnreachable, match="has gone away"):
            one.call("Do")
        assert not one.is_alive()
    with pytest.raises(DaemonUnreachable, match="no mapping daemon answers"):
        Client(tmp_path / "nobody")


def test_a_daemon_that_never_answers_a_connection_may_have_no_room_for_it(peer: Peer) -> None:
    peer.answers["Do"] = b""
    with (
        Client(peer.path) as one,
        pytest.raises(DaemonUnreachable, match="all the connections it takes; try again"),
    ):
        one.call("Do")


def test_a_call_that_is_interrupted_costs_the_connection_and_not_the_next_answer(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Client(peer.path) as one:

        def interrupted() -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(one, "_receive", interrupted)
            with pytest.raises(KeyboardInterrupt):
                one.call("Do")
        with pytest.raises(DaemonUnreachable):
            one.call("Do")


class Window:
    """Gives its lease back when it is collected, as a window does."""

    def __init__(self, one: Client) -> None:
        self.client = one
        self.me = self  # only the collector finds it

    def __del__(self) -> None:
        self.client.release(5)


def test_a_window_that_is_collected_in_the_middle_of_a_call_gives_its_lease_back_afterwards(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Client(peer.path) as one:
        real = one._receive
        Window(one)

        def collect_first() -> Any:
            gc.collect()
            return real()

        with monkeypatch.context() as patched:
            patched.setattr(one, "_receive", collect_first)
            one.call("Do")
        assert [method for method, _ in peer.seen] == ["Do", "Release"]
        one.call("Do")


def test_a_dropped_lease_is_given_back_at_once_and_nobody_waits_for_an_answer(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Client(peer.path) as one:
        with monkeypatch.context() as patched:
            patched.setattr(one, "_receive", lambda: pytest.fail("somebody waited"))
            one.drop(5, alone=True)
        one.call("Do")
    assert peer.seen == [("Release", {"lease": 5, "alone": True}), ("Do", {})]


def test_a_lease_that_is_dropped_while_somebody_calls_is_given_back_afterwards(peer: Peer) -> None:
    with Client(peer.path) as one:
        with one._lock:
            one.drop(5)
        one.call("Do")
    assert [method for method, _ in peer.seen] == ["Do", "Release"]


def test_a_lease_that_finds_no_room_in_the_socket_is_given_back_by_the_next_call(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Client(peer.path) as one:
        with monkeypatch.context() as patched:
            patched.setattr(libc, "send_held", lambda fd, data: 0)
            one.drop(5)
        one.call("Do")
    assert [method for method, _ in peer.seen] == ["Do", "Release"]


def test_a_lease_can_be_dropped_when_the_daemon_is_gone(peer: Peer) -> None:
    peer.answers["Do"] = b""
    with Client(peer.path) as one:
        with pytest.raises(DaemonUnreachable):
            one.call("Do")
        one.drop(5)


def test_many_threads_share_a_connection(peer: Peer) -> None:
    with Client(peer.path) as one:

        def use(number: int) -> None:
            one.release(number)
            one.call("Do", n=number)

        threads = [threading.Thread(target=use, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        one.call("Do")
    released = sorted(p["lease"] for method, p in peer.seen if method == "Release")
    assert released == list(range(8))


def test_a_lease_can_be_given_back_to_a_daemon_that_is_gone(peer: Peer) -> None:
    peer.answers["Release"] = b""
    with Client(peer.path) as one:
        one.release(1)
        one.release(2)


@contextmanager
def forked(function: Any) -> Iterator[bytes]:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, repr(function()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        yield pipe.read()
    os.waitpid(child, 0)


def test_a_forked_child_lets_go_of_its_parents_connections(peer: Peer) -> None:
    with Client(peer.path) as one:
        one.call("Do")

        def in_child() -> object:
            one.release(9)  # the parent's lease is not the child's to give back
            try:
                one.call("Do")
            except DaemonUnreachable:
                return one._socket.fileno(), client.clients._by_device
            return "called"

        with forked(in_child) as said:
            assert said == b"(-1, {})"
        one.call("Again")
        assert [method for method, _ in peer.seen] == ["Do", "Again"]


def test_a_medium_is_what_the_daemon_says() -> None:
    said = {"name": "tmpfs", "commit": "store", "page_size": 4096, "huge": "always"}
    assert medium_of(said) == Medium("tmpfs", Commit.STORE, 4096, "always")
    for nonsense in ({}, {**said, "commit": "magic"}):
        with pytest.raises(ProtocolError, match="makes no sense"):
            medium_of(nonsense)


def test_an_attribute_on_another_file_system_leads_nowhere(tmp_path: Path) -> None:
    path = tmp_path / "bait"
    path.write_bytes(bytes(8192))
    os.setxattr(path, "user.vfsmap.socket", b"/run/somebody/elses.socket")
    assert mounter_of(path.stat().st_dev) is None
    with attach.map(path) as window:
        assert not window.direct
    with pytest.raises(Invalid, match="not on a mounted pool"):
        client.connect(path)
    with pytest.raises(NotFound, match="No such file"):
        client.connect(tmp_path / "missing")


def test_a_socket_of_somebody_else_is_not_believed(
    peer: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "mounter_of", lambda device: 12345)
    monkeypatch.setattr(client, "socket_of", lambda path: peer.path)
    with client._find(tmp_path, 1) or pytest.fail("no client"):
        pass
    monkeypatch.setattr(Client, "server_uid", property(lambda self: 54321))
    with pytest.raises(DaemonUnreachable, match=r"belongs to user 54321, but .* by user 12345"):
        client._find(tmp_path, 1)


def test_a_lease_whose_descriptor_got_lost_is_given_back(
    peer: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"hello")
    peer.answers["Map"] = b'{"parameters":{"lease":7,"pool":0,"extents":[],"length":0}}\0'
    with Client(peer.path) as one:
        monkeypatch.setattr(client.clients, "get", lambda path, device: one)
        with pytest.raises(ProtocolError, match="makes no sense"):
            attach.map(path)
        assert peer.seen[1:] == [("Release", {"lease": 7, "alone": True})]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"sealed": True, "writable": True}, "shared read window"),
        ({"sealed": True, "private": True}, "shared read window"),
        ({"private": True, "writable": True}, "leave writable out"),
        ({"cow": PMD}, "private=True as well"),
        ({"offset": -1}, "neither can be negative"),
        ({"length": -1}, "neither can be negative"),
        ({"length": 1 << 40}, "not inside the file"),
        ({"offset": 1 << 40, "length": 1}, "not inside the file"),
    ],
)
def test_what_can_not_be_asked_for_is_refused(
    tmp_path: Path, options: dict[str, Any], complaint: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(8192))
    with pytest.raises(Invalid, match=complaint):
        attach.map(path, **options)


def test_files_elsewhere_are_mapped_through_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 64)
    with attach.map(path, offset=300, length=5000, writable=True) as window:
        assert not window.direct
        window.view()[0] = 7
        window.publish()
    assert path.read_bytes()[300] == 7
    with attach.map(path, private=True) as window:
        window.view()[300] = 9
    assert path.read_bytes()[300] == 7
    with attach.map(path, offset=16384) as window:
        assert bytes(window.view()) == b""
    (tmp_path / "empty").touch()
    with attach.map(tmp_path / "empty") as window:
        assert window.length == 0
    with pytest.raises(Unsupported, match="not on a mounted pool"):
        attach.map(path, direct=True)


def test_what_is_no_file_is_refused_with_its_name(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(Invalid, match="fifo is not a regular file"):
        attach.map(tmp_path / "fifo")
    with pytest.raises(IsADirectory, match="is a directory"):
        attach.map(tmp_path)
    with pytest.raises(NotFound, match="missing: No such file"):
        attach.map(tmp_path / "missing")
