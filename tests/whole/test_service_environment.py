"""A server in the environment that a service manager makes, without the manager."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfsmap.daemon.client import Client
from vfsmap.testing.commands import vfsmap

CLI = (sys.executable, "-m", "vfsmap_tools.cli")


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    vfsmap("format", tmp_path / "pool", "--size", "16M")
    return tmp_path / "pool"


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(60)
        yield sock


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_a_server_tells_when_it_is_ready_lives_and_ends(
    pool: Path, manager: socket.socket, end: signal.Signals
) -> None:
    path = pool.with_name("socket")
    environment = {"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "200000"}
    with subprocess.Popen(
        [*CLI, "serve", "--foreground", str(pool), "--socket", str(path)],
        env={**os.environ, **environment},
    ) as server:
        heard = []
        while "READY=1" not in (line := manager.recv(4096).decode()):
            heard.append(line)
        assert set(heard) <= {"WATCHDOG=1"}
        assert line == f"READY=1\nSTATUS={pool}"
        assert Client(path).call("GetInfo")[0]["pool"] == str(pool)
        assert manager.recv(4096) == b"WATCHDOG=1"
        server.send_signal(end)
        while (line := manager.recv(4096).decode()) != "STOPPING=1":
            assert line == "WATCHDOG=1"
        assert server.wait(60) == 0


def test_a_passed_socket_is_used_and_stays(pool: Path, manager: socket.socket) -> None:
    path = pool.with_name("socket")
    activate = ("systemd-socket-activate", "-E", "NOTIFY_SOCKET", "-l", str(path))
    with subprocess.Popen(
        [*activate, *CLI, "serve", "--foreground", str(pool)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "NOTIFY_SOCKET": manager.getsockname()},
    ) as server:
        assert server.stderr is not None
        while "Listening on" not in server.stderr.readline():
            pass
        assert Client(path).call("GetInfo")[0]["pool"] == str(pool)
        assert b"READY=1" in manager.recv(4096)
        server.terminate()
        assert server.wait(60) == 0
        assert path.is_socket()


def test_complaints_to_the_journal_have_a_priority(tmp_path: Path) -> None:
    for line in ("", "<3>"):
        with (tmp_path / "journal").open("w+") as journal:
            status = os.fstat(journal.fileno())
            stream = f"{status.st_dev}:{status.st_ino}" if line else "1:1"
            command = [*CLI, "serve", "--foreground", str(tmp_path / "none")]
            subprocess.run(
                command, stderr=journal, check=False, env={**os.environ, "JOURNAL_STREAM": stream}
            )
            journal.seek(0)
            assert journal.read().startswith(f"{line}vfsmap: can't open {tmp_path}/none")
