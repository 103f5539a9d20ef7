import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from vfsmap.errors import (
    Denied,
    Exists,
    Invalid,
    MediumError,
    NoSpace,
    NotFound,
    PoolInUse,
    Unsupported,
)
from vfsmap.pmem import Pmem, libc, pages, pmem
from vfsmap.pmem.medium import Medium
from vfsmap.pmem.pmem import STREAMED, libpmem
from vfsmap.testing import media
from vfsmap.testing.pools import FLUSHED, GROUPED, STORED, open_pmem, scratch
from vfsmap.testing.users import as_user
from vfsmap.units import KIB, MIB

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
PAGE = 4 * KIB


@pytest.fixture
def directory() -> Iterator[Path]:
    with scratch() as path:
        yield path


@pytest.fixture
def file(directory: Path) -> Path:
    path = directory / "file"
    path.touch()
    os.truncate(path, MIB)
    return path


# making and opening


def test_a_new_file_has_its_size_and_nobody_else_may_read_it(directory: Path) -> None:
    path = directory / "new"
    with_pool = Pmem.create(path, 3 * MIB)
    assert (with_pool.size, len(with_pool.view), path.stat().st_size) == (3 * MIB,) * 3
    assert path.stat().st_mode & 0o777 == 0o600
    with_pool.close()


