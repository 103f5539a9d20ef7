"""A mount's life: how it begins, what ends it, and what is left."""

import ctypes
import errno
import mmap
import os
import pwd
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import pytest

from vfsmap.errors import Invalid
from vfsmap.pmem.mountinfo import mounts
from vfsmap.testing.posix import STRANGER, as_user, refused
from vfsmap.testing.serve import Server, served
from vfsmap.testing.waiting import WHENEVER, wait_until, wake_up_limit
from vfsmap_fuse.mount import MountOptions

NOBODY = pwd.getpwnam("nobody").pw_uid
"""A user with a name: fusermount3 serves no other."""
ST_RDONLY, ST_NOSUID, ST_NODEV, ST_NOEXEC, ST_NOATIME = 1, 2, 4, 8, 1024  # bits/statvfs.h


@pytest.fixture
def open_device() -> Iterator[None]:
    """Let every user open /dev/fuse, as udev does."""
    device = Path("/dev/fuse")
    before = stat.S_IMODE(device.stat().st_mode)
    device.chmod(0o666)
    yield
    device.chmod(before)


def fill(root: Path) -> dict[str, bytes]:
    (root / "dir").mkdir()
    for number in range(20):
        (root / f"dir/file-{number}").write_bytes(bytes([number]) * number * 1000)
    (root / "link").symlink_to("dir")
    return content(root)


def content(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (root / "link").iterdir()}


def test_a_mount_is_known_by_its_pool_and_type(server: Server) -> None:
    (found,) = (each for each in mounts() if each.directory == str(server.mountpoint))
    assert (found.kind, found.source) == ("fuse.vfsmap", str(server.pool))


def test_files_are_there_again_after_an_orderly_end(place: tuple[Path, Path]) -> None:
    pool, mountpoint = place
    with served(pool, mountpoint) as server:
        before = fill(mountpoint)
        assert server.stop() == 0
    assert not mountpoint.is_mount()
    with served(pool, mountpoint):
        assert content(mountpoint) == before


def test_files_are_there_again_after_the_server_was_killed(place: tuple[Path, Path]) -> None:
    pool, mountpoint = place
    with served(pool, mountpoint) as server:
        before = fill(mountpoint)
        server.kill()
        wait_until(lambda: str(mountpoint) not in Path("/proc/self/mounts").read_text())
    with served(pool, mountpoint):
        assert content(mountpoint) == before


def test_a_file_without_a_name_is_gone_after_the_server_was_killed(
    place: tuple[Path, Path],
) -> None:
    pool, mountpoint = place
    with served(pool, mountpoint) as server:
        free = os.statvfs(mountpoint).f_bfree
        file = (mountpoint / "file").open("wb", buffering=0)
        file.write(b"x" * 1_000_000)
        (mountpoint / "file").unlink()
        server.kill()
        with refused(errno.ENOTCONN, errno.ECONNABORTED):
            file.close()
        wait_until(lambda: str(mountpoint) not in Path("/proc/self/mounts").read_text())
    with served(pool, mountpoint):
        assert os.statvfs(mountpoint).f_bfree == free


def test_the_server_ends_when_somebody_unmounts(place: tuple[Path, Path]) -> None:
    pool, mountpoint = place
    with served(pool, mountpoint) as server:
        before = fill(mountpoint)
        subprocess.run(["umount", mountpoint], check=True)
        assert server.process.wait(20) == 0
    with served(pool, mountpoint):
        assert content(mountpoint) == before


def test_a_mount_in_use_can_not_be_unmounted_by_hand_but_ends_with_its_server(
    place: tuple[Path, Path],
) -> None:
    pool, mountpoint = place
    with served(pool, mountpoint) as server, (mountpoint / "file").open("wb") as file:
        assert subprocess.run(["umount", mountpoint], capture_output=True, check=False).returncode
        assert server.stop() == 0
        assert not mountpoint.is_mount()
        with refused(errno.ENOTCONN, errno.ECONNABORTED):
            os.fstat(file.fileno())
            os.write(file.fileno(), b"x")


@pytest.mark.parametrize("options", ["", "writeback"])
def test_dirty_pages_reach_the_pool_before_the_server_ends(
    place: tuple[Path, Path], options: str
) -> None:
    pool, mountpoint = place
    with served(pool, mountpoint, options) as server:
        path = mountpoint / "file"
        path.write_bytes(b"." * 10_000)
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 10_000) as view:
            view[5000:5005] = b"hello"
            assert server.stop() == 0
    with served(pool, mountpoint):
        assert path.read_bytes() == b"." * 5000 + b"hello" + b"." * 4995


