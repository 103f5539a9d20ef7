"""The scan against real processes that map a real pool."""

import errno
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vfsmap.pmem import Pmem
from vfsmap.pmem.procmaps import Mapped, Scan, mapped_ranges, scan
from vfsmap.units import KIB, MIB

SIZE = 4 * MIB
MAPPER = """
import mmap, os, sys
path, start, length, how = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
fd = os.open(path, os.O_RDONLY)
window = mmap.mmap(fd, length, mmap.MAP_SHARED, mmap.PROT_READ, offset=start)
os.close(fd)
if how == "fork" and os.fork():
    os._exit(0)             # the child has inherited the mapping
if how == "thread":
    import ctypes, threading
    def wait():
        print(os.getpid(), flush=True)
        sys.stdin.readline()
        os._exit(0)
    threading.Thread(target=wait).start()
    ctypes.CDLL(None).pthread_exit(None)    # the first thread ends, the process does not
print(os.getpid(), flush=True)
sys.stdin.readline()
os._exit(0)
"""


@pytest.fixture
def pmem(tmp_path: Path) -> Iterator[Pmem]:
    made = Pmem.create(tmp_path / "pool", SIZE)
    yield made
    made.close()


@contextmanager
def mapped_by_another(path: Path, start: int, length: int, how: str = "plain") -> Iterator[int]:
    command = [sys.executable, "-c", MAPPER, str(path), str(start), str(length), how]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline())
        process.communicate(b"\n")


def test_our_own_mapping_of_the_whole_pool_is_none(pmem: Pmem) -> None:
    assert scan(pmem).ranges == []


def test_a_window_of_another_process_is_found_where_it_lies_in_the_pool(pmem: Pmem) -> None:
    with mapped_by_another(pmem.path, MIB, 64 * KIB) as pid:
        assert scan(pmem).ranges == [Mapped(MIB, 64 * KIB, pid)]
        assert mapped_ranges(pmem) == [(MIB, 64 * KIB)]
    assert scan(pmem).ranges == []


def test_a_window_of_our_own_process_is_found_too(pmem: Pmem) -> None:
    with mmap.mmap(pmem.fd, 8192, mmap.MAP_SHARED, mmap.PROT_READ, offset=2 * MIB):
        assert scan(pmem).ranges == [Mapped(2 * MIB, 8192, os.getpid())]


def test_a_window_that_a_child_has_inherited_outlives_its_parent(pmem: Pmem) -> None:
    with mapped_by_another(pmem.path, MIB, 4096, "fork") as child:
        assert scan(pmem).ranges == [Mapped(MIB, 4096, child)]


def test_a_window_of_a_process_whose_first_thread_has_ended_is_found(pmem: Pmem) -> None:
    with mapped_by_another(pmem.path, MIB, 4096, "thread") as pid:
        assert scan(pmem).ranges == [Mapped(MIB, 4096, pid)]


def test_a_program_that_reads_the_pool_as_a_whole_holds_no_window(pmem: Pmem) -> None:
    with mapped_by_another(pmem.path, 0, SIZE):
        assert scan(pmem).ranges == []


def test_another_file_of_the_same_name_and_size_is_not_the_pool(pmem: Pmem, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "pool"
    other.write_bytes(bytes(SIZE))
    with mapped_by_another(other, MIB, 4096):
        assert scan(pmem).ranges == []


def test_a_deleted_pool_is_still_the_pool(pmem: Pmem) -> None:
    with mapped_by_another(pmem.path, MIB, 4096) as pid:
        pmem.path.unlink()
        assert scan(pmem).ranges == [Mapped(MIB, 4096, pid)]


def test_a_name_that_looks_like_a_line_of_its_own_deceives_nobody(
    pmem: Pmem, tmp_path: Path
) -> None:
    status = os.fstat(pmem.fd)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    fake = tmp_path / f"x\n7f0000000000-7f0000001000 r--s 00100000 {device} {status.st_ino}"
    fake.write_bytes(bytes(SIZE))
    with mapped_by_another(fake, MIB, 4096):
        assert scan(pmem).ranges == []


@pytest.mark.parametrize(
    ("start", "length", "covered"),
    [(0, 4096, False), (0, 8193, True), (12 * KIB - 1, 1, True), (12 * KIB, 4096, False)],
)
def test_a_range_is_covered_when_one_byte_of_it_is_mapped(
    start: int, length: int, covered: bool
) -> None:
    assert Scan([Mapped(8 * KIB, 4 * KIB, 1)], set()).covers(start, length) is covered


def test_a_process_that_cannot_be_looked_at_for_want_of_descriptors_is_not_taken_for_gone(
    pmem: Pmem, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_descriptors(pid: int) -> bytes:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("vfsmap.pmem.procmaps._maps_of", out_of_descriptors)
    with pytest.raises(OSError, match="Too many open files"):
        scan(pmem)
