"""A client, then the server, killed at one step of mapping after the other.

A step is a call of a function, as sys.setprofile() tells of them.
"""

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import vfsmap
from vfsmap.daemon.client import connect
from vfsmap.testing.commands import Server, served_pool
from vfsmap.testing.media import tmpfs
from vfsmap.testing.posix import in_child
from vfsmap.testing.waiting import wait_until
from vfsmap.units import KIB, MIB

OLD, NEW = b"o" * 3 * MIB, b"n" * 4 * KIB
FAST = 20
"""Steps that are tried in a usual run; all of them are in a slow one."""


def use_window(path: Path) -> None:
    """Map a file, store into it, show that, and let go."""
    with vfsmap.map(path, writable=True, direct=True) as window:
        window.view()[MIB : MIB + len(NEW)] = NEW
        window.persist(MIB, len(NEW))
        window.publish()


def die_at(step: int, counts: Callable[[FrameType], bool]) -> list[int]:
    """Have this process kill itself at a step; return where the steps are counted."""
    count = [0]

    def at_call(frame: FrameType, event: str, _: Any) -> None:
        if event in ("call", "c_call") and counts(frame):
            count[0] += 1
            if count[0] == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(at_call)
    return count


def some(steps: int, most: int = FAST) -> list[int]:
    """Return up to so many steps, evenly spread, the first and the last among them."""
    most = min(most, steps)
    return sorted({1 + n * (steps - 1) // (most - 1) for n in range(most)})


@pytest.fixture
def server() -> Iterator[Server]:
    with tmpfs(size="80M") as place, served_pool(place, "64M") as served:
        yield served


def kill_clients(server: Server, most: int) -> None:
    path = server.directory / "file"
    path.write_bytes(OLD)

    def mapped(step: int) -> int:
        count = die_at(step, lambda frame: "vfsmap" in frame.f_code.co_filename)
        use_window(path)
        sys.setprofile(None)
        return count[0]

    def can_be_cut() -> bool:
        try:
            os.truncate(path, 0)
        except OSError as exc:
            if exc.errno != errno.EBUSY:
                raise
            return False
        return True

    status, said = in_child(lambda: mapped(0))
    assert status == 0
    wait_until(can_be_cut)
    descriptors = len(os.listdir(f"/proc/{server.pid}/fd"))
    free = os.statvfs(server.directory).f_bfree
    tried, killed = some(int(said), most), 0
    for step in tried:
        path.write_bytes(OLD)
        status, _ = in_child(partial(mapped, step))
        killed += status == -signal.SIGKILL  # the last steps are not always so many
        wait_until(can_be_cut)
    assert killed >= len(tried) - 3
    with connect(server.directory) as client:
        wait_until(lambda: client.call("Leases")[0]["leases"] == [])
    wait_until(lambda: os.statvfs(server.directory).f_bfree == free)
    wait_until(lambda: len(os.listdir(f"/proc/{server.pid}/fd")) <= descriptors)
    path.write_bytes(OLD)
    use_window(path)
    assert path.read_bytes()[MIB : MIB + len(NEW)] == NEW
    assert "ERROR" not in server.log.read_text()


def test_a_client_killed_at_some_steps_of_mapping_leaves_nothing_behind(server: Server) -> None:
    kill_clients(server, FAST)


@pytest.mark.slow
def test_a_client_killed_at_any_step_of_mapping_leaves_nothing_behind(server: Server) -> None:
    kill_clients(server, 100_000)