def test_with_writeback_bytes_and_times_are_in_the_pool_after_fsync(
    place: tuple[Path, Path],
) -> None:
    with served(*place, "writeback") as server:
        path = place[1] / "file"
        with path.open("wb", buffering=0) as file:
            for number in range(100):
                file.write(b"%04d" % number)
            os.utime(path, ns=(1, 2))
            os.fsync(file.fileno())
            ino = os.fstat(file.fileno()).st_ino
            text = "".join(f"{n:04}" for n in range(100))
            assert server.call("read", ino, 0, 1000) == text
            found = server.call("get", ino)
            assert (found["size"], found["mtime_ns"]) == (400, 2)
        with path.open("ab") as file:
            file.write(b"end")
        os.truncate(path, 402)
        assert path.read_bytes() == text.encode() + b"en"


def test_without_busy_polling_everything_is_the_same(place: tuple[Path, Path]) -> None:
    with served(*place, "nobusypoll") as server:
        before = fill(place[1])
        assert content(place[1]) == before
        assert server.stop() == 0


needs_latency_requests = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2 or not Path("/dev/cpu_dma_latency").exists(),
    reason="a machine with one processor is not polled on, and this kernel may lack the interface",
)


def keep_busy(mountpoint: Path) -> int:
    """Make some requests in quick succession; return how fast idle processors wake then."""
    for number in range(50):
        (mountpoint / f"busy-{number}").touch()
        (mountpoint / f"busy-{number}").unlink()
    return wake_up_limit()


@needs_latency_requests
def test_idle_processors_wake_at_once_while_requests_come_and_no_longer(
    place: tuple[Path, Path],
) -> None:
    with served(*place) as server:
        wait_until(lambda: wake_up_limit() == WHENEVER)
        wait_until(lambda: keep_busy(place[1]) == 0)
        wait_until(lambda: wake_up_limit() == WHENEVER)
        wait_until(lambda: keep_busy(place[1]) == 0)
        server.kill()
        wait_until(lambda: wake_up_limit() == WHENEVER)


@needs_latency_requests
def test_without_busy_polling_processors_sleep_as_they_like(place: tuple[Path, Path]) -> None:
    for options, asked in ((), 1), (("nobusypoll",), 0):
        with served(*place, *options) as server:
            for _ in range(20):
                keep_busy(place[1])
            files = Path(f"/proc/{server.process.pid}/fd").iterdir()
            assert [str(file.readlink()) for file in files].count("/dev/cpu_dma_latency") == asked


def test_a_read_only_mount_changes_nothing(place: tuple[Path, Path]) -> None:
    pool, mountpoint = place
    with served(pool, mountpoint):
        before = fill(mountpoint)
    image = pool.read_bytes()
    with served(pool, mountpoint, "ro"):
        assert content(mountpoint) == before
        assert os.statvfs(mountpoint).f_flag & ST_RDONLY
        for action in (
            lambda: (mountpoint / "new").touch(),
            lambda: (mountpoint / "dir").rename(mountpoint / "new"),
            lambda: (mountpoint / "link").unlink(),
            lambda: (mountpoint / "dir/file-1").write_bytes(b""),
            lambda: (mountpoint / "dir").chmod(0),
            lambda: os.utime(mountpoint),
            lambda: os.setxattr(mountpoint, "user.x", b""),
        ):
            with refused(errno.EROFS):
                action()
    assert pool.read_bytes() == image


@pytest.mark.parametrize("options", ["", "ro", "noatime"])
def test_what_was_read_once_stays_in_the_page_cache(place: tuple[Path, Path], options: str) -> None:
    pool, mountpoint = place
    with served(pool, mountpoint):
        (mountpoint / "it").write_bytes(b"text")
    with served(pool, mountpoint, options):
        assert not is_cached(mountpoint / "it")
        for _ in range(2):
            (mountpoint / "it").read_bytes()
            assert is_cached(mountpoint / "it")


