"""``vfsmap top`` on a real mount."""

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vfsmap as library
from vfsmap.testing.commands import Server, served_pool, vfsmap
from vfsmap.testing.media import tmpfs
from vfsmap.units import MIB


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with tmpfs(huge="always", size="200M") as place, served_pool(place, "128M") as served:
        yield served


def test_one_sample_tells_requests_leases_and_coverage(server: Server) -> None:
    file = server.directory / "large"
    file.write_bytes(bytes(4 * MIB))
    with library.map(file, writable=True):
        sample = json.loads(vfsmap("top", server.directory, "--json", "--interval", "0.1").stdout)
    assert sample["leases"] == sample["writable_leases"] == 1
    assert sample["coverage"]["huge"] == sample["coverage"]["large"] == 4 * MIB
    writes = next(each for each in sample["requests"] if each["name"] == "write")
    assert writes["count"] >= 4
    assert sample["seconds"] >= 0.1


def test_in_a_pipe_it_prints_one_view_after_the_other(server: Server) -> None:
    shown = vfsmap("top", server.directory, "--interval", "0.1", "--count", "2").stdout
    assert shown.count(f"{server.directory}: ") == 2
    assert "requests/s" in shown


def test_on_a_terminal_it_gives_the_screen_back_when_it_is_ended(server: Server) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "vfsmap_tools.cli", "top", str(server.directory)]
    environment = {**os.environ, "TERM": "xterm"}
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        seen = b""
        while b"looking" not in seen:
            seen += os.read(ours, 4096)
        process.send_signal(signal.SIGTERM)
        while True:
            try:
                seen += os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
        assert process.wait() == 0
    os.close(ours)
    assert seen.rstrip().endswith(b"\x1b[?25h") or b"\x1b[?1049l" in seen
    assert b"Traceback" not in seen


def test_where_no_pool_is_mounted_it_says_so(tmp_path: Path) -> None:
    failed = vfsmap("top", tmp_path, check=False)
    assert failed.returncode == 2
    assert "no mapping daemon" in failed.stderr
