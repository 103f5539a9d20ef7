"""Clients of a real mount: they die, fork, outlive the server, send what is dirty, come at once."""

import array
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy
import pytest

import vfsmap
from vfsmap.daemon.client import Client, clients, close_all, connect
from vfsmap.errors import Busy, Invalid, NoSpace, Unsupported
from vfsmap.mapping.overlay import PrivateWindow
from vfsmap.testing.commands import Server, pool_for_all, served_pool
from vfsmap.testing.commands import vfsmap as vfsmap_command
from vfsmap.testing.daemon import Listener, pattern
from vfsmap.testing.media import hugetlbfs, tmpfs
from vfsmap.testing.users import as_user
from vfsmap.units import KIB, MIB, PMD, PTE


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with pool_for_all() as served:
        yield served


@pytest.fixture
def events(server: Server) -> Iterator[Listener]:
    with connect(server.directory) as client:
        yield Listener(client)


@pytest.fixture
def path(server: Server, request: pytest.FixtureRequest) -> Iterator[Path]:
    made = server.directory / f"{abs(hash(request.node.nodeid)):x}"
    made.write_bytes(pattern(8 * MIB))
    yield made
    made.unlink(missing_ok=True)


class Child:
    """A process that maps a file and then does what it is told, line by line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def do(self, statement: str) -> str:
        """Execute a statement in the child; return what its variable ``answer`` holds then."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(statement.replace("\n", ";") + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()


CHILD = """
import mmap, os, sys
import vfsmap
path = sys.argv[1]
space = {"vfsmap": vfsmap, "os": os, "mmap": mmap, "path": path, "answer": "", "sys": sys}
for line in sys.stdin:
    exec(line, space)
    print(space["answer"], flush=True)
"""


@contextmanager
def child(path: Path) -> Iterator[Child]:
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield Child(process)
        process.kill()


# ends


def test_a_killed_holders_lease_ends(path: Path, events: Listener) -> None:
    with child(path) as holder:
        holder.do("w = vfsmap.map(path)")
        lease = events.next("granted")["lease"]
        holder.process.kill()
        assert events.next("ended")["lease"] == lease
    os.truncate(path, 0)


def test_what_a_killed_holder_has_stored_is_seen_by_those_who_had_the_file_open(
    path: Path, events: Listener
) -> None:
    with path.open("rb", buffering=0) as before, child(path) as holder:
        before.read(100)  # now the mount's cache has it
        holder.do("w = vfsmap.map(path, writable=True)")
        events.next("granted")
        holder.do("w.view()[:5] = b'hello'")
        holder.process.kill()
        events.next("ended")
        # the next lease is granted after what was stored has been shown
        with vfsmap.map(path, writable=True):
            before.seek(0)
            assert before.read(5) == b"hello"


def test_a_forked_child_keeps_the_bytes_of_a_window_that_its_parent_has_closed(
    path: Path, server: Server, events: Listener
) -> None:
    with child(path) as holder:
        holder.do("w = vfsmap.map(path)")
        granted = events.next("granted")
        forked = holder.do(
            "r, s = os.pipe()\nr2, s2 = os.pipe()\npid = os.fork()\n"
            "pid or (os.read(r, 1), os.write(s2, bytes(w.view()[4096:4104])), os._exit(0))\n"
            "answer = pid"
        )
        holder.do("w.close()")
        assert events.next("ended")["lease"] == granted["lease"]
        path.unlink()
        fill(server, "flood")
        got = holder.do("os.write(s, b'x')\nanswer = os.read(r2, 8).hex()")
        assert got == (512).to_bytes(8, "little").hex()
        holder.do(f"answer = os.waitpid({forked}, 0)")


def fill(server: Server, name: str) -> None:
    """Fill what is free of the pool, and free it again."""
    path = server.directory / name
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"\xff" * MIB)
    path.unlink()


def test_the_child_of_a_holder_does_not_give_its_parents_lease_back(path: Path) -> None:
    with vfsmap.map(path) as window:
        pid = os.fork()
        if pid == 0:
            window.close()
            os._exit(0)
        os.waitpid(pid, 0)
        with pytest.raises(OSError, match="busy"):
            os.truncate(path, 0)
        with vfsmap.map(path) as again:  # and the connection is as good as before
            assert again.view()[:8] == window.view()[:8]


def test_a_child_can_map_for_itself(path: Path) -> None:
    with vfsmap.map(path):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            with vfsmap.map(path) as window:
                os.write(writer, bytes(window.view()[8:16]))
            os._exit(0)
        assert os.read(reader, 8) == (1).to_bytes(8, "little")
        os.waitpid(pid, 0)
    os.close(reader)
    os.close(writer)


