"""The medium fails under a real server: it is full, refuses to write back, or is cut short."""

import errno
import os
import select
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

import vfsmap as vfsmap_package
from vfsmap.errors import MediumError
from vfsmap.testing.commands import Server, served_pool, vfsmap
from vfsmap.testing.media import Disk, ext4_loop, full_disk, hugetlbfs, tmpfs
from vfsmap.testing.posix import refused
from vfsmap.testing.waiting import wait_until
from vfsmap.units import KIB, MIB
from vfsmap_tools.mounts import find_mount

KEPT = bytes(range(256)) * 400


@contextmanager
def ended(server: Server) -> Iterator[None]:
    """Expect the server to end by itself, and nothing of it to stay."""
    pidfd = os.pidfd_open(server.pid)
    socket = Path(os.fsdecode(os.getxattr(server.directory, "user.vfsmap.socket")))
    try:
        yield
        assert select.select([pidfd], [], [], 20)[0], "the server lives"
    finally:
        os.close(pidfd)
    wait_until(lambda: find_mount(server.directory) is None)
    assert not socket.exists()


def cut_short(server: Server) -> int:
    """Fill a file, cut the pool where its bytes are, and return the pool's old size."""
    (server.directory / "kept").write_bytes(KEPT)
    (server.directory / "lost").write_bytes(b"x" * 24 * MIB)
    size = server.pool.stat().st_size
    os.truncate(server.pool, 20 * MIB)
    return size


def require_kept(server: Server, size: int) -> None:
    """Check that what lay in front of the cut is as it was, and that the pool is good for use."""
    os.truncate(server.pool, size)
    assert "clean" in vfsmap("check", server.pool).stdout
    server.mount()
    assert (server.directory / "kept").read_bytes() == KEPT
    (server.directory / "new").write_bytes(KEPT)
    server.unmount()
    assert "clean" in vfsmap("check", server.pool).stdout


def test_a_store_to_a_pool_that_was_cut_short_ends_the_server_which_says_so() -> None:
    with tmpfs() as place, served_pool(place, "64M") as server:
        with ended(server):
            size = cut_short(server)
            with (server.directory / "lost").open("r+b", buffering=0) as file:
                file.seek(22 * MIB)
                with refused(errno.ECONNABORTED, errno.ENOTCONN):
                    file.write(b"y" * 4096)
        assert f"{server.pool} was truncated to 20M" in server.log.read_text()
        require_kept(server, size)


def test_reading_from_a_pool_that_was_cut_short_keeps_nobody_waiting() -> None:
    with tmpfs() as place, served_pool(place, "64M") as server:
        with ended(server):
            size = cut_short(server)
            fd = os.open(server.directory / "lost", os.O_RDONLY | os.O_DIRECT | os.O_DSYNC)
            try:
                with refused(errno.ECONNABORTED, errno.ENOTCONN, errno.EFAULT, errno.EIO):
                    os.pread(fd, 4096, 22 * MIB)
            finally:
                os.close(fd)
        assert f"{server.pool} was truncated to 20M" in server.log.read_text()
        require_kept(server, size)


def test_a_pool_that_was_cut_short_is_not_opened_and_it_is_said_why() -> None:
    with tmpfs() as place:
        pool = place / "pool"
        vfsmap("format", pool, "--size", "64M")
        os.truncate(pool, 32 * MIB)
        (place / "mnt").mkdir()
        for command in (("mount", pool, place / "mnt"), ("info", pool)):
            done = vfsmap(*command, check=False)
            assert done.returncode == 3
            assert "its file only" in done.stderr
            assert len(done.stderr.splitlines()) == 1
        assert vfsmap("check", pool, check=False).returncode == 3


@contextmanager
def full_medium(kind: str) -> Iterator[Path]:
    """Yield a directory of a medium that has room for a good half of a pool of 64M."""
    if kind == "tmpfs":
        with tmpfs(size="40M") as place:
            yield place
    elif kind == "hugetlbfs":
        with hugetlbfs(pages=20) as place:
            yield place
    else:
        with ext4_loop("48M") as place:
            yield place


