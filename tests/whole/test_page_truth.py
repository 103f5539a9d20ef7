"""What the planner predicts is what the kernel does: on tmpfs, hugetlbfs and ext4, as root."""

import contextlib
import ctypes
import os
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vfsmap.errors import NoMemory, Unsupported
from vfsmap.mapping.overlay import PrivateWindow
from vfsmap.mapping.plan import Backing, Reason
from vfsmap.mapping.window import Window
from vfsmap.pmem import libc, pages
from vfsmap.pmem.medium import Medium, detect
from vfsmap.testing import media
from vfsmap.units import GIB, KIB, MIB, PMD, PTE, Extent, Level, align_up

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")

PAGE = 4 * KIB
SIZE = 32 * MIB


class Held(NamedTuple):
    """A file on one medium, and what is known of how the medium holds it."""

    fd: int
    medium: Medium
    size: int
    backing: list[Backing]


def mounted(name: str) -> AbstractContextManager[Path]:
    match name.split("-"):
        case "hugetlbfs", size:
            return media.hugetlbfs(size, 1 if size == "1G" else 2 * SIZE // PMD.size)
        case "ext4", _:
            return media.ext4_loop("128M")
        case _, policy:
            return media.tmpfs(policy, "256M")
    raise AssertionError(name)


def fill(name: str, fd: int) -> int:
    if not name.startswith("ext4"):
        size = GIB if name.endswith("1G") else SIZE
        os.posix_fallocate(fd, 0, size)
        return size
    piece = 2 * MIB if name.endswith("large") else PAGE
    for at in range(0, SIZE, piece):
        os.pwrite(fd, b"v" * piece, at)
    return SIZE


@contextlib.contextmanager
def held(name: str) -> Iterator[Held]:
    with mounted(name) as directory:
        fd = os.open(directory / "file", os.O_RDWR | os.O_CREAT)
        try:
            size = fill(name, fd)
            medium = detect(fd)
            backing: list[Backing] = []
            if medium.name == "page cache":
                # how large the cache's pieces are is nobody's promise, so it is measured
                with Window(fd, [Extent(0, 0, size)], size, medium, populate=True) as window:
                    backing = window.backing()
            yield Held(fd, medium, size, backing)
        finally:
            os.close(fd)


POLICIES = ["tmpfs-always", "tmpfs-within_size", "tmpfs-advise", "tmpfs-never"]
SMALL_PAGED = [*POLICIES, "ext4-small", "ext4-large"]


@pytest.fixture(scope="module", params=[*SMALL_PAGED, "hugetlbfs-2M"])
def file(request: pytest.FixtureRequest) -> Iterator[Held]:
    with held(request.param) as found:
        yield found


@pytest.fixture(scope="module")
def huge() -> Iterator[Held]:
    with held("tmpfs-always") as found:
        yield found


SHAPES: dict[str, tuple[list[Extent], int, int]] = {
    "all of it": ([Extent(0, 0, SIZE)], 0, SIZE),
    "a few bytes in the middle": ([Extent(0, 0, SIZE)], 3 * MIB + 5, 100),
    "a length that ends inside a unit": ([Extent(0, 0, SIZE)], 0, 5 * MIB + 300 * KIB),
    "an extent that ends inside a unit": ([Extent(0, 0, 5 * MIB + 300 * KIB)], 0, 5 * MIB),
    "a start that is not aligned": ([Extent(0, 3 * PAGE, 8 * MIB)], 0, 8 * MIB),
    "one page": ([Extent(0, 5 * PAGE, PAGE)], 0, PAGE),
    "a hole in front and behind": ([Extent(2 * MIB, 4 * MIB, 4 * MIB)], 0, 8 * MIB),
    "two colours": (
        [Extent(0, 2 * MIB, 4 * MIB), Extent(4 * MIB, 10 * MIB + PAGE, 4 * MIB)],
        0,
        8 * MIB,
    ),
    "many short extents": (
        [Extent(n * MIB, n * 7 % 31 * MIB, MIB) for n in range(16)],
        0,
        16 * MIB,
    ),
}


def touched(window: Window) -> dict[int, int]:
    libc.madvise(*window.mapped, libc.MADV_POPULATE_READ)
    return window.page_sizes()


def anonymous(window: Window) -> int:
    """Return the bytes of private copies, as the page tables and as smaps know them."""
    copied = sum(run.length for run in pages.runs(*window.mapped) if not run.file and not run.zero)
    fields = [area.fields for area in pages.areas(*window.mapped)]
    if window.medium.name == "hugetlbfs":
        # an overlay is ordinary anonymous memory; only copies of the kernel are hugetlbfs pages
        assert sum(f["Anonymous"] for f in fields) <= copied
    else:
        assert sum(f["Anonymous"] for f in fields) == copied
        assert sum(f["Private_Dirty"] for f in fields) >= copied
    return copied


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["read", "write", "private"])
def test_each_windows_page_sizes_are_as_planned(file: Held, shape: str, kind: str) -> None:
    extents, offset, length = SHAPES[shape]
    large = file.medium.page_size > PAGE
    if large and shape in ("two colours", "many short extents"):
        with pytest.raises(Unsupported, match="the medium maps whole pages of 2M"):
            Window(file.fd, extents, length, file.medium, offset=offset)
        return
    if kind == "write" and extents[0].offset:
        kind = "read"  # holes can't be written
    window = Window(
        file.fd,
        extents,
        length,
        file.medium,
        offset=offset,
        writable=kind == "write",
        private=kind == "private",
    )
    with window:
        assert touched(window) == window.plan(file.backing).page_sizes()
        assert all(part.reason is None for part in window.plan(file.backing).ranges()) == (
            window.page_sizes()[PAGE] == 0
        )


