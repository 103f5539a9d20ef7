import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from vfsmap.errors import Denied, NoMemory, Unsupported
from vfsmap.pmem.medium import detect
from vfsmap.testing import media
from vfsmap.units import MIB

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

STOCK = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
MEDIA: dict[str, Callable[[], AbstractContextManager[Path]]] = {
    "tmpfs": lambda: media.tmpfs("within_size", "64M"),
    "hugetlbfs": lambda: media.hugetlbfs("2M", 3),
    "page cache": lambda: media.ext4_loop("32M"),
}


@needs_root
@pytest.mark.parametrize("name", MEDIA)
def test_a_medium_is_what_it_says_and_nothing_of_it_is_left(name: str) -> None:
    before = STOCK.read_text()
    with MEDIA[name]() as directory:
        fd = os.open(directory / "file", os.O_RDWR | os.O_CREAT)
        os.posix_fallocate(fd, 0, 2 * MIB)
        assert detect(fd).name == name
        os.close(fd)
        assert directory.is_mount()
    assert not directory.exists()
    assert STOCK.read_text() == before
    assert str(directory) not in Path("/proc/mounts").read_text()


@needs_root
@pytest.mark.parametrize("name", MEDIA)
def test_a_failure_in_the_block_undoes_the_medium_too(name: str) -> None:
    places = []

    def fail() -> None:
        with MEDIA[name]() as directory:
            places.append(directory)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not places[0].exists()


@needs_root
def test_more_huge_pages_than_there_is_memory_are_refused_untried() -> None:
    before = STOCK.read_text()
    with pytest.raises(NoMemory, match="100000 huge pages of 1G do not fit"):
        media.hugetlbfs("1G", 100_000).__enter__()
    assert STOCK.read_text() == before


def test_a_page_size_that_does_not_exist_is_named() -> None:
    with pytest.raises((Unsupported, Denied), match=r"no huge pages of 3M|needs root"):
        media.hugetlbfs("3M", 1).__enter__()


def test_without_root_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for make in MEDIA.values():
        with pytest.raises(Denied, match="needs root; run this test as root"):
            make().__enter__()