def test_a_sealed_windows_lease_lasts_as_long_as_the_process(path: Path) -> None:
    with child(path) as holder:
        holder.do("w = vfsmap.map(path, sealed=True)\nw.close()")
        with pytest.raises(OSError, match="busy"):
            os.truncate(path, 0)
        holder.process.kill()
        holder.process.wait()
        os.truncate(path, 0)


def test_a_window_that_is_collected_gives_its_lease_back(path: Path, events: Listener) -> None:
    window = vfsmap.map(path)
    events.next("granted")
    del window
    events.next("ended")


def test_an_inherited_window_of_a_killed_server_keeps_its_bytes_under_the_next_one(
    tmp_path: Path,
) -> None:
    with (
        tmpfs(huge="always", size="100M") as place,
        served_pool(place, "64M", "--socket", tmp_path / "s") as own,
    ):
        path = own.directory / "file"
        path.write_bytes(pattern(8 * MIB))
        with child(path) as holder:
            holder.do("w = vfsmap.map(path)\nanswer = w.direct")
            own.kill()
            own.mount()
            path.unlink()
            fill(own, "flood")
            assert holder.do("answer = bytes(w.view()[4096:4104]).hex()") == (
                (512).to_bytes(8, "little").hex()
            )
            free = os.statvfs(own.directory).f_bfree
            holder.do("w.close()")
        # what was withheld is given back by and by
        with child(path) as waiting:
            waiting.do("import time")
            while os.statvfs(own.directory).f_bfree < free + 8 * MIB // (4 * KIB):
                waiting.do("time.sleep(0.05)")


def test_a_client_finds_the_server_that_was_mounted_anew(tmp_path: Path) -> None:
    with (
        tmpfs(size="100M") as place,
        served_pool(place, "64M", "--socket", tmp_path / "s") as own,
    ):
        path = own.directory / "file"
        path.write_bytes(pattern(64 * KIB))
        vfsmap.map(path).close()
        own.kill()
        own.mount()
        with vfsmap.map(path) as window:
            assert window.direct
        own.unmount()
        own.mount()
        with vfsmap.map(path) as window:
            assert window.direct


# what is dirty


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR])
def test_a_dirty_file_is_written_back_and_its_descriptor_closed_without_a_deadlock(
    server: Server, path: Path, flags: int
) -> None:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[:5] = b"dirty"
        fd = os.open(path, flags)
        with connect(server.directory) as client:
            answer, received = client.call("Map", (fd,), file=0)
            start = answer["extents"][0]["start"]
            # before our descriptor is closed: that would write the pages back, too
            assert os.pread(received[0], 5, start) == b"dirty"
            os.close(fd)  # the daemon's copy may be the last one
            close_all(received)
            assert client.call("GetInfo")[0]["mounted"]
    assert path.read_bytes()[:5] == b"dirty"


def test_a_cached_descriptor_that_was_sent_is_in_nobodys_way_when_it_is_closed(
    server: Server, path: Path
) -> None:
    with connect(server.directory) as client:
        for _ in range(20):
            fd = os.open(path, os.O_RDWR)
            with pytest.raises(Busy, match="cache"):
                client.call("Map", (fd,), file=0, writable=True)
            client.call("Allocate", (fd,), file=0, length=4096)
            os.close(fd)
            vfsmap.map(path, writable=True).close()


def test_a_read_lease_sees_what_writeback_has_delayed(tmp_path: Path) -> None:
    with (
        tmpfs(size="100M") as place,
        served_pool(place, "64M", "-o", "writeback", "--socket", tmp_path / "s") as own,
    ):
        path = own.directory / "file"
        with path.open("w+b", buffering=0) as file, connect(own.directory) as client:
            file.write(b"delayed")
            assert written(client) == 0
            # by the descriptor that is there: opening the file anew would write it back
            answer, received = client.call("Map", (file.fileno(),), file=0)
            start = answer["extents"][0]["start"]
            assert os.pread(received[answer["pool"]], 7, start) == b"delayed"
            close_all(received)


def written(client: Client) -> int:
    """Return how many bytes the kernel has written to the mount."""
    requests = client.call("Stats")[0]["requests"]
    return sum(int(tally["bytes"]) for tally in requests if tally["name"] == "write")


def test_the_files_times_tell_of_what_was_stored(path: Path) -> None:
    os.utime(path, ns=(1, 1))
    vfsmap.map(path).close()
    assert path.stat().st_mtime_ns == 1
    with vfsmap.map(path, writable=True) as window:
        window.view()[0] = 1
        window.publish()
        published = path.stat().st_mtime_ns
        assert published > 1
    assert path.stat().st_mtime_ns > published


