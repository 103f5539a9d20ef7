"""A server in the environment that a service manager makes, without the manager."""

import json
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
NAMESPACES = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
JOURNAL = """\
set -eu
mount -t tmpfs run /run
mkdir -p /run/systemd/journal /run/systemd/journald.conf.d "/run/log/journal/$(cat /etc/machine-id)"
printf '[Journal]\\nAudit=\\nReadKMsg=no\\n' > /run/systemd/journald.conf.d/test.conf
/usr/lib/systemd/systemd-journald &
until [ -S /run/systemd/journal/stdout ]; do :; done
systemd-cat -t vfsmap -p debug sh -c \
    'JOURNAL_STREAM=$(stat -Lc %d:%i /proc/self/fd/2) exec "$@"' sh "$@" || true
journalctl --sync
journalctl --quiet -t vfsmap --output json --output-fields MESSAGE,PRIORITY
"""
SPEAKER = """
import logging
from vfsmap_tools.logs import log_to
log_to(None, verbose=True, background=True)
log = logging.getLogger("vfsmap.test")
log.debug("first")
log.info("second\\nline")
log.warning("third")
try:
    raise OSError("gone")
except OSError:
    log.exception("fourth")
log.critical("fifth")
"""


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


def journal_of(*command: object) -> list[tuple[str, str]]:
    """Run a command whose errors go to a systemd-journald; return what journalctl then shows."""
    done = subprocess.run(
        [*NAMESPACES, "sh", "-c", JOURNAL, "sh", *map(str, command)],
        capture_output=True,
        text=True,
        check=True,
    )
    entries = map(json.loads, done.stdout.splitlines())
    return [(entry["PRIORITY"], entry["MESSAGE"]) for entry in entries]


def test_the_journal_shows_each_line_with_its_priority(tmp_path: Path) -> None:
    shown = journal_of(sys.executable, "-c", SPEAKER)
    assert shown[:4] == [
        ("7", "vfsmap.test: first"),
        ("6", r"vfsmap.test: second\nline"),
        ("4", "vfsmap.test: third"),
        ("3", "vfsmap.test: fourth"),
    ]
    assert shown[-2:] == [("3", "OSError: gone"), ("2", "vfsmap.test: fifth")]
    assert {priority for priority, _ in shown[4:-1]} == {"3"}
    complaint, *rest = journal_of(*CLI, "serve", "--foreground", tmp_path / "none")
    assert complaint[0] == "3"
    assert complaint[1].startswith(f"vfsmap: can't open {tmp_path}/none: ")
    assert not rest
