"""A server dies at the worst of moments, and nothing of it stays."""

import mmap
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyfuse3
import pytest

import vfsmap
from vfsmap.daemon.client import socket_of
from vfsmap.errors import VfsmapError
from vfsmap.testing.commands import served_pool
from vfsmap.testing.commands import vfsmap as vfsmap_command
from vfsmap.testing.killing import Arena, arena, be_server
from vfsmap.testing.media import tmpfs
from vfsmap.testing.posix import STRANGER
from vfsmap.testing.waiting import wait_until
from vfsmap_fuse import keeper
from vfsmap_fuse.operations import Operations
from vfsmap_tools.mounts import find_mount

TEXT = b"t" * 100_000


@pytest.fixture
def made() -> Iterator[Arena]:
    with arena("tmpfs") as made:
        yield made


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_mounting(made: Arena, ready: Connection, *, mounted: bool) -> None:
    really = pyfuse3.init

    def init(*arguments: Any) -> None:
        if mounted:
            really(*arguments)
        die()

    pyfuse3.init = init  # type: ignore[assignment]  # it stands in for the real one
    be_server(made, ready)


def die_in_write(made: Arena, ready: Connection) -> None:
    really = Operations.write

    async def write(self: Operations, fh: int, offset: int, data: bytes) -> int:
        if data.startswith(b"die"):
            die()
        return await really(self, fh, offset, data)

    Operations.write = write  # type: ignore[method-assign]  # it stands in for the real one
    be_server(made, ready)


def hold_a_file(made: Arena, ready: Connection) -> None:
    """Serve, with a file of the mount itself open, as one that a client has sent."""

    class Held:
        def send(self, _: None) -> None:
            threading.Thread(target=self.hold).start()

        def hold(self) -> None:
            os.open(made.directory / "file", os.O_CREAT | os.O_RDWR)
            ready.send(None)

    be_server(made, Held())  # type: ignore[arg-type]  # only send() is called


@pytest.mark.parametrize("mounted", [False, True])
def test_a_server_that_is_killed_while_it_mounts_leaves_no_mount(
    made: Arena, mounted: bool
) -> None:
    serve = partial(die_at_mounting, mounted=mounted)
    with made.start(serve) as ready, pytest.raises(EOFError):
        ready.recv()
    made.kill()
    made.require_nothing_left()
    made.start_and_wait()
    made.stop()


def dirty_and_map(path: Path) -> None:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        view[:3] = b"die"
        with pytest.raises((VfsmapError, OSError)):
            vfsmap.map(path, direct=True)


def test_a_server_that_is_killed_while_it_writes_pages_back_for_a_lease_dies(made: Arena) -> None:
    with made.start(die_in_write) as ready:
        ready.recv()
    path = made.directory / "file"
    path.write_bytes(TEXT)
    client = multiprocessing.Process(target=dirty_and_map, args=(path,))
    client.start()
    assert made.server
    made.server.join(20)
    made.kill()
    made.require_nothing_left()
    client.join()
    assert client.exitcode == 0
    made.require_clean()
    made.start_and_wait()
    assert path.read_bytes() == TEXT
    made.stop()


def test_a_server_that_is_killed_with_a_file_of_its_own_mount_open_dies(made: Arena) -> None:
    with made.start(hold_a_file) as ready:
        ready.recv()
    made.kill()
    made.require_nothing_left()
    made.require_clean()


def test_a_keeper_that_is_asked_to_end_with_its_server_takes_the_mount_away_first() -> None:
    with tmpfs() as place, served_pool(place, "64M") as server:
        pid = server.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        os.kill(pid, signal.SIGKILL)
        for child in map(int, children):
            os.kill(child, signal.SIGTERM)
        wait_until(lambda: find_mount(server.directory) is None)


def test_a_keeper_ends_its_own_mount_and_not_one_that_was_made_over_it() -> None:
    with tmpfs() as place:
        directory = place / "a \\ directory"
        directory.mkdir()
        minors = [os.minor(place.stat().st_dev)]
        for _ in range(2):
            subprocess.run(["mount", "-t", "tmpfs", "vfsmap-test", directory], check=True)
            minors.append(os.minor(directory.stat().st_dev))

        def minor_after_abort(told: int) -> int:
            keeper.abort(str(directory), b"%d\n" % told)
            return os.minor(directory.stat().st_dev)

        try:
            assert minor_after_abort(minors[1]) == minors[2]
            assert minor_after_abort(minors[2]) == minors[1]
            assert minor_after_abort(minors[2]) == minors[1]
            assert minor_after_abort(minors[1]) == minors[0]
        finally:
            while directory.is_mount():
                subprocess.run(["umount", directory], check=True)


@pytest.fixture
def control_files() -> Iterator[None]:
    """Mount the kernel's control files of FUSE connections, as systemd does."""
    where = Path("/sys/fs/fuse/connections")
    there = where.is_mount()
    if not there:
        subprocess.run(["mount", "-t", "fusectl", "fusectl", where], check=True)
    yield
    if not there:
        subprocess.run(["umount", where], check=True)


@pytest.mark.usefixtures("control_files")
def test_a_connection_that_a_user_s_keeper_ends_leaves_neither_mount_nor_descriptor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with tmpfs() as place, served_pool(place, "64M") as server:
        connection = os.minor(server.directory.stat().st_dev)
        before = os.listdir("/proc/self/fd")
        with monkeypatch.context() as patch:
            patch.setattr(os, "geteuid", lambda: STRANGER)
            keeper.abort(str(server.directory), b"%d\n" % connection)
        assert os.listdir("/proc/self/fd") == before
        wait_until(lambda: find_mount(server.directory) is None)


def test_a_server_that_does_not_answer_is_not_asked_before_it_is_unmounted_by_force() -> None:
    with tmpfs() as place, served_pool(place, "64M") as server:
        pid = server.pid
        os.kill(pid, signal.SIGSTOP)
        try:
            code = (
                "import sys; from pathlib import Path; from vfsmap_tools import mounting;"
                "mounting.unmount_and_wait(Path(sys.argv[1]), force=True, lazy=True)"
            )
            subprocess.run([sys.executable, "-c", code, server.directory], check=True, timeout=20)
            assert find_mount(server.directory) is None
        finally:
            os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("command", ["umount", "mount"])
def test_a_mount_whose_keeper_was_killed_too_is_taken_away_by_the_next_command(
    command: str,
) -> None:
    with tmpfs() as place, served_pool(place, "64M") as server:
        (server.directory / "file").write_bytes(TEXT)
        pid = server.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        socket = socket_of(server.directory)
        assert socket
        assert socket.exists()
        with (server.directory / "file").open("rb"):
            for one in (*map(int, children), pid):
                os.kill(one, signal.SIGKILL)
            wait_until(lambda: not Path(f"/proc/{pid}").exists())
            assert find_mount(server.directory)
            if command == "umount":
                vfsmap_command("umount", server.directory)
                assert not find_mount(server.directory)
                assert not socket.exists()
            else:
                server.mount()
                assert (server.directory / "file").read_bytes() == TEXT