# windows of other kinds


def test_a_private_window_changes_nothing_but_itself(path: Path) -> None:
    for cow in (PTE, PMD):
        with vfsmap.map(path, private=True, cow=cow) as window:
            assert isinstance(window, PrivateWindow)
            assert window.direct
            assert window.write(5000, b"private") == cow.size
            assert bytes(window.view()[5000:5007]) == b"private"
            assert path.read_bytes() == pattern(8 * MIB)


def test_a_pool_on_hugetlbfs_is_mapped_by_its_pages(tmp_path: Path) -> None:
    with (
        hugetlbfs("2M", 48) as place,
        served_pool(place, "64M", "--socket", tmp_path / "s") as own,
    ):
        small, large = own.directory / "small", own.directory / "large"
        small.write_bytes(pattern(64 * KIB))
        large.write_bytes(pattern(8 * MIB))
        for path in (small, large):
            with vfsmap.map(path, level=PMD, populate=True) as window:
                assert bytes(window.view()) == path.read_bytes()
                assert window.page_sizes()[PMD.size] >= 2 * MIB
        with pytest.raises(Unsupported):
            vfsmap.map(small, private=True, cow=PTE)
        with vfsmap.map(small, private=True) as window:
            window.view()[0] = 99
        assert small.read_bytes() == pattern(64 * KIB)


def test_a_sealed_file_on_hugetlbfs_can_be_mapped_and_verified_however_it_was_written(
    tmp_path: Path,
) -> None:
    with (
        hugetlbfs("2M", 48) as place,
        served_pool(place, "64M", "--socket", tmp_path / "s") as own,
    ):
        files = [own.directory / name for name in ("small", "odd", "sparse", "empty")]
        small, odd, sparse, empty = files
        small.write_bytes(pattern(64 * KIB))
        with odd.open("wb", buffering=0) as file:
            for at in range(0, 5 * MIB + 8, 700_000):
                file.write(pattern(5 * MIB + 8)[at : at + 700_000])
        with sparse.open("wb", buffering=0) as file:
            file.seek(7 * MIB)
            file.write(b"behind a hole")
        empty.touch()
        for path in files:
            content = path.read_bytes()
            vfsmap_command("seal", path)
            assert path.read_bytes() == content
            with vfsmap.map(path, direct=True) as window:
                assert bytes(window.view()) == content
            vfsmap_command("verify", path)
        assert sparse.stat().st_blocks << 9 == 2 * MIB
        own.unmount()
        assert "clean" in vfsmap_command("check", own.pool).stdout


def test_a_sealed_file_on_hugetlbfs_is_verified_even_if_its_tree_lies_in_pieces(
    tmp_path: Path,
) -> None:
    with (
        hugetlbfs("2M", 12) as place,
        served_pool(place, "24M", "--socket", tmp_path / "s") as own,
    ):
        path = own.directory / "large"
        path.write_bytes(pattern(4 * MIB))
        fillers = []
        with suppress(OSError):
            for number in range(2000):
                fillers.append(own.directory / str(number))
                fillers[-1].write_bytes(bytes(16 * KIB))
        for filler in fillers[::2]:
            filler.unlink()
        vfsmap_command("seal", path)
        with connect(own.directory) as client, path.open("rb") as file:
            answer, _ = client.call("Extents", (file.fileno(),), file=0, tree=True)
        assert len(answer["extents"]) > 1
        vfsmap_command("verify", path)


# many and hostile ones


def map_as_member(path: Path) -> list[Any]:
    with vfsmap.map(path) as window:
        seen: list[Any] = [window.direct, bytes(window.view()[8:16]).hex()]
    try:
        vfsmap.map(path, writable=True)
    except Exception as exc:
        seen.append(type(exc).__name__)
    return seen


def test_a_member_of_the_group_gets_the_pool_with_the_rights_it_has(path: Path) -> None:
    path.chmod(0o644)
    expected = [True, (1).to_bytes(8, "little").hex(), "Denied"]
    assert as_user(65534, map_as_member, path, groups=(1,)) == expected


def test_threads_map_and_unmap_side_by_side(server: Server, path: Path) -> None:
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(20):
                offset = (number * 20 + turn) * 4096
                with vfsmap.map(path, offset=offset, length=4096) as window:
                    assert window.view()[:8] == (offset // 8).to_bytes(8, "little")
        except BaseException as exc:
            failures.append(exc)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    with connect(server.directory) as client:
        leases = client.call("Leases")[0]["leases"]
    assert [lease for lease in leases if not lease["orphaned"]] == []


def do_its_worst(address: str, kind: str) -> None:
    """Never return."""
    fd = os.open("/dev/null", os.O_RDONLY)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd] * 250))]
    while True:
        with socket.socket(socket.AF_UNIX) as sock, suppress(OSError):
            sock.settimeout(1)
            sock.connect(address)
            for _ in range(1000):
                if kind == "calls":
                    sock.sendall(b'{"method":"io.vfsmap.Mapping.GetInfo"}\0' * 100)
                elif kind == "descriptors":
                    sock.sendmsg([b"x"], rights)
                else:
                    sock.sendall(b"[" * 65536)


