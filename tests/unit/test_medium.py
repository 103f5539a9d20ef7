import os
from pathlib import Path

import pytest

from vfsmap.errors import Unsupported
from vfsmap.pmem import Commit, Medium, Promise, detect, medium, mountinfo
from vfsmap.pmem.mountinfo import Mounted
from vfsmap.testing import media
from vfsmap.units import GIB, KIB, MIB

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


def detected(directory: Path) -> Medium:
    path = directory / "file"
    path.touch()
    os.truncate(path, GIB)
    fd = os.open(path, os.O_RDWR)
    try:
        return detect(fd)
    finally:
        os.close(fd)


@needs_root
@pytest.mark.parametrize("huge", ["always", "within_size", "advise", "never"])
def test_a_tmpfs_keeps_what_is_stored_as_long_as_the_machine_runs(huge: str) -> None:
    with media.tmpfs(huge, "16M") as directory:
        found = detected(directory)
    assert found == Medium("tmpfs", Commit.STORE, 4 * KIB, huge)
    assert found.promise is Promise.PROCESS
    assert found.can_punch


@needs_root
def test_a_hugetlbfs_has_the_page_size_of_its_mount() -> None:
    with media.hugetlbfs("2M", 2) as directory:
        assert detected(directory) == Medium("hugetlbfs", Commit.STORE, 2 * MIB, kept=4 * MIB)


@needs_root
def test_a_disk_is_behind_the_page_cache() -> None:
    with media.ext4_loop("32M") as directory:
        found = detected(directory)
    assert found == Medium("page cache", Commit.SYNC, 4 * KIB)
    assert found.promise is Promise.POWER


def test_promises_compare() -> None:
    assert Promise.POWER.covers(Promise.PROCESS)
    assert Promise.POWER.covers(Promise.POWER)
    assert Promise.PROCESS.covers(Promise.PROCESS)
    assert not Promise.PROCESS.covers(Promise.POWER)


@pytest.fixture
def sys_char(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A /sys/dev/char in which /dev/zero is a device-dax of 4 GiB."""
    (tmp_path / "bus" / "dax").mkdir(parents=True)
    device = tmp_path / "1:5"
    device.mkdir()
    (device / "subsystem").symlink_to(tmp_path / "bus" / "dax")
    (device / "size").write_text(f"{4 * GIB}\n")
    monkeypatch.setattr(medium, "_SYS_CHAR", tmp_path)
    return device


def test_a_device_dax_is_known_by_its_bus(sys_char: Path) -> None:
    fd = os.open("/dev/zero", os.O_RDWR)
    try:
        found = detect(fd)
        assert found == Medium("device-dax", Commit.FLUSH, 2 * MIB)
        assert (found.promise, found.can_punch) == (Promise.POWER, False)
        (sys_char / "align").write_text("1073741824\n")
        assert detect(fd).page_size == GIB
        assert medium.size_of(fd) == 4 * GIB
    finally:
        os.close(fd)


def test_a_file_that_maps_synchronously_is_on_dax(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount = Mounted("9:9", "/", "ext4", "/dev/x", "rw,dax")
    monkeypatch.setattr(medium, "mount_of", lambda _: mount)
    monkeypatch.setattr(medium, "_maps_synchronously", lambda _fd, _size: True)
    assert detected(tmp_path) == Medium("dax", Commit.FLUSH, 4 * KIB)


def test_a_file_system_that_is_not_listed_is_taken_for_a_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mountinfo").write_text("1 0 9999:1 / / rw - ext4 /dev/x rw\n")
    monkeypatch.setattr(mountinfo, "_MOUNTINFO", tmp_path / "mountinfo")
    assert detected(tmp_path).name == "page cache"


@pytest.mark.parametrize(
    ("override", "option", "policy"),
    [
        ("always within_size advise [never] deny force", "rw,size=1k,huge=always", "always"),
        ("always within_size advise [never] deny force", "rw", "never"),
        ("always within_size advise never [deny] force", "rw,huge=always", "never"),
        ("always within_size advise never deny [force]", "rw", "always"),
    ],
)
def test_the_kernels_override_beats_the_mounts_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, option: str, policy: str
) -> None:
    (tmp_path / "shmem_enabled").write_text(override + "\n")
    monkeypatch.setattr(medium, "_THP_SHMEM", tmp_path / "shmem_enabled")
    mount = Mounted("9:9", "/", "tmpfs", "none", option)
    monkeypatch.setattr(medium, "mount_of", lambda _: mount)
    assert detected(tmp_path).huge == policy


def test_a_directory_and_a_device_hold_no_pool(tmp_path: Path) -> None:
    for path in (tmp_path, Path("/dev/null")):
        fd = os.open(path, os.O_RDONLY)
        try:
            with pytest.raises(Unsupported, match="a pool is a regular file or a DAX device"):
                detect(fd)
        finally:
            os.close(fd)