def fill(directory: Path, size: int) -> dict[Path, int]:
    """Write files until there is no more room; return how much of each was taken."""
    taken: dict[Path, int] = {}
    try:
        for number in range(1000):
            path = directory / f"file-{number}"
            fd = os.open(path, os.O_CREAT | os.O_WRONLY)
            try:
                taken[path] = 0
                while taken[path] < size:
                    piece = bytes([number % 256]) * min(128 * KIB, size - taken[path])
                    taken[path] += os.write(fd, piece)
            finally:
                os.close(fd)
    except OSError as exc:
        if exc.errno != errno.ENOSPC:
            raise
        return taken
    raise AssertionError("it is never full")


@pytest.mark.parametrize("kind", ["tmpfs", "hugetlbfs", "ext4"])
@pytest.mark.parametrize("size", [50_000, 5 * MIB])
def test_a_full_medium_refuses_what_does_not_fit_and_loses_nothing(kind: str, size: int) -> None:
    with full_medium(kind) as place, TemporaryDirectory() as home:
        directory = Path(home)
        pool = place / "full.pmem"
        vfsmap("format", pool, "--size", "64M")
        server = Server(pool, directory, ("--log", f"{home}.log"))
        server.mount()
        try:
            taken = fill(directory, size)
            assert sum(taken.values()) > 16 * MIB
            assert os.statvfs(directory).f_bavail * 4096 < size + 4 * MIB
            for number, (path, length) in enumerate(taken.items()):
                assert path.read_bytes() == bytes([number % 256]) * length
            first, *_ = taken
            first.unlink()
            os.sync()
            (directory / "again").write_bytes(KEPT[:40_000])  # what was given back can be taken
            server.kill()
            assert "clean" in vfsmap("check", pool).stdout
            server.mount()
            for number, (path, length) in enumerate(taken.items()):
                if path != first:
                    assert path.read_bytes() == bytes([number % 256]) * length
        finally:
            server.unmount()
            Path(f"{home}.log").unlink()
        assert "clean" in vfsmap("check", pool).stdout


def write_data(late: Path) -> None:
    """Do what a fsync writes back with fdatasync(2), before its batch."""
    late.write_bytes(os.urandom(8 * MIB))


def write_metadata(late: Path) -> None:
    """Do what a fsync has only a batch for, which it writes back with msync(2)."""
    late.touch()


@pytest.mark.parametrize(
    ("spoil", "write"),
    [(Disk.fill, write_data), (Disk.fail, write_data), (Disk.fail, write_metadata)],
)
def test_a_disk_that_refuses_to_write_back_is_an_error_and_costs_nothing_that_was_durable(
    spoil: Callable[[Disk], None], write: Callable[[Path], None]
) -> None:
    with full_disk("64M") as disk:
        with served_pool(disk.directory, "32M") as server:
            kept, late = server.directory / "kept", server.directory / "late"
            kept.write_bytes(KEPT)
            fsync(kept)
            spoil(disk)
            write(late)
            with refused(errno.EIO, errno.EROFS):  # EROFS, if 5 seconds have passed
                fsync(late)
            with refused(errno.EROFS, errno.EIO):
                (server.directory / "more").touch()
            assert kept.read_bytes() == KEPT
            log = server.log.read_text()
            assert "can't write" in log
            assert "the pool is read-only from now on" in log
            assert "Traceback" not in log
        disk.mend()
        pool = disk.directory / "test.pmem"
        assert "clean" in vfsmap("check", pool).stdout
        server = Server(pool, disk.directory / "mnt", ())
        server.mount()
        try:
            assert (server.directory / "kept").read_bytes() == KEPT
            (server.directory / "more").write_bytes(KEPT)
            fsync(server.directory / "more")
        finally:
            server.unmount()


def test_a_window_s_owner_is_told_that_the_disk_refuses_to_write_back() -> None:
    with full_disk("64M") as disk, served_pool(disk.directory, "32M") as server:
        path = server.directory / "file"
        path.write_bytes(b"")
        os.truncate(path, 4 * MIB)
        with vfsmap_package.map(path, writable=True, direct=True) as window:
            disk.fail()
            window.view()[:] = os.urandom(4 * MIB)
            with pytest.raises(MediumError, match="Input/output error"):
                window.persist(0, 4 * MIB)


def fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def test_nothing_is_left_mounted() -> None:
    assert "vfsmap-faulty" not in subprocess.check_output(["mount"], text=True)
