"""A real server runs out of descriptors, or of memory: it refuses, lives on, and serves again."""

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import vfsmap
from vfsmap.daemon.client import close_all, connect
from vfsmap.errors import VfsmapError
from vfsmap.testing.commands import Server, served_pool
from vfsmap.testing.commands import vfsmap as vfsmap_command
from vfsmap.testing.media import ext4_loop, tmpfs
from vfsmap.testing.posix import refused
from vfsmap.testing.waiting import wait_until
from vfsmap_tools.mounts import find_mount

KEPT = bytes(range(256)) * 400


@contextmanager
def limited(server: Server, kind: int, most: int) -> Iterator[None]:
    """Give the server no more of something than ``most``, for as long as the block lasts."""
    pid = server.pid
    old = resource.prlimit(pid, kind)
    resource.prlimit(pid, kind, (most, old[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, kind, old)


def address_space(server: Server) -> int:
    pages, *_ = Path(f"/proc/{server.pid}/statm").read_text().split()
    return int(pages) * resource.getpagesize()


def refusal(call: Callable[..., object], *arguments: object) -> int:
    """Return the errno that a call ends with; 0: it does not."""
    try:
        call(*arguments)
    except OSError as exc:
        return exc.errno or 0
    return 0


def fill(directory: Path) -> int:
    """Make files with attributes until that is refused; return the errno."""
    try:
        directory.mkdir()
        for number in range(20_000):
            path = directory / f"{number}"
            path.touch()
            os.setxattr(path, "user.large", bytes(30_000))
    except OSError as exc:
        return exc.errno or 0
    return 0


def require_well(server: Server) -> None:
    """Check that the server takes everything, and that the pool is clean after a kill."""
    directory = server.directory
    assert (directory / "kept").read_bytes() == KEPT
    (directory / "new").write_bytes(KEPT)
    with vfsmap.map(directory / "new", writable=True, direct=True) as window:
        window.view()[:3] = b"new"
    with (directory / "new").open("rb") as file:
        os.fsync(file.fileno())
    server.kill()
    assert "clean" in vfsmap_command("check", server.pool).stdout
    server.mount()
    assert (directory / "kept").read_bytes() == KEPT
    assert (directory / "new").read_bytes() == b"new" + KEPT[3:]


def test_without_free_descriptors_the_mount_serves_and_leases_are_refused() -> None:
    with tmpfs() as place, served_pool(place, "64M") as server:
        kept, mapped = server.directory / "kept", server.directory / "mapped"
        kept.write_bytes(KEPT)
        mapped.write_bytes(KEPT)
        with connect(server.directory) as holder, mapped.open("rb") as file:
            _, descriptors = holder.call("Map", (file.fileno(),), file=0)
            close_all(descriptors)
            with connect(server.directory) as client, kept.open("rb") as other:
                client.call("GetInfo")
                with limited(server, resource.RLIMIT_NOFILE, 0):
                    (server.directory / "made").write_bytes(KEPT)
                    assert kept.read_bytes() == KEPT
                    with pytest.raises(VfsmapError):
                        client.call("Map", (other.fileno(),), file=0)
                    holder.close()  # whether its window is gone can't be looked up now
                    with refused(errno.EMFILE, errno.EBUSY):
                        os.truncate(mapped, 0)
                    assert mapped.read_bytes() == KEPT
        wait_until(lambda: not refusal(os.truncate, mapped, 0))
        require_well(server)


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_without_memory_requests_are_refused_and_served_again_when_there_is_some(kind: str) -> None:
    with (
        tmpfs() if kind == "tmpfs" else ext4_loop() as place,
        served_pool(place, "128M") as server,
    ):
        (server.directory / "kept").write_bytes(KEPT)
        with limited(server, resource.RLIMIT_AS, address_space(server)):
            numbers = {fill(server.directory / str(n)) for n in range(3)}
        assert numbers == {errno.ENOMEM}
        require_well(server)


def write_until_refused(directory: Path) -> int:
    """Write large files until that is refused; return the errno."""
    try:
        for number in range(1000):
            (directory / f"large-{number}").write_bytes(KEPT * 10)
    except OSError as exc:
        return exc.errno or 0
    return 0


def test_a_server_that_has_no_memory_to_take_a_request_ends_and_leaves_nothing_behind() -> None:
    with tmpfs() as place, served_pool(place, "256M") as server:
        (server.directory / "kept").write_bytes(KEPT)
        socket = os.fsdecode(os.getxattr(server.directory, "user.vfsmap.socket"))
        pid = server.pid
        resource.prlimit(pid, resource.RLIMIT_AS, (address_space(server), resource.RLIM_INFINITY))
        assert fill(server.directory / "small") == errno.ENOMEM  # large writes have room before
        assert write_until_refused(server.directory) in (errno.ECONNABORTED, errno.ENOTCONN)
        wait_until(lambda: not Path(f"/proc/{pid}").exists())
        wait_until(lambda: not find_mount(server.directory))
        assert not Path(socket).exists()
        assert "clean" in vfsmap_command("check", server.pool).stdout
        assert "no memory left to serve with" in server.log.read_text()
        server.mount()
        assert (server.directory / "kept").read_bytes() == KEPT
