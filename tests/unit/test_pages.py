import errno
import os
import signal
from collections.abc import Iterator

import pytest

from vfsmap.pmem import libc, pages
from vfsmap.units import KIB, MIB, align_up

PAGE = 4 * KIB
LENGTH = 6 * MIB


@pytest.fixture
def address() -> Iterator[int]:
    """Six MiB of anonymous memory, a mapping of its own."""
    flags = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS
    found = libc.mmap(0, LENGTH + 4 * MIB, libc.PROT_NONE, flags)
    start = align_up(found + PAGE, 2 * MIB)
    libc.mprotect(start, LENGTH, libc.PROT_READ | libc.PROT_WRITE)
    libc.madvise(start, LENGTH, libc.MADV_NOHUGEPAGE)
    yield start
    libc.munmap(found, LENGTH + 4 * MIB)


def test_what_was_never_touched_is_in_no_entry(address: int) -> None:
    assert pages.page_sizes(address, LENGTH) == {2 * MIB: 0, PAGE: 0}
    assert pages.runs(address, LENGTH) == []


def test_touched_pages_are_counted_in_the_range_only(address: int) -> None:
    libc.madvise(address, LENGTH, libc.MADV_POPULATE_WRITE)
    assert pages.page_sizes(address + PAGE, 3 * PAGE) == {2 * MIB: 0, PAGE: 3 * PAGE}
    run = pages.Run(address + PAGE, 3 * PAGE, PAGE, file=False)
    assert pages.runs(address + PAGE, 3 * PAGE) == [run]


def test_pages_of_zeros_are_told_apart(address: int) -> None:
    libc.madvise(address, 4 * PAGE, libc.MADV_POPULATE_READ)
    libc.madvise(address + PAGE, PAGE, libc.MADV_POPULATE_WRITE)
    found = [(run.start - address, run.length, run.zero) for run in pages.runs(address, LENGTH)]
    assert found == [(0, PAGE, True), (PAGE, PAGE, False), (2 * PAGE, 2 * PAGE, True)]


def test_more_stretches_than_one_call_returns_are_all_found(address: int) -> None:
    for at in range(0, LENGTH, 2 * PAGE):
        libc.madvise(address + at, PAGE, libc.MADV_POPULATE_WRITE)
    found = pages.runs(address, LENGTH)
    assert [run.start - address for run in found] == list(range(0, LENGTH, 2 * PAGE))


def test_without_the_ioctl_smaps_gives_the_same_totals(
    address: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    libc.madvise(address, LENGTH, libc.MADV_HUGEPAGE)
    libc.madvise(address, LENGTH - 2 * MIB, libc.MADV_POPULATE_WRITE)
    libc.madvise(address + LENGTH - 2 * MIB, 2 * MIB, libc.MADV_NOHUGEPAGE)
    libc.madvise(address + LENGTH - 2 * MIB, 5 * PAGE, libc.MADV_POPULATE_WRITE)
    by_scan = pages.page_sizes(address, LENGTH)

    def too_old(*_: object) -> list[pages.Run]:
        raise OSError(errno.ENOTTY, "Inappropriate ioctl for device")

    monkeypatch.setattr(pages, "runs", too_old)
    assert pages.page_sizes(address, LENGTH) == by_scan


def test_other_errors_of_the_kernel_are_not_hidden() -> None:
    with pytest.raises(FileNotFoundError):
        pages.page_sizes(0, PAGE, pid=2**22 + 1)


def test_another_process_can_be_looked_at(address: int) -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        libc.madvise(address, 7 * PAGE, libc.MADV_POPULATE_WRITE)
        os.write(write, b"!")
        signal.pause()
    os.read(read, 1)
    try:
        assert pages.page_sizes(address, LENGTH, pid=child) == {2 * MIB: 0, PAGE: 7 * PAGE}
        assert pages.page_sizes(address, LENGTH) == {2 * MIB: 0, PAGE: 0}
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)