def is_cached(path: Path) -> bool:
    """Tell whether the first page of a file is there after an open."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE) as view:
        there = ctypes.c_ubyte()
        start = (ctypes.c_char * 1).from_buffer(view)
        address = ctypes.c_void_p(ctypes.addressof(start))
        del start
        assert libc.mincore(address, ctypes.c_size_t(1), ctypes.byref(there)) == 0
        return bool(there.value & 1)


def test_root_s_mount_has_devices_and_set_user_id_unless_told_otherwise(
    place: tuple[Path, Path],
) -> None:
    with served(*place):
        assert not os.statvfs(place[1]).f_flag & (ST_NOSUID | ST_NODEV | ST_NOEXEC)
    with served(*place, "nosuid,nodev,noexec,noatime"):
        flags = os.statvfs(place[1]).f_flag
        assert flags & ST_NOSUID
        assert flags & ST_NODEV
        assert flags & ST_NOEXEC
        assert flags & ST_NOATIME


@pytest.mark.usefixtures("open_device")
def test_a_user_s_mount_is_the_user_s_alone(places: Any) -> None:
    pool, mountpoint = places.make(owner=NOBODY)
    with served(pool, mountpoint, user=NOBODY) as server:
        before = as_user(lambda: fill(mountpoint), NOBODY)
        assert as_user(lambda: content(mountpoint), NOBODY) == before
        assert as_user(lambda: os.stat(mountpoint).st_uid, NOBODY) == NOBODY
        for stranger in (0, STRANGER):
            with refused(errno.EACCES):
                as_user(lambda: os.listdir(mountpoint), stranger)
        assert server.stop() == 0


@pytest.mark.usefixtures("open_device")
def test_a_user_can_not_mount_on_somebody_else_s_directory(places: Any) -> None:
    pool, mountpoint = places.make(owner=NOBODY)
    os.chown(mountpoint, 0, 0)
    assert f"{mountpoint} belongs to somebody else" in complaint(pool, mountpoint, user=NOBODY)


def complaint(pool: Path, mountpoint: Path, options: str = "", user: int = 0) -> str:
    """Return what a server that can't mount says."""
    with TemporaryFile("w+") as log:
        with (
            pytest.raises(RuntimeError),
            served(pool, mountpoint, options, user=user, log=log),
        ):
            pass
        log.seek(0)
        return log.read()


def test_a_mount_point_has_to_be_a_directory(place: tuple[Path, Path]) -> None:
    pool, mountpoint = place
    mountpoint.rmdir()
    assert f"{mountpoint} does not exist" in complaint(pool, mountpoint)
    mountpoint.touch()
    assert f"{mountpoint} is not a directory" in complaint(pool, mountpoint)


def test_a_mount_that_was_left_behind_is_named_with_its_cure(place: tuple[Path, Path]) -> None:
    pool, mountpoint = place
    command = [sys.executable, "-m", "vfsmap_tools.bench.donothing", str(mountpoint)]
    with subprocess.Popen(command) as dying:  # nothing unmounts after this one
        wait_until(mountpoint.is_mount)
        dying.kill()
    try:
        assert f"remove it: fusermount3 -u -z {mountpoint}" in complaint(pool, mountpoint)
    finally:
        subprocess.run(["fusermount3", "-u", "-z", mountpoint], check=True)


@pytest.mark.usefixtures("open_device")
def test_a_user_needs_leave_to_let_others_in(places: Any) -> None:
    pool, mountpoint = places.make(owner=NOBODY)
    if "\nuser_allow_other" in Path("/etc/fuse.conf").read_text():
        with served(pool, mountpoint, "allow_other", user=NOBODY):
            assert as_user(lambda: os.listdir(mountpoint)) == []
    else:
        assert "allow_other needs" in complaint(pool, mountpoint, "allow_other", NOBODY)


def test_after_a_bug_the_mount_answers_eio_once_lives_on_and_is_read_only(
    place: tuple[Path, Path],
) -> None:
    mountpoint = place[1]
    with TemporaryFile("w+") as log:
        with served(*place, log=log) as server:
            before = fill(mountpoint)
            server.call("sabotage", "statfs")
            with refused(errno.EIO):
                os.statvfs(mountpoint)
            assert content(mountpoint) == before
            with refused(errno.EROFS):
                (mountpoint / "new").touch()
            assert "ZeroDivisionError" in server.call("failed")
            assert server.stop() == 0
        log.seek(0)
        text = log.read()
    assert "statfs failed on a bug of vfsmap" in text
    assert "Traceback" in text
    with served(*place):
        assert content(mountpoint) == before


def test_requests_under_way_are_answered_when_the_server_is_told_to_end(
    place: tuple[Path, Path],
) -> None:
    with served(*place) as server:
        child = os.fork()
        if child == 0:
            number = 0
            with suppress(OSError):
                # afterwards the writes would go on, into the directory below
                while place[1].is_mount():
                    (place[1] / f"file-{number}").write_bytes(b"x" * 1000)
                    number += 1
            os._exit(min(number, 100))
        wait_until(lambda: (place[1] / "file-200").exists())
        assert server.stop() == 0
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 100
    with served(*place):
        for path in place[1].iterdir():
            assert path.read_bytes() in (b"", b"x" * 1000)


def test_an_unknown_mount_option_is_named() -> None:
    with pytest.raises(Invalid, match="'fast'"):
        MountOptions.parse(["ro", "fast"])


def test_mount_options_are_understood() -> None:
    options = MountOptions.parse(["ro", "writeback", "nobusypoll", "noexec", "allow_other", "rw"])
    assert options == MountOptions(
        read_only=True,
        allow_other=True,
        writeback=True,
        busy_poll=False,
        kernel=frozenset({"noexec"}),
    )
    words = options.words(Path("/pools/a,b"))
    assert {"ro", "allow_other", "noexec", "default_permissions", "fsname=/pools/a\\,b"} <= words
