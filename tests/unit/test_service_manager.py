"""What we and a service manager tell each other by environment variables."""

import io
import logging
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from vfsmap.errors import Invalid
from vfsmap_tools import manager
from vfsmap_tools.logs import JournalFormatter, is_journal


class Manager:
    """The end of the manager."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def heard(self) -> list[str]:
        lines = []
        while True:
            try:
                lines.append(self._sock.recv(4096).decode())
            except BlockingIOError:
                return lines


@pytest.fixture(params=["path", "abstract"])
def listening(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    name = tempfile.mktemp(prefix="vfsmap-")
    address = name if request.param == "path" else f"\0{name}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(address)
        sock.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", address.replace("\0", "@"))
        yield Manager(sock)
    Path(name).unlink(missing_ok=True)


def test_the_manager_is_told_lines(listening: Manager) -> None:
    manager.notify("READY=1", "STATUS=a b")
    assert listening.heard() == ["READY=1\nSTATUS=a b"]


@pytest.mark.parametrize("address", ["", "vsock:2:1", "relative"])
def test_without_a_manager_nothing_is_told(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    manager.notify("READY=1")


def test_a_manager_that_is_gone_is_logged_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/nonexistent/socket")
    manager.notify("READY=1")
    assert "can't notify" in caplog.text


def test_a_pool_of_any_name_tells_the_manager_nothing_but_its_name(
    listening: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager.notify("READY=1", "STATUS=pool\udcff\nMAINPID=1")
    assert listening.heard() == ["READY=1\nSTATUS=pool\\xff\\nMAINPID=1"]


@pytest.mark.parametrize(
    ("microseconds", "pid", "expected"),
    [
        ("2000000", None, 2.0),
        ("2000000", str(os.getpid()), 2.0),
        ("2000000", "1", None),
        ("", None, None),
        ("soon", None, None),
        ("0", None, None),
    ],
)
def test_the_watchdog_is_for_the_process_that_is_named(
    monkeypatch: pytest.MonkeyPatch, microseconds: str, pid: str | None, expected: float | None
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", microseconds)
    if pid is None:
        monkeypatch.delenv("WATCHDOG_PID", raising=False)
    else:
        monkeypatch.setenv("WATCHDOG_PID", pid)
    assert manager.watchdog_interval() == expected


async def test_the_watchdog_is_fed_twice_as_often_as_asked_also_while_all_is_cancelled(
    listening: Manager, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "10000000")
    with trio.CancelScope() as scope:
        async with manager.watched():
            await trio.sleep(21)
            assert listening.heard() == ["WATCHDOG=1"] * 5
            scope.cancel()
            with trio.CancelScope(shield=True):  # as a mount that writes everything back
                await trio.sleep(20)
            assert listening.heard() == ["WATCHDOG=1"] * 4
    await trio.sleep(20)
    assert listening.heard() == []


# sockets


def passed(monkeypatch: pytest.MonkeyPatch, fd: int, count: int = 1, pid: int = 0) -> None:
    monkeypatch.setattr(manager, "_FIRST_FD", fd)
    monkeypatch.setenv("LISTEN_FDS", str(count))
    monkeypatch.setenv("LISTEN_PID", str(pid or os.getpid()))
    monkeypatch.setenv("LISTEN_FDNAMES", "vfsmap.socket")


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[int]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "socket"))
        sock.listen()
        yield os.dup(sock.fileno())


def test_a_socket_that_was_passed_is_taken_once(
    listener: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.set_inheritable(listener, True)
    passed(monkeypatch, listener)
    taken = manager.take_socket()
    assert taken is not None
    with taken:
        assert taken.getsockname().endswith("/socket")
        assert not os.get_inheritable(listener)
    assert not {"LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"} & set(os.environ)
    assert manager.take_socket() is None


def test_a_socket_for_another_process_is_left_alone(
    listener: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed(monkeypatch, listener, pid=1)
    assert manager.take_socket() is None
    os.close(listener)


def test_two_sockets_are_refused(listener: int, monkeypatch: pytest.MonkeyPatch) -> None:
    second = os.dup(listener)
    passed(monkeypatch, min(listener, second), count=2)
    with pytest.raises(Invalid, match="2 sockets"):
        manager.take_socket()
    os.close(listener)
    os.close(second)


def test_what_is_no_listening_unix_socket_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_INET) as inet, socket.socket(socket.AF_UNIX) as silent:
        for sock in (inet, silent):
            passed(monkeypatch, os.dup(sock.fileno()))
            with pytest.raises(Invalid, match="ListenStream=/PATH"):
                manager.take_socket()
    reader, writer = os.pipe()
    passed(monkeypatch, reader)
    with pytest.raises(Invalid, match="not a socket"):
        manager.take_socket()
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("count", ["0", "-1", "many"])
def test_a_number_of_sockets_that_is_none_is_no_socket(
    monkeypatch: pytest.MonkeyPatch, count: str
) -> None:
    monkeypatch.setenv("LISTEN_FDS", count)
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    assert manager.take_socket() is None


# the journal


def test_each_line_for_the_journal_begins_with_its_priority() -> None:
    formatter = JournalFormatter("%(name)s: %(message)s")
    try:
        raise ZeroDivisionError("a bug")
    except ZeroDivisionError:
        failure = sys.exc_info()
    for level, priority in ((10, 7), (20, 6), (30, 4), (40, 3), (50, 2)):
        record = logging.LogRecord("vfsmap", level, "", 0, "first\nsecond", None, failure)
        lines = formatter.format(record).splitlines()
        assert lines[0] == f"<{priority}>vfsmap: first\\nsecond"
        assert len(lines) > 4
        assert all(line.startswith(f"<{priority}>") for line in lines)


def test_only_the_stream_that_is_named_goes_to_the_journal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with (tmp_path / "journal").open("w") as journal, (tmp_path / "file").open("w") as file:
        status = os.fstat(journal.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        assert is_journal(journal)
        assert not is_journal(file)
        assert not is_journal(io.StringIO())
        monkeypatch.delenv("JOURNAL_STREAM")
        assert not is_journal(journal)
