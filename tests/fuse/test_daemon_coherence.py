"""Windows and the mount, together, on a real mount with its real daemon."""

import ctypes
import errno
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vfsmap
from vfsmap.daemon.client import Client, connect
from vfsmap.errors import Busy, Denied, Invalid, IsADirectory, NotFound, Sealed, Unsupported
from vfsmap.pmem import libc
from vfsmap.pmem.pages import page_sizes
from vfsmap.testing.commands import Server, served_pool
from vfsmap.testing.media import tmpfs
from vfsmap.testing.posix import refused
from vfsmap.testing.users import as_user
from vfsmap.units import KIB, MIB, PMD, PTE
from vfsmap_fuse.operations import DROPS_WRITTEN_PAGES


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with tmpfs(huge="always", size="600M") as place, served_pool(place, "512M") as served:
        yield served


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    made = connect(server.directory)
    yield made
    made.close()


def fill(path: Path, size: int) -> bytes:
    data = os.urandom(min(size, MIB)) * -(-size // MIB)
    path.write_bytes(data[:size])
    return data[:size]


def test_a_large_file_is_mapped_by_huge_pages_throughout_and_by_small_ones_through_the_mount(
    server: Server,
) -> None:
    path = server.directory / "huge"
    data = fill(path, 16 * MIB)
    with vfsmap.map(path, populate=True, level=PMD) as window:
        assert window.direct
        assert window.view() == data
        assert window.page_sizes()[2 * MIB] == 16 * MIB
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[:] == data
        sizes = kernel_page_sizes(mapped)
        assert sizes.get(2 * MIB, 0) == 0
        assert sizes[4 * KIB] == 16 * MIB


def kernel_page_sizes(mapped: mmap.mmap) -> dict[int, int]:
    return page_sizes(libc.address_of(mapped), len(mapped))


def test_the_tail_of_a_file_that_ends_inside_a_unit_is_huge_and_zero_behind_the_end(
    server: Server,
) -> None:
    path = server.directory / "tail"
    fill(path, 4 * MIB)
    os.truncate(path, 3 * MIB + 5)
    with vfsmap.map(path, populate=True) as window:
        assert len(window.view()) == 3 * MIB + 5
        assert window.page_sizes()[2 * MIB] == 4 * MIB
        behind = (ctypes.c_char * (MIB - 5)).from_address(window.address + 3 * MIB + 5)
        assert not any(behind.raw)


def test_a_store_through_a_window_is_read_through_the_mount_after_publishing(
    server: Server,
) -> None:
    path = server.directory / "published"
    fill(path, 64 * KIB)
    with path.open("rb", buffering=0) as before:
        before.read()  # now the mount's cache has it
        with vfsmap.map(path, writable=True) as window:
            window.view()[100:105] = b"hello"
            window.persist(100, 5)
            window.publish()
            before.seek(100)
            assert before.read(5) == b"hello"


def test_a_write_through_the_mount_is_in_every_window_when_it_returns(server: Server) -> None:
    path = server.directory / "written"
    fill(path, 64 * KIB)
    with vfsmap.map(path) as window, path.open("r+b", buffering=0) as file:
        file.write(b"new bytes")
        assert bytes(window.view()[:9]) == b"new bytes"


def test_stores_into_a_shared_mmap_through_the_mount_are_seen_by_windows_after_msync(
    server: Server,
) -> None:
    path = server.directory / "mmapped"
    fill(path, 64 * KIB)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[:5] = b"early"
        with vfsmap.map(path) as window:
            # a lease is granted only after what was dirty has been written back
            assert bytes(window.view()[:5]) == b"early"
            mapped[:5] = b"later"
            mapped.flush()
            assert bytes(window.view()[:5]) == b"later"


def test_a_writable_window_is_refused_while_a_cached_writer_has_the_file_open(
    server: Server,
) -> None:
    path = server.directory / "cached"
    fill(path, 64 * KIB)
    with path.open("r+b"), pytest.raises(Busy, match="cache"):
        vfsmap.map(path, writable=True)
    with vfsmap.map(path, writable=True):
        pass


@pytest.mark.skipif(
    not DROPS_WRITTEN_PAGES, reason="before Linux 6.18, who only writes is cached like others"
)
def test_a_writable_window_is_granted_while_somebody_only_writes_and_sealing_is_not(
    server: Server,
) -> None:
    path = server.directory / "written"
    fill(path, 64 * KIB)
    with path.open("ab") as appending, pytest.raises(Busy, match="cache"):
        vfsmap.map(path, writable=True)
    assert appending.closed
    fd = os.open(path, os.O_WRONLY)
    with vfsmap.map(path, writable=True) as window:
        os.pwrite(fd, b"write", 100)
        window.view()[105:110] = b"store"
        assert path.read_bytes()[100:110] == b"writestore"
    with refused(errno.EBUSY):
        os.setxattr(path, "user.vfsmap.seal", b"1")
    os.close(fd)
    os.setxattr(path, "user.vfsmap.seal", b"1")


def test_opens_are_uncached_and_a_shared_mmap_fails_while_a_writable_window_exists(
    server: Server,
) -> None:
    path = server.directory / "uncached"
    fill(path, 64 * KIB)
    with vfsmap.map(path, writable=True) as window, path.open("r+b", buffering=0) as file:
        window.view()[:5] = b"store"
        assert file.read(5) == b"store"
        window.view()[:5] = b"again"
        file.seek(0)
        assert file.read(5) == b"again"
        file.seek(10)
        file.write(b"written")
        assert bytes(window.view()[10:17]) == b"written"
        with pytest.raises(OSError, match="No such device") as refused:
            mmap.mmap(file.fileno(), 0)
        assert refused.value.errno == errno.ENODEV
    with path.open("r+b") as cached, mmap.mmap(cached.fileno(), 0):
        pass  # the window is gone: files are cached again


def test_any_number_of_writable_windows_share_a_file(server: Server) -> None:
    path = server.directory / "shared"
    fill(path, 4 * MIB)
    with vfsmap.map(path, writable=True) as one, vfsmap.map(path, writable=True) as other:
        one.view()[MIB] = 7
        assert other.view()[MIB] == 7


def test_a_leased_range_can_not_be_cut_and_can_after_the_window_is_closed(server: Server) -> None:
    path = server.directory / "cut"
    fill(path, 4 * MIB)
    with vfsmap.map(path, offset=0, length=MIB):
        with pytest.raises(OSError, match="busy") as refused:
            os.truncate(path, 4096)
        assert refused.value.errno == errno.EBUSY
        with path.open("ab") as file:
            file.write(b"growing is fine")
    os.truncate(path, 4096)
    assert path.stat().st_size == 4096


def test_an_unlinked_files_window_keeps_its_bytes_until_it_is_closed(server: Server) -> None:
    path = server.directory / "unlinked"
    data = fill(path, 8 * MIB)
    free = os.statvfs(server.directory).f_bfree
    with vfsmap.map(path) as window:
        path.unlink()
        for number in range(4):
            fill(server.directory / f"other{number}", 8 * MIB)
        assert window.view() == data
    wait_until(lambda: os.statvfs(server.directory).f_bfree >= free + 2048 - 4 * 2048)


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Wait for something that happens in another process, which has no way of telling us."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        os.sched_yield()


ORPHAN = """
import os, sys
import vfsmap
from vfsmap.daemon import client
window = vfsmap.map(sys.argv[1])
window.grantor = None
made = list(client.clients._by_device.values())[0]
made._socket.close()               # the connection is dead, the mapping is not
print("ready", flush=True)
sys.stdin.readline()
print(bytes(window.view()[:16]).hex(), flush=True)
os._exit(0)
"""


def test_bytes_of_a_deleted_file_are_not_reused_while_a_dead_connections_mmap_exists(
    server: Server,
) -> None:
    path = server.directory / "orphan"
    data = fill(path, 8 * MIB)
    with subprocess.Popen(
        [sys.executable, "-c", ORPHAN, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        path.unlink()
        free = os.statvfs(server.directory).f_bfree * 4096
        for number in range(free // (32 * MIB) - 1):
            fill(server.directory / f"flood{number}", 32 * MIB)
        holder.stdin.write("\n")
        holder.stdin.flush()
        assert holder.stdout.readline().strip() == data[:16].hex()
        holder.wait()
    for flood in server.directory.glob("flood*"):
        flood.unlink()


def test_mprotect_of_a_read_window_fails_in_the_kernel(server: Server) -> None:
    path = server.directory / "protected"
    fill(path, 4 * MIB)
    with vfsmap.map(path) as window, pytest.raises(PermissionError):
        libc.mprotect(window.mapped[0], 4096, libc.PROT_READ | libc.PROT_WRITE)


STORE = """
import ctypes, sys
import vfsmap
window = vfsmap.map(sys.argv[1])
ctypes.memset(window.address, 0, 1)
"""


def test_a_store_into_a_read_window_dies_with_sigsegv_and_changes_nothing(server: Server) -> None:
    path = server.directory / "store"
    data = fill(path, 64 * KIB)
    result = subprocess.run([sys.executable, "-c", STORE, path], check=False)
    assert result.returncode == -signal.SIGSEGV
    assert path.read_bytes() == data


def test_a_descriptor_opened_read_only_never_gives_a_writable_lease(
    server: Server, client: Client
) -> None:
    path = server.directory / "readonly"
    fill(path, 64 * KIB)
    fd = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(Denied, match="O_RDWR"):
            client.call("Map", (fd,), file=0, writable=True)
        with pytest.raises(Denied, match="O_RDWR"):
            client.call("Allocate", (fd,), file=0, length=MIB)
    finally:
        os.close(fd)


def test_a_descriptor_opened_with_o_path_or_write_only_gives_nothing(
    server: Server, client: Client
) -> None:
    path = server.directory / "o_path"
    fill(path, 64 * KIB)
    for flags in (os.O_PATH, os.O_WRONLY):
        fd = os.open(path, flags)
        try:
            with pytest.raises(Denied):
                client.call("Map", (fd,), file=0)
        finally:
            os.close(fd)


def test_a_descriptor_of_another_file_system_is_refused(server: Server, client: Client) -> None:
    with Path(__file__).open("rb") as file, pytest.raises(Denied, match="mount"):
        client.call("Map", (file.fileno(),), file=0)
    reader, writer = os.pipe()
    try:
        with pytest.raises(Denied):
            client.call("Map", (reader,), file=0)
    finally:
        os.close(reader)
        os.close(writer)


def test_paths_and_missing_descriptors_are_refused_by_a_mounts_daemon(client: Client) -> None:
    with pytest.raises(Invalid, match="descriptor"):
        client.call("Map", path="/huge")
    with pytest.raises(Invalid, match="file"):
        client.call("Map")


def use_as_stranger(path: Path) -> list[object]:
    with vfsmap.map(path) as window:
        seen: list[object] = [window.direct, bytes(window.view()[:4]).hex()]
    for options in ({"direct": True}, {"level": PMD}):
        with pytest.raises(Unsupported, match="not trusted"):
            vfsmap.map(path, **options)
    with path.open("rb") as file, pytest.raises(Denied, match="not trusted"):
        connect(path).call("Map", (file.fileno(),), file=0)
    return seen


def test_an_untrusted_user_gets_the_page_cache_and_never_the_pool(server: Server) -> None:
    path = server.directory / "public"
    data = fill(path, 4 * MIB)
    path.chmod(0o644)
    server.directory.chmod(0o755)
    server.directory.parent.chmod(0o755)
    assert as_user(65534, use_as_stranger, path) == [False, data[:4].hex()]


def test_a_sparse_files_holes_are_allocated_before_it_is_mapped(server: Server) -> None:
    path = server.directory / "sparse"
    path.touch()
    os.truncate(path, 8 * MIB)
    assert path.stat().st_blocks == 0
    with vfsmap.map(path, writable=True) as window:
        assert not any(window.view()[4 * MIB : 4 * MIB + 4096])
        window.view()[5 * MIB] = 9
    assert path.read_bytes()[5 * MIB] == 9


def test_a_small_file_is_moved_into_a_unit_when_huge_entries_are_demanded(server: Server) -> None:
    path = server.directory / "small"
    data = fill(path, 100 * KIB)
    with pytest.raises(Invalid, match="inside"):
        vfsmap.map(path, length=MIB)
    with vfsmap.map(path, level=PMD, populate=True) as window:
        assert window.view() == data
        assert window.page_sizes()[2 * MIB] == 2 * MIB
    with vfsmap.map(path, level=PTE) as window:
        assert window.view() == data


def test_allocate_grows_a_file_in_whole_units(server: Server, client: Client) -> None:
    path = server.directory / "allocated"
    path.touch()
    fd = os.open(path, os.O_RDWR)
    try:
        answer, _ = client.call("Allocate", (fd,), file=0, length=5 * MIB, level=2 * MIB)
        assert answer["size"] == 5 * MIB
        assert os.fstat(fd).st_size == 5 * MIB
        extents, _ = client.call("Extents", (fd,), file=0)
        assert all(e["start"] % (2 * MIB) == 0 for e in extents["extents"])
    finally:
        os.close(fd)
    assert not any(path.read_bytes())


def test_a_sealed_file_is_mapped_for_reading_only_and_never_changes(
    server: Server, client: Client
) -> None:
    path = server.directory / "sealed"
    data = fill(path, 3 * MIB)
    with path.open("rb") as file:
        answer, _ = client.call("Seal", (file.fileno(),), file=0)
    assert answer["digest"].startswith("sha256:")
    assert os.getxattr(path, "user.vfsmap.seal").decode() == answer["digest"]
    with vfsmap.map(path) as window:
        assert window.view() == data
    for direct in (None, True, False):
        with pytest.raises(Sealed, match="sealed is sealed: its content can't change"):
            vfsmap.map(path, writable=True, direct=direct)
    for forbidden in (
        lambda: path.open("r+b"),
        lambda: os.truncate(path, 0),
        lambda: os.setxattr(path, "user.vfsmap.seal", b"0"),
    ):
        with pytest.raises(OSError, match=r"permitted|exists"):
            forbidden()
    path.rename(server.directory / "sealed2")
    (server.directory / "sealed2").unlink()


def test_leases_and_events_tell_who_maps_what(server: Server, client: Client) -> None:
    path = server.directory / "watched"
    fill(path, MIB)
    watcher = connect(server.directory)
    events = watcher.events()
    assert next(events)["kind"] == "ready"
    with path.open("rb") as file:
        answer, fds = client.call("Map", (file.fileno(),), file=0)
        os.close(fds[0])
        granted = next(events)
        leases = client.call("Leases")[0]["leases"]
        mine = next(lease for lease in leases if lease["lease"] == answer["lease"])
        client.call("Release", lease=answer["lease"])
        with pytest.raises(NotFound):
            client.call("Release", lease=answer["lease"])
        assert next(events)["kind"] == "ended"
        with pytest.raises(Denied):
            client.call("Map", (file.fileno(),), file=0, writable=True)
        assert next(events)["kind"] == "refused"
        inode = os.fstat(file.fileno()).st_ino
    assert (granted["kind"], granted["lease"]) == ("granted", answer["lease"])
    assert (mine["pid"], mine["inode"], mine["orphaned"]) == (os.getpid(), inode, False)
    watcher.close()


def test_closing_a_window_with_live_views_raises_buffererror(server: Server) -> None:
    path = server.directory / "views"
    fill(path, 64 * KIB)
    window = vfsmap.map(path)
    view = window.view()
    with pytest.raises(BufferError):
        window.close()
    view.release()
    window.close()


def test_a_numpy_array_is_the_pools_own_bytes(server: Server) -> None:
    path = server.directory / "array"
    fill(path, 4 * MIB)
    with vfsmap.map(path, writable=True) as window:
        array = window.array("float32")
        array[:] = 1.5
        del array
    assert path.read_bytes() == (b"\x00\x00\xc0\x3f" * MIB)


def test_files_elsewhere_are_mapped_through_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "elsewhere"
    data = fill(path, 100_000)
    with vfsmap.map(path, offset=5000, length=70_000) as window:
        assert not window.direct
        assert window.view() == data[5000:75_000]
    with pytest.raises(Unsupported, match="mounted pool"):
        vfsmap.map(path, direct=True)
    with pytest.raises(NotFound, match="missing"):
        vfsmap.map(tmp_path / "missing")
    with pytest.raises(IsADirectory):
        vfsmap.map(tmp_path)
