"""Contents on a real mount: written, read, mapped, cut, sparse, and out of room."""

import errno
import faulthandler
import mmap
import os
import random
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vfsmap.pmem import pages
from vfsmap.testing.posix import refused
from vfsmap.testing.serve import served
from vfsmap.units import GIB, MIB, PMD, PTE

NOISE = random.Random(7).randbytes(3 * MIB + 17)


@contextmanager
def opened(name: str, flags: int, mode: int = 0o644) -> Iterator[int]:
    fd = os.open(name, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


def forget_cached(name: str) -> None:
    """Drop what the kernel caches of a file, so that the next read asks the server."""
    with opened(name, os.O_RDONLY) as fd:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize("size", [0, 1, 511, 4095, 4096, 4097, 131_072, 2 * MIB, len(NOISE)])
def test_what_is_written_is_read_back_cached_and_not(here: Path, size: int) -> None:
    Path("it").write_bytes(NOISE[:size])
    assert Path("it").read_bytes() == NOISE[:size]
    forget_cached("it")
    assert Path("it").read_bytes() == NOISE[:size]
    assert os.stat("it").st_size == size


@pytest.mark.parametrize("at", [0, 1, 4095, 4096, 100_000, 2 * MIB - 1, 2 * MIB, GIB, 1 << 40])
def test_writing_behind_the_end_leaves_a_hole_of_zeros(here: Path, at: int) -> None:
    with opened("it", os.O_RDWR | os.O_CREAT) as fd:
        os.pwrite(fd, b"start", 0)
        os.pwrite(fd, b"end", at + 5)
        assert os.fstat(fd).st_size == at + 8
        forget_cached("it")
        before = min(at, MIB)
        assert os.pread(fd, before + 3, at + 5 - before) == bytes(before) + b"end"
        assert os.pread(fd, 5, 0) == b"start"
        assert os.fstat(fd).st_blocks * 512 <= 3 * MIB


def test_reading_at_or_behind_the_end_gives_nothing(here: Path) -> None:
    Path("it").write_bytes(b"x" * 100)
    for flags in (0, os.O_DIRECT):
        with opened("it", os.O_RDONLY | flags) as fd:
            assert os.preadv(fd, [mmap.mmap(-1, 4096)], 0) == 100
            assert os.pread(fd, 10, 100) == b""
            assert os.pread(fd, 10, 1 << 40) == b""


def test_appending_goes_to_the_end_whatever_the_offset(here: Path) -> None:
    with opened("it", os.O_WRONLY | os.O_CREAT | os.O_APPEND) as one:
        with opened("it", os.O_WRONLY | os.O_APPEND) as other:
            for number in range(20):
                os.write((one, other)[number % 2], f"{number:4}".encode())
        os.lseek(one, 0, os.SEEK_SET)
        os.write(one, b"last")
        assert os.pwrite(one, b"!", 0) == 1  # as Linux has it
    assert Path("it").read_text() == "".join(f"{n:4}" for n in range(20)) + "last!"


def test_cutting_and_growing_again_shows_zeros(here: Path) -> None:
    Path("it").write_bytes(NOISE)
    for size in (3 * MIB, 2 * MIB + 1, 70_001, 4096, 17, 0):
        os.truncate("it", size)
        os.truncate("it", size + 5000)
        forget_cached("it")
        assert Path("it").read_bytes() == NOISE[:size] + bytes(5000)
        os.truncate("it", size)
        assert Path("it").read_bytes() == NOISE[:size]


def test_truncate_grows_a_file_without_taking_room(here: Path) -> None:
    Path("it").touch()
    os.truncate("it", 1 << 50)
    found = os.stat("it")
    assert (found.st_size, found.st_blocks) == (1 << 50, 0)
    with opened("it", os.O_RDONLY) as fd:
        assert os.pread(fd, 100, (1 << 50) - 50) == bytes(50)


def test_truncate_is_refused_where_it_makes_no_sense(here: Path) -> None:
    os.mkdir("dir")
    with refused(errno.EISDIR):
        os.truncate("dir", 0)
    with refused(errno.EINVAL):
        os.truncate("dir", -1)
    with refused(errno.ENOENT):
        os.truncate("missing", 0)
    os.mkfifo("fifo")
    with refused(errno.EINVAL):
        os.truncate("fifo", 0)


def test_a_file_ends_at_the_largest_offset_there_is(here: Path) -> None:
    last = (1 << 63) - 1
    with opened("it", os.O_RDWR | os.O_CREAT) as fd:
        os.ftruncate(fd, last)
        assert os.fstat(fd).st_size == last
        assert os.pwrite(fd, b"x", last - 1) == 1
        with refused(errno.EFBIG, errno.EINVAL):
            os.pwrite(fd, b"x", last)


def test_a_file_size_limit_is_obeyed(here: Path) -> None:
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        status = 1
        with opened("it", os.O_WRONLY | os.O_CREAT) as fd:
            if os.write(fd, b"x" * 1500) == 1000:
                try:
                    os.write(fd, b"x")
                except OSError as exc:
                    status = exc.errno != errno.EFBIG
        os._exit(int(status))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_vectors_are_written_and_read_in_order(here: Path) -> None:
    pieces = [NOISE[:1], b"", NOISE[1:5000], NOISE[5000:300_000]]
    with opened("it", os.O_RDWR | os.O_CREAT) as fd:
        assert os.writev(fd, pieces) == 300_000
        buffers = [bytearray(7), bytearray(299_993)]
        assert os.preadv(fd, buffers, 0) == 300_000
        assert b"".join(buffers) == NOISE[:300_000]


def test_direct_and_cached_descriptors_see_each_other(here: Path) -> None:
    page = mmap.mmap(-1, 4096)
    with (
        opened("it", os.O_RDWR | os.O_CREAT) as cached,
        opened("it", os.O_RDWR | os.O_DIRECT) as fd,
    ):
        os.write(cached, b"a" * 8192)
        assert os.preadv(fd, [page], 4096) == 4096
        assert page[:] == b"a" * 4096
        page[:] = b"b" * 4096
        os.pwritev(fd, [page], 4096)
        assert os.pread(cached, 8192, 0) == b"a" * 4096 + b"b" * 4096


def test_a_shared_map_and_the_descriptor_see_each_other(here: Path) -> None:
    Path("it").write_bytes(b"x" * 10_000)
    with opened("it", os.O_RDWR) as fd, mmap.mmap(fd, 10_000) as view:
        view[4090:4100] = b"0123456789"
        assert os.pread(fd, 10, 4090) == b"0123456789"
        os.pwrite(fd, b"abc", 9_000)
        assert view[9_000:9_003] == b"abc"
        view.flush()
    forget_cached("it")
    found = Path("it").read_bytes()
    assert (found[4090:4100], found[9_000:9_003], len(found)) == (b"0123456789", b"abc", 10_000)


def test_stores_behind_the_end_of_a_map_do_not_reach_the_file(here: Path) -> None:
    Path("it").write_bytes(b"x" * 100)
    with opened("it", os.O_RDWR) as fd, mmap.mmap(fd, 100) as view:
        os.ftruncate(fd, 50)
        view[60:70] = b"y" * 10
        view.flush()
        os.ftruncate(fd, 100)
    forget_cached("it")
    assert Path("it").read_bytes() == b"x" * 50 + bytes(50)


def test_a_private_map_changes_nothing(here: Path) -> None:
    Path("it").write_bytes(b"x" * 100)
    both = mmap.PROT_READ | mmap.PROT_WRITE
    with opened("it", os.O_RDONLY) as fd, mmap.mmap(fd, 100, mmap.MAP_PRIVATE, both) as view:
        view[:3] = b"abc"
        assert view[:4] == b"abcx"
    assert Path("it").read_bytes() == b"x" * 100


def test_an_access_behind_the_last_page_of_a_map_is_a_bus_error(here: Path) -> None:
    Path("it").write_bytes(b"x" * 8192)
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        with opened("it", os.O_RDWR) as fd, mmap.mmap(fd, 8192) as view:
            os.ftruncate(fd, 100)
            view[5000]
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGBUS


def test_bytes_are_copied_inside_the_kernel(here: Path) -> None:
    Path("a").write_bytes(NOISE)
    with opened("a", os.O_RDONLY) as source, opened("b", os.O_RDWR | os.O_CREAT) as target:
        left = len(NOISE)
        while left:
            left -= os.copy_file_range(source, target, left)
    assert Path("b").read_bytes() == NOISE
    with opened("a", os.O_RDONLY) as source, opened("c", os.O_RDWR | os.O_CREAT) as target:
        done = 0
        while done < len(NOISE):
            done += os.sendfile(target, source, done, len(NOISE) - done)
    assert Path("c").read_bytes() == NOISE
    shutil.copyfile("c", "d")
    assert Path("d").read_bytes() == NOISE


def test_seeking_for_data_and_holes_treats_the_file_as_data(here: Path) -> None:
    with opened("it", os.O_RDWR | os.O_CREAT) as fd:
        os.pwrite(fd, b"x", MIB)
        assert os.lseek(fd, 0, os.SEEK_DATA) == 0
        assert os.lseek(fd, 0, os.SEEK_HOLE) == MIB + 1
        assert os.lseek(fd, -1, os.SEEK_END) == MIB
        with refused(errno.ENXIO):
            os.lseek(fd, MIB + 1, os.SEEK_DATA)
        with refused(errno.EINVAL):
            os.lseek(fd, -1, os.SEEK_SET)


def test_fsync_works_on_files_and_directories(here: Path) -> None:
    with opened("it", os.O_RDWR | os.O_CREAT) as fd:
        os.write(fd, b"x")
        os.fsync(fd)
        os.fdatasync(fd)
    with opened(".", os.O_RDONLY) as fd:
        os.fsync(fd)
    with opened("it", os.O_WRONLY | os.O_SYNC) as fd:
        assert os.write(fd, b"yz") == 2
    os.sync()
    assert Path("it").read_bytes() == b"yz"


def test_a_full_pool_answers_no_space_and_takes_writes_again_after_a_deletion(places: Any) -> None:
    place = places.make("24M")
    with served(place.pool, place.mountpoint):
        before = os.statvfs(place.mountpoint)
        full, other = place.mountpoint / "full", place.mountpoint / "other"
        with refused(errno.ENOSPC), full.open("wb", buffering=0) as file:
            while True:
                file.write(NOISE[:MIB])
        found = full.stat().st_size
        assert found >= 12 * MIB
        assert full.read_bytes() == (NOISE[:MIB] * 24)[:found]
        assert os.statvfs(place.mountpoint).f_bavail < 512
        with refused(errno.ENOSPC), other.open("wb", buffering=0) as file:
            file.write(NOISE)
        other.unlink(missing_ok=True)
        full.unlink()
        assert os.statvfs(place.mountpoint).f_bfree == before.f_bfree
        other.write_bytes(NOISE)
        assert other.read_bytes() == NOISE


def test_statvfs_counts_what_files_take(here: Path) -> None:
    before = os.statvfs(".")
    assert before.f_bsize == before.f_frsize == 4096
    assert before.f_namemax == 255
    assert 0 < before.f_bavail <= before.f_bfree < before.f_blocks
    Path("it").write_bytes(NOISE)
    after = os.statvfs(".")
    assert before.f_bfree - after.f_bfree == os.stat("it").st_blocks // 8
    assert after.f_files - after.f_ffree == before.f_files - before.f_ffree + 1
    os.unlink("it")
    assert os.statvfs(".").f_bfree == before.f_bfree


def test_large_writes_pass_through_huge_pages_of_the_server(place: tuple[Path, Path]) -> None:
    never = "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    with served(*place) as server:
        pid = server.process.pid
        before = heap_page_sizes(pid)
        with opened(str(server.mountpoint / "file"), os.O_WRONLY | os.O_CREAT) as fd:
            for _ in range(4):
                os.write(fd, NOISE[:MIB])
        after = heap_page_sizes(pid)
    small = after[PTE.size] - before[PTE.size]
    assert (small > MIB) if never else (small < MIB and after[PMD.size] >= PMD.size)


def heap_page_sizes(pid: int) -> dict[int, int]:
    sizes = {PMD.size: 0, PTE.size: 0}
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if line.endswith("[heap]"):
            start, end = (int(bound, 16) for bound in line.split()[0].split("-"))
            for size, length in pages.page_sizes(start, end - start, pid).items():
                sizes[size] += length
    return sizes