def test_the_name_of_a_new_file_on_a_disk_is_durable(
    tmp_path: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    for home, medium in ((tmp_path, GROUPED), (directory, STORED)):
        monkeypatch.setattr(pmem, "detect", lambda fd, medium=medium: medium)
        Pmem.create(home / "new", MIB).close()
    assert synced == [str(tmp_path)]


def test_an_existing_file_is_replaced_only_when_told(file: Path) -> None:
    file.write_bytes(b"precious")
    with pytest.raises(Exists, match="to destroy what it holds, use --force"):
        Pmem.create(file, MIB)
    assert file.read_bytes() == b"precious"
    pmem = Pmem.create(file, MIB, replace=True)
    assert bytes(pmem.view[:8]) == bytes(8)
    pmem.close()


def test_what_is_refused_leaves_the_file_as_it_was(file: Path, directory: Path) -> None:
    file.write_bytes(b"precious")
    with pytest.raises(Invalid, match="size 1000 is not a multiple"):
        Pmem.create(file, 1000, replace=True)
    with pytest.raises(Unsupported, match="on tmpfs, which survives the death of processes but"):
        Pmem.create(file, MIB, replace=True, promise="power")
    with pytest.raises(Invalid, match="promise 'eternal': process or power"):
        Pmem.create(file, MIB, replace=True, promise="eternal")
    with Path(file).open("r+b") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(PoolInUse):
            Pmem.create(file, MIB, replace=True)
    assert file.read_bytes() == b"precious"
    for size in (1000, 1 << 62, 1 << 70):
        with pytest.raises((Invalid, NoSpace)):
            Pmem.create(directory / "other", size)
        assert not (directory / "other").exists()


def test_a_size_that_no_file_can_have_is_refused(directory: Path) -> None:
    with pytest.raises(NoSpace, match="no file can be"):
        Pmem.create(directory / "huge", 1 << 70)


def test_a_file_in_use_is_refused_and_its_user_named(file: Path) -> None:
    program = "import sys; from vfsmap.pmem import Pmem; Pmem.open(sys.argv[1], writable=True);"
    program += "print('open', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", program, str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(PoolInUse, match=f"in use by process {holder.pid}; unmount it or stop"):
            Pmem.open(file, writable=True)
        reader = Pmem.open(file, writable=False)
        reader.close()
        assert holder.stdin is not None
        holder.stdin.close()
    Pmem.open(file, writable=True).close()


def test_what_can_not_hold_a_pool_is_refused_with_the_reason(directory: Path) -> None:
    os.mkfifo(directory / "fifo")
    (directory / "empty").touch()
    with pytest.raises(NotFound, match=r"can't open .*: No such file"):
        Pmem.open(directory / "none", writable=True)
    with pytest.raises(Invalid, match="is empty"):
        Pmem.open(directory / "empty", writable=True)
    for writable in (False, True):
        with pytest.raises(Unsupported, match="a regular file or a DAX device"):
            Pmem.open(directory / "fifo", writable=writable)
        with pytest.raises(Invalid, match="is a directory; a pool is a regular file"):
            Pmem.open(directory, writable=writable)
        with pytest.raises(Invalid, match="is a directory; a pool is a regular file"):
            Pmem.create(directory, 4096, replace=writable)
        with pytest.raises(Unsupported, match="is another device"):
            Pmem.open("/dev/null", writable=writable)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be other users")
def test_whoever_may_not_make_a_pool_there_is_told_to_name_another_place(directory: Path) -> None:
    directory.chmod(0o755)

    def attempt() -> str:
        with pytest.raises(Denied) as refused:
            Pmem.create(directory / "new", 4096)
        return str(refused.value)

    assert "name another place" in as_user(65534, attempt)
    directory.chmod(0o700)  # nor may it look whether there is such a file
    assert "name another place" in as_user(65534, attempt)


def test_a_name_that_no_file_can_have_is_refused(directory: Path) -> None:
    with pytest.raises(Invalid, match="name it shorter"):
        Pmem.create(directory / ("x" * 256), MIB)


def test_a_link_is_not_followed_when_a_pool_is_made(directory: Path) -> None:
    (directory / "link").symlink_to(directory / "elsewhere")
    with pytest.raises(Invalid, match="leads to nothing"):
        Pmem.create(directory / "link", MIB)
    (directory / "elsewhere").write_bytes(b"precious")
    with pytest.raises(Invalid):
        Pmem.create(directory / "link", MIB, replace=True)
    assert (directory / "elsewhere").read_bytes() == b"precious"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be other users")
def test_permissions_are_the_kernels_business(directory: Path, file: Path) -> None:
    directory.chmod(0o755)
    file.chmod(0o600)

    def attempt(writable: bool) -> str:
        try:
            Pmem.open(file, writable=writable)
        except Denied as exc:
            return str(exc)
        return "opened"

    assert "Permission denied" in as_user(65534, attempt, False)
    file.chmod(0o444)
    assert as_user(65534, attempt, False) == "opened"
    assert "Permission denied" in as_user(65534, attempt, True)


# storing


def test_stores_and_zeros_land_where_they_should(file: Path) -> None:
    pmem = open_pmem(file)
    pmem.store(0, b"x" * MIB)
    pmem.zero(100, 5000)
    pmem.store(7, memoryview(b"abc"))
    pmem.persist(0, MIB)
    pmem.close()
    content = bytearray(b"x" * MIB)
    content[100:5100] = bytes(5000)
    content[7:10] = b"abc"
    assert file.read_bytes() == content


def test_a_range_longer_than_the_zeros_at_hand_is_zeroed_whole(directory: Path) -> None:
    pmem = Pmem.create(directory / "pool", 8 * MIB)
    pmem.store(0, b"x" * (8 * MIB))
    pmem.zero(1, 7 * MIB)
    assert (pmem.view[0], pmem.view[7 * MIB + 1]) == (120, 120)
    assert bytes(pmem.view[1 : 7 * MIB + 1]) == bytes(7 * MIB)
    pmem.close()


class Library:
    """A libpmem that notes what it is asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int] | str] = []

    def pmem_memcpy(self, target: int, source: int, length: int, flags: int) -> None:
        assert flags == 1 << 1  # PMEM_F_MEM_NONTEMPORAL, and not PMEM_F_MEM_NODRAIN
        self.calls.append("memcpy")

    def pmem_flush(self, address: int, length: int) -> None:
        self.calls.append((address, length))

    def pmem_drain(self) -> None:
        self.calls.append("drain")


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    library = Library()
    monkeypatch.setattr("vfsmap.pmem.pmem.libpmem", lambda: library)
    return library


def test_a_dax_medium_is_flushed_through_libpmem(file: Path, library: Library) -> None:
    pmem = open_pmem(file, FLUSHED)
    base = libc.address_of(pmem.view)
    pmem.persist(100, 10)
    assert library.calls == [(base + 100, 10), "drain"]
    pmem.sync()
    pmem.resize(2 * MIB)
    pmem.flush(MIB, 64)
    assert library.calls[2:] == [(libc.address_of(pmem.view) + MIB, 64)]
    pmem.close()


def test_a_dax_medium_is_synced_by_the_kernel_where_there_is_no_libpmem(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr("vfsmap.pmem.pmem.libpmem", lambda: None)
    monkeypatch.setattr(Pmem, "_msync", lambda _, offset, length: asked.append((offset, length)))
    pmem = open_pmem(file, FLUSHED)
    pmem.persist(5000, 10)
    pmem.close()
    assert asked == [(5000, 10)]


@pytest.mark.parametrize("medium", [FLUSHED, STORED], ids=["dax", "tmpfs"])
@pytest.mark.parametrize("installed", [True, False])
def test_large_stores_leave_the_same_bytes_with_libpmem_and_without(
    file: Path, monkeypatch: pytest.MonkeyPatch, medium: Medium, installed: bool
) -> None:
    if installed:
        assert libpmem() is not None, "libpmem1 is not installed; run: make setup"
    else:
        monkeypatch.setattr("vfsmap.pmem.pmem.libpmem", lambda: None)
    data = bytes(range(256)) * (STREAMED // 256 + 1)
    pmem = open_pmem(file, medium)
    wanted = bytearray(pmem.size)
    for kind in (bytes, bytearray, memoryview):
        for offset, length in ((0, STREAMED), (4097, STREAMED + 3), (MIB - STREAMED, STREAMED)):
            piece = kind(data[offset % 7 :][:length])
            pmem.store(offset, piece)
            wanted[offset : offset + length] = piece
            assert pmem.view == wanted
    for offset in (MIB - STREAMED + 1, MIB + 1, -1):
        with pytest.raises(ValueError, match=r"exceed|different"):
            pmem.store(offset, data[:STREAMED])
    assert pmem.view == wanted
    pmem.close()


def test_a_large_store_passes_the_caches_by_and_a_small_one_does_not(
    file: Path, library: Library
) -> None:
    pmem = open_pmem(file, STORED)
    pmem.store(0, bytes(STREAMED - 1))
    assert library.calls == []
    pmem.store(0, bytes(STREAMED))
    assert library.calls == ["drain", "memcpy"]
    pmem.close()


def test_the_real_libpmem_flushes_a_mapping(file: Path) -> None:
    assert libpmem() is not None, "libpmem1 is not installed; run: make setup"
    pmem = open_pmem(file, FLUSHED)
    for offset, length in ((0, 1), (63, 2), (4095, 4097), (0, MIB)):
        pmem.store(offset, b"x" * length)
        pmem.persist(offset, length)
    assert file.read_bytes() == b"x" * MIB
    pmem.close()


def test_tmpfs_needs_no_system_call_to_keep_its_promise(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("not needed")

    monkeypatch.setattr(Pmem, "_msync", refuse)
    monkeypatch.setattr(Pmem, "_fdatasync", refuse)
    pmem = open_pmem(file, STORED)
    pmem.store(0, b"x")
    pmem.persist(0, 1)
    pmem.sync()
    pmem.close()


def test_a_kernel_that_can_not_write_back_is_a_medium_error(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", refuse)
    pmem = open_pmem(file, GROUPED)
    with pytest.raises(MediumError, match=r"can't write .* back: Input/output error"):
        pmem.sync()
    pmem.close()


@needs_root
def test_a_disk_that_fails_is_a_medium_error() -> None:
    with media.tmpfs("never", "8M") as below:
        image = below / "image"
        image.touch()
        os.truncate(image, 64 * MIB)
        subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True, capture_output=True)
        top = below / "top"
        top.mkdir()
        subprocess.run(["mount", "-o", "loop", image, top], check=True)
        try:
            pmem = Pmem.create(top / "pool", 16 * MIB)
            assert pmem.medium == GROUPED
            pmem.store(0, b"x" * (16 * MIB))
            with pytest.raises(MediumError, match=r"can't write .* back: "):
                pmem.sync()
            pmem.close()
        finally:
            subprocess.run(["umount", "-l", top], check=True, capture_output=True)


# room


def test_what_is_reserved_has_blocks_and_what_is_punched_has_none(file: Path) -> None:
    pmem = open_pmem(file)
    pmem.reserve(5000, 10)
    assert file.stat().st_blocks * 512 >= PAGE
    pmem.store(0, b"x" * MIB)
    assert pmem.punch(PAGE, PAGE)
    assert bytes(pmem.view[PAGE - 1 : 2 * PAGE + 1]) == b"x" + bytes(PAGE) + b"x"
    assert not pmem.punch(PAGE, 100)
    assert not pmem.punch(100, PAGE)
    pmem.close()


@needs_root
@pytest.mark.parametrize("huge", ["never", "always"])
def test_a_full_tmpfs_says_so_when_room_is_reserved(huge: str) -> None:
    with media.tmpfs(huge, "8M") as below:
        pmem = Pmem.create(below / "pool", 64 * MIB)
        pmem.reserve(0, 4 * MIB)
        assert pmem.room() == 8 * MIB
        (below / "other").write_bytes(bytes(3 * MIB))
        with pytest.raises(NoSpace, match="can't reserve 2M: No space left on device"):
            pmem.reserve(4 * MIB, 2 * MIB)
        pmem.store(0, b"x" * (4 * MIB))
        assert pmem.room() == 5 * MIB
        pmem.close()


@needs_root
@pytest.mark.parametrize("huge", ["always", "within_size", "advise"])
def test_units_of_a_tmpfs_are_huge_pages(huge: str) -> None:
    with media.tmpfs(huge, "64M") as below:
        pmem = Pmem.create(below / "pool", 16 * MIB)
        assert pmem.medium == STORED._replace(huge=huge)
        pmem.reserve(0, 8 * MIB)
        pmem.collapse(0, 8 * MIB)
        pmem.store(0, b"x" * (8 * MIB))
        # a split unit is huge again once it was punched as a whole
        assert pmem.punch(2 * MIB, PAGE)
        assert pmem.punch(2 * MIB, 2 * MIB)
        pmem.reserve(2 * MIB, 2 * MIB)
        pmem.collapse(2 * MIB, 2 * MIB)
        pmem.store(2 * MIB, b"y" * (2 * MIB))
        mine = Pmem.open(below / "pool", writable=False)
        libc.madvise(libc.address_of(mine.view), 8 * MIB, libc.MADV_POPULATE_READ)
        assert pages.page_sizes(libc.address_of(mine.view), 8 * MIB)[2 * MIB] == 8 * MIB
        mine.close()
        pmem.close()


@needs_root
def test_hugetlbfs_pages_are_taken_when_they_are_reserved() -> None:
    with media.hugetlbfs("2M", 6) as below:
        pmem = Pmem.create(below / "pool", 64 * MIB)
        assert pmem.room() == 12 * MIB
        pmem.reserve(3 * MIB, 4 * MIB)
        assert (below / "pool").stat().st_blocks * 512 == 6 * MIB
        assert pmem.room() == 12 * MIB
        with pytest.raises(NoSpace, match="10M of free huge pages of 2M; have more: /sys/"):
            pmem.reserve(10 * MIB, 10 * MIB)
        assert not pmem.punch(2 * MIB, PAGE)
        pmem.store(2 * MIB, b"x" * (6 * MIB))
        assert pmem.punch(2 * MIB, 2 * MIB)
        assert pmem.view[4 * MIB] == 120
        with pytest.raises(Invalid, match=r"size 3M is not a multiple .* 2M"):
            Pmem.create(below / "odd", 3 * MIB)
        pmem.close()
        (below / "hollow").touch()
        os.truncate(below / "hollow", 4 * MIB)
        with pytest.raises(Invalid, match="is empty"):
            Pmem.open(below / "hollow", writable=False)


# resizing and closing


def test_a_medium_grows_with_its_content(file: Path) -> None:
    pmem = open_pmem(file)
    pmem.store(0, b"x" * MIB)
    pmem.resize(2 * MIB)
    assert (pmem.size, bytes(pmem.view[MIB - 1 : MIB + 1])) == (2 * MIB, b"x\0")
    with pytest.raises(NoSpace):
        pmem.resize(1 << 70)
    assert (pmem.size, pmem.view[0]) == (2 * MIB, 120)
    pmem.close()


def test_a_view_in_use_keeps_the_medium_from_closing_and_growing(file: Path) -> None:
    pmem = open_pmem(file)
    view = pmem.view[10:20]
    for refused in (pmem.close, lambda: pmem.resize(2 * MIB)):
        with pytest.raises(BufferError):
            refused()
    pmem.store(10, b"still here")
    assert (bytes(view), pmem.size, file.stat().st_size) == (b"still here", MIB, MIB)
    view.release()
    pmem.close()
    pmem.close()
    assert file.stat().st_size == MIB


def test_a_store_to_a_full_disk_is_an_error_and_no_bus_error() -> None:
    with media.ext4_loop("48M") as place:
        made = Pmem.create(place / "pool", 64 * MIB)
        at = 0
        with suppress(NoSpace):
            for at in range(0, made.size, 64 * KIB):
                made.reserve(at, 64 * KIB)
                made.store(at, b"x" * 64 * KIB)
        assert 16 * MIB < at < 48 * MIB
        assert made.view[at - 64 * KIB : at] == b"x" * 64 * KIB
        with pytest.raises(NoSpace, match="can't write to"):
            made.store(48 * MIB, b"x" * 64 * KIB)
        made.close()