HUGE_BYTES = {
    "all of it": SIZE,
    "a few bytes in the middle": 2 * MIB,
    "a length that ends inside a unit": 6 * MIB,
    "an extent that ends inside a unit": 4 * MIB,
    "a start that is not aligned": 6 * MIB,
    "one page": 0,
    "a hole in front and behind": 4 * MIB,
    "two colours": 4 * MIB,
    "many short extents": 0,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_on_huge_pages_all_that_can_be_huge_is(huge: Held, shape: str) -> None:
    extents, offset, length = SHAPES[shape]
    with Window(huge.fd, extents, length, huge.medium, offset=offset) as window:
        assert touched(window)[PMD.size] == HUGE_BYTES[shape]


def test_blocks_over_a_window_that_is_not_aligned_are_huge_inside(huge: Held) -> None:
    extents, _, length = SHAPES["a start that is not aligned"]
    with PrivateWindow(huge.fd, extents, length, huge.medium, cow=PMD) as window:
        plan = window.plan()
        assert window.own(0, length) == length == anonymous(window)
        plan.own(window.layout.skip, length, PMD)
        assert window.page_sizes() == plan.page_sizes() == {PMD.size: 6 * MIB, PAGE: 2 * MIB}


def test_a_gigabyte_page_is_one_entry() -> None:
    try:
        with held("hugetlbfs-1G") as found:
            extents = [Extent(0, 0, GIB)]
            with Window(found.fd, extents, GIB, found.medium, level=found_level(found)) as window:
                assert touched(window) == {GIB: GIB, PMD.size: 0, PAGE: 0}
                assert window.plan().page_sizes() == window.page_sizes()
            with Window(found.fd, extents, 5, found.medium, offset=7 * MIB) as window:
                assert (
                    touched(window)
                    == window.plan().page_sizes()
                    == {GIB: GIB, PMD.size: 0, PAGE: 0}
                )
            with pytest.raises(NoMemory, match="need as many again; raise nr_hugepages"):
                PrivateWindow(found.fd, extents, GIB, found.medium, cow=found_level(found))
            with pytest.raises(Unsupported, match="a block of 2M is too small"):
                PrivateWindow(found.fd, extents, GIB, found.medium, cow=PMD)
    except NoMemory as exc:
        pytest.skip(f"this machine has no free gigabyte in one piece: {exc}")


def found_level(found: Held) -> Level:
    return Level("PUD", found.medium.page_size.bit_length() - 1)


def test_a_limit_is_kept(file: Held) -> None:
    extents = [Extent(0, 0, SIZE)]
    if file.medium.page_size > PAGE:
        with pytest.raises(Unsupported, match="whole pages of 2M, none of PTE"):
            Window(file.fd, extents, SIZE, file.medium, limit=PTE)
        return
    with Window(file.fd, extents, SIZE, file.medium, limit=PTE) as window:
        assert touched(window) == window.plan(file.backing).page_sizes() == {2 * MIB: 0, PAGE: SIZE}
        assert [part.reason for part in window.plan().ranges()] == [Reason.LIMIT]


def test_a_level_is_given_or_refused_with_the_reason(file: Held) -> None:
    extents = [Extent(0, 0, SIZE)]
    policy = file.medium.huge
    if policy in ("always", "within_size") or file.medium.page_size > PAGE:
        with Window(file.fd, extents, SIZE, file.medium, level=PMD, populate=True) as window:
            assert window.page_sizes()[PMD.size] == SIZE
        return
    if file.backing and file.backing[0].level == PMD:
        with Window(file.fd, extents, SIZE, file.medium, level=PMD) as window:
            assert window.page_sizes()[PMD.size] == SIZE
        return
    reason = "the page cache holds it" if file.backing else "policy of the tmpfs"
    with pytest.raises(Unsupported, match=reason):
        Window(file.fd, extents, SIZE, file.medium, level=PMD)


def test_a_unit_that_was_split_is_refused_once_it_is_touched() -> None:
    with held("tmpfs-always") as found:
        punch = libc.FALLOC_FL_PUNCH_HOLE | libc.FALLOC_FL_KEEP_SIZE
        libc.fallocate(found.fd, punch, 4 * MIB + PAGE, PAGE)
        libc.fallocate(found.fd, 0, 4 * MIB + PAGE, PAGE)
        extents = [Extent(0, 0, SIZE)]
        with pytest.raises(Unsupported, match="2M are not mapped by PMD: its unit is held in sm"):
            Window(found.fd, extents, SIZE, found.medium, level=PMD, populate=True)
        with Window(found.fd, extents, SIZE, found.medium, populate=True) as window:
            parts = [part for part in window.plan(window.backing()).ranges() if part.reason]
            assert [(part.at, part.length, part.reason) for part in parts] == [
                (4 * MIB, 2 * MIB, Reason.SPLIT)
            ]


@given(
    pieces=st.lists(
        st.tuples(
            st.integers(0, 4096),
            st.sampled_from([PAGE, 40 * PAGE, MIB, 2 * MIB, 5 * MIB + PAGE]),
            st.sampled_from([PAGE, MIB, 2 * MIB]),
        ),
        min_size=1,
        max_size=5,
    ),
    stores=st.lists(st.integers(0, 1 << 20), max_size=4),
    cut=st.integers(0, 3 * MIB),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_private_window_with_any_stores_is_as_planned(
    huge: Held, pieces: list[tuple[int, int, int]], stores: list[int], cut: int
) -> None:
    extents, offset = [], 0
    for place, length, align in pieces:
        start = place * PAGE % (SIZE - 8 * MIB) // align * align
        extents.append(Extent(offset, start, length))
        offset += length
    cut = min(cut, offset - 1)
    window = PrivateWindow(huge.fd, extents, offset - cut, huge.medium, offset=cut, populate=True)
    with window:
        plan = window.plan()
        assert window.page_sizes() == plan.page_sizes()
        for store in stores:
            at = store % window.length
            ctypes.memset(window.address + at, 1, 1)
            plan.store(window.layout.skip + at, 1)
        assert touched(window) == plan.page_sizes()


def test_the_first_plain_store_copies_what_the_kernel_copies(file: Held) -> None:
    extents = [Extent(0, 0, SIZE)]
    cow = PTE if file.medium.page_size == PAGE else PMD
    window = PrivateWindow(file.fd, extents, SIZE, file.medium, cow=cow, populate=True)
    before = os.pread(file.fd, PAGE, 6 * MIB)
    with window:
        plan = window.plan(file.backing)
        window.view()[6 * MIB + 7] = 99
        plan.store(6 * MIB + 7, 1)
        assert anonymous(window) == cow.size
        assert touched(window) == plan.page_sizes()
        reasons = {part.reason for part in plan.ranges()}
        assert (Reason.COPY in reasons) == (cow == PTE)
        assert os.pread(file.fd, PAGE, 6 * MIB) == before


def test_anonymous_memory_shared_by_fork_is_copied_in_small_pages() -> None:
    found = libc.mmap(
        0, 4 * MIB, libc.PROT_READ | libc.PROT_WRITE, libc.MAP_PRIVATE | libc.MAP_ANONYMOUS
    )
    address = align_up(found, PMD.size)
    libc.madvise(address, PMD.size, libc.MADV_HUGEPAGE)
    libc.madvise(address, PMD.size, libc.MADV_POPULATE_WRITE)
    assert pages.page_sizes(address, PMD.size) == {PMD.size: PMD.size, PAGE: 0}
    child = os.fork()
    if child == 0:
        ctypes.memset(address, 1, 1)
        os._exit(pages.page_sizes(address, PMD.size) != {PMD.size: 0, PAGE: PMD.size})
    assert os.waitpid(child, 0)[1] == 0
    assert pages.page_sizes(address, PMD.size)[PMD.size] == PMD.size
    libc.munmap(found, 4 * MIB)


def scattered() -> list[int]:
    chosen = random.Random(3)
    return [chosen.randrange(SIZE) for _ in range(1000)]


@pytest.mark.parametrize("cow", [PTE, PMD], ids=str)
def test_a_thousand_scattered_writes_copy_blocks_of_the_asked_size(file: Held, cow: Level) -> None:
    extents = [Extent(0, 0, SIZE)]
    if cow.size < file.medium.page_size:
        with pytest.raises(Unsupported, match="a block of 4K is too small"):
            PrivateWindow(file.fd, extents, SIZE, file.medium, cow=cow)
        return
    before = os.pread(file.fd, SIZE, 0)
    expected = bytearray(before)
    with PrivateWindow(file.fd, extents, SIZE, file.medium, cow=cow, populate=True) as window:
        plan = window.plan(file.backing)
        copied = 0
        for at in scattered():
            copied += window.write(at, b"!")
            plan.own(window.layout.skip + at, 1, cow)
            expected[at : at + 1] = b"!"
        blocks = {at // cow.size for at in scattered()}
        assert copied == window.owned() == anonymous(window) == len(blocks) * cow.size
        assert touched(window) == plan.page_sizes()
        if cow == PMD:
            assert window.page_sizes()[PMD.size] >= len(blocks) * PMD.size
        assert bytes(window.view()) == expected
    assert os.pread(file.fd, SIZE, 0) == before


def test_a_thousand_scattered_plain_stores_copy_what_the_kernel_copies(file: Held) -> None:
    cow = PTE if file.medium.page_size == PAGE else PMD
    extents = [Extent(0, 0, SIZE)]
    with PrivateWindow(file.fd, extents, SIZE, file.medium, cow=cow, populate=True) as window:
        plan = window.plan(file.backing)
        for at in scattered():
            ctypes.memset(window.address + at, 1, 1)
            plan.store(window.layout.skip + at, 1)
        assert anonymous(window) == len({at // cow.size for at in scattered()}) * cow.size
        assert touched(window) == plan.page_sizes()