@contextmanager
def hostiles(address: Path, uid: int) -> Iterator[None]:
    children = []
    for kind in ("calls", "descriptors", "nesting"):
        child = os.fork()
        if child == 0:
            try:
                os.setgroups([])
                os.setgid(uid)
                os.setuid(uid)
                do_its_worst(str(address), kind)
            finally:
                os._exit(1)
        children.append(child)
    try:
        yield
    finally:
        for child in children:
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "it was to do its worst to the end"
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


@pytest.mark.parametrize("uid", [0, 65534])
def test_a_good_client_is_served_while_three_hostile_ones_do_their_worst(
    server: Server, path: Path, uid: int
) -> None:
    with connect(server.directory) as client:
        address = client.path
    with hostiles(address, uid):
        for turn in range(100):
            with vfsmap.map(path, offset=turn * 4096, length=4096) as window:
                assert window.direct
                assert window.view()[:8] == (turn * 512).to_bytes(8, "little")
    with Client(address) as client:
        assert client.call("GetInfo")[0]["mounted"]


def test_stats_count_what_the_kernel_asked_for(server: Server, path: Path) -> None:
    def requests() -> dict[str, dict[str, Any]]:
        with connect(server.directory) as client:
            return {each["name"]: each for each in client.call("Stats")[0]["requests"]}

    before = requests()
    with path.open("r+b", buffering=0) as file:
        for _ in range(10):
            file.write(bytes(4 * KIB))
    after = requests()
    assert after["open"]["count"] - before["open"]["count"] >= 1
    assert after["write"]["count"] - before["write"]["count"] == 10
    assert after["write"]["bytes"] - before["write"]["bytes"] == 40 * KIB
    assert after["write"]["time_ns"] > before["write"]["time_ns"]


def test_a_sparse_file_larger_than_the_pool_is_shown_by_the_page_cache_and_fills_nothing(
    server: Server,
) -> None:
    path = server.directory / "sparse"
    with path.open("wb") as file:
        file.write(b"hello")
        file.truncate(1 << 40)
    before = os.statvfs(server.directory).f_bfree
    with vfsmap.map(path) as window:
        assert not window.direct
        assert bytes(window.view()[:6]) == b"hello\0"
    with pytest.raises(NoSpace, match="are not allocated, and the pool has"):
        vfsmap.map(path, direct=True)
    with pytest.raises(NoSpace):
        vfsmap.map(path, writable=True)
    with connect(path) as client, path.open("r+b") as file, pytest.raises(NoSpace):
        client.call("Allocate", (file.fileno(),), file=0, length=1 << 40)
    assert os.statvfs(server.directory).f_bfree == before
    path.unlink()


def test_an_argument_that_makes_no_sense_leaves_other_windows_alone(path: Path) -> None:
    with vfsmap.map(path, writable=True) as window:
        with vfsmap.map(path, offset=numpy.int64(0), length=numpy.int32(5)) as other:
            assert other.length == 5
        for wrong in (4096.0, "1"):
            with pytest.raises(TypeError):
                vfsmap.map(path, offset=wrong)  # type: ignore[arg-type]  # that is what is tried
        with pytest.raises(Invalid, match="no file is so long"):
            vfsmap.map(path, offset=1 << 63)
        with connect(path) as client:
            with pytest.raises(TypeError):
                client.call("Leases", what=object())
            assert client.call("Leases")[0]["leases"]
        window.publish()


def map_as_nobody(path: Path) -> list[object]:
    os.seteuid(65534)
    try:
        with vfsmap.map(path) as window:
            return [window.direct, path.stat().st_dev in clients._by_device]
    finally:
        os.seteuid(0)


def test_who_is_not_trusted_keeps_no_connection_and_asks_the_next_server_again() -> None:
    with tmpfs(size="100M") as place:
        place.chmod(0o755)
        with served_pool(place, "64M") as own:
            path = own.directory / "file"
            path.write_bytes(b"hello")
            assert map_as_nobody(path) == [False, False]
            assert map_as_nobody(path) == [False, False]
            own.unmount()
            os.chown(own.pool, 65534, -1)  # the pool's owner is trusted
            own.mount()
            assert map_as_nobody(path) == [True, True]
