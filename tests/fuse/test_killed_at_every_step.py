"""A client, then the server, killed at one step of mapping after the other.

A step is a call of a function, as sys.setprofile() tells of them.
"""

import errno
import mmap
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import vfsmap
from vfsmap.daemon.client import connect
from vfsmap.errors import VfsmapError
from vfsmap.testing.commands import Server, served_pool
from vfsmap.testing.killing import Arena, arena, be_server
from vfsmap.testing.media import tmpfs
from vfsmap.testing.posix import in_child
from vfsmap.testing.waiting import wait_until
from vfsmap.units import KIB, MIB

OLD, NEW = b"o" * 3 * MIB, b"n" * 4 * KIB
FAST = 20
"""Steps that are tried in a usual run; all of a client's, and 500 of a server's, in a slow one."""


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

    counts = []
    for _ in range(3):  # one that has to wait takes a few steps more
        path.write_bytes(OLD)
        status, said = in_child(lambda: mapped(0))
        assert status == 0
        counts.append(int(said))
        wait_until(can_be_cut)
    descriptors = len(os.listdir(f"/proc/{server.pid}/fd"))
    free = os.statvfs(server.directory).f_bfree
    tried, killed = some(min(counts), most), 0
    for step in tried:
        path.write_bytes(OLD)
        status, _ = in_child(partial(mapped, step))
        killed += status == -signal.SIGKILL  # the steps are not always so many
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


def use_everything(directory: Path) -> str:
    """Map a sparse file, allocate, write another back for a window, seal it; or say why not."""
    signal.alarm(60)  # rather dead than waiting for a dead server
    try:
        path, other = directory / "file", directory / "other"
        use_window(path)
        with other.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
            view[: len(NEW)] = NEW
            with vfsmap.map(other, direct=True) as window:
                assert window.view()[: len(NEW)] == NEW
        with connect(directory) as client, path.open("r+b") as file:
            client.call("Allocate", (file.fileno(),), file=0, offset=3 * MIB, length=MIB)
            with other.open("rb") as sealed:
                client.call("Seal", (sealed.fileno(),), file=0)
    except (VfsmapError, OSError) as exc:
        return f"refused: {exc}"
    return "done"


def serve_and_die(made: Arena, ready: Connection, *, step: int) -> None:
    """Serve; die at a step counted from one SIGUSR1 to the next, or tell how many there were."""
    count, counting = [0], [False]

    def at_call(frame: FrameType, event: str, _: Any) -> None:
        if counting[0] and event in ("call", "c_call"):
            name = frame.f_globals.get("__name__", "")
            # how often the loop looks for requests is chance
            if name.startswith("vfsmap") and name != "vfsmap_fuse.poll":
                count[0] += 1
                if count[0] == step:
                    os.kill(os.getpid(), signal.SIGKILL)

    def turn(*_: object) -> None:
        counting[0] = not counting[0]
        ready.send(count[0])

    signal.signal(signal.SIGUSR1, turn)
    threading.setprofile(at_call)
    sys.setprofile(at_call)
    be_server(made, ready)


def play(made: Arena, step: int) -> tuple[bool, int]:
    """Have a server die at a step of what a client does; tell whether it did, or of the steps."""
    with made.start(partial(serve_and_die, step=step)) as ready:
        ready.recv()
        require_old_or_new(made)
        for name in ("file", "other"):
            (made.directory / name).unlink(missing_ok=True)
            (made.directory / name).write_bytes(OLD)
            os.truncate(made.directory / name, 4 * MIB)
        assert made.server
        assert made.server.pid
        os.kill(made.server.pid, signal.SIGUSR1)
        ready.recv()
        status, said = in_child(lambda: use_everything(made.directory))
        said, steps = said.strip(b"\"'"), 0
        if killed := said != b"done":
            # a page of a mount that is gone can't be faulted in
            assert said.startswith(b"refused: ") or status == -signal.SIGBUS
            made.server.join(20)
        else:  # between two steps of what follows it may still die
            with suppress(EOFError):
                os.kill(made.server.pid, signal.SIGUSR1)
                steps = ready.recv()
    made.kill()
    made.require_nothing_left()
    made.require_clean()
    return killed, steps


def require_old_or_new(made: Arena) -> None:
    for name, start in (("file", MIB), ("other", 0)):
        if (path := made.directory / name).exists():
            data = path.read_bytes()
            assert len(data) == 4 * MIB
            new = OLD[:start] + NEW + OLD[start + len(NEW) :]
            for at in range(0, len(OLD), len(NEW)):
                piece = slice(at, at + len(NEW))
                assert data[piece] in (OLD[piece], new[piece])
            assert not any(data[len(OLD) :])


def kill_servers(most: int) -> None:
    with arena("tmpfs") as made:
        _, steps = play(made, 0)
        assert steps
        tried = some(steps, most)
        killed = [play(made, step)[0] for step in tried]
        assert sum(killed) >= len(tried) * 3 // 4
        made.start_and_wait()
        require_old_or_new(made)
        made.stop()


def test_a_server_killed_at_some_steps_of_mapping_leaves_a_good_pool_and_no_mount() -> None:
    kill_servers(FAST // 2)


@pytest.mark.slow
def test_a_server_killed_at_many_steps_of_mapping_leaves_a_good_pool_and_no_mount() -> None:
    kill_servers(500)
