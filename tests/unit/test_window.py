import copy
import ctypes
import gc
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vfsmap.errors import Denied, Invalid, NoMemory, TooManyMappings, Unsupported
from vfsmap.mapping.window import Window
from vfsmap.pmem import libc, pages
from vfsmap.pmem.medium import Commit, Medium, detect
from vfsmap.units import KIB, MIB, PMD, Extent

PAGE = 4 * KIB


class Told:
    """A grantor that notes what it is told, and what it then finds."""

    def __init__(
        self, told: list[tuple[str, object]], look: Callable[[], object] = lambda: None
    ) -> None:
        self._told = told
        self._look = look

    def closed(self) -> None:
        self._told.append(("closed", self._look()))

    def dropped(self) -> None:
        self._told.append(("dropped", self._look()))

    def publish(self) -> None:
        self._told.append(("publish", self._look()))

    def report(self, offset: int, length: int, detail: str) -> None:
        self._told.append(("report", (offset, length, detail)))


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[int]:
    """A file of 64 pages; each page is full of its own number."""
    path = tmp_path / "pool"
    path.write_bytes(b"".join(bytes([n]) * PAGE for n in range(64)))
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


@pytest.fixture
def medium(pool: int) -> Medium:
    return detect(pool)


def pages_of(view: memoryview) -> list[int]:
    return [view[at] for at in range(0, len(view), PAGE)]


def test_a_window_shows_the_extents_in_the_files_order(pool: int, medium: Medium) -> None:
    extents = [Extent(0, 7 * PAGE, 2 * PAGE), Extent(2 * PAGE, 3 * PAGE, PAGE)]
    with Window(pool, extents, 3 * PAGE, medium) as window:
        assert pages_of(window.view()) == [7, 8, 3]


def test_neighbours_in_file_and_pool_take_one_mapping(pool: int, medium: Medium) -> None:
    extents = [Extent(n * PAGE, (n + 5) * PAGE, PAGE) for n in range(8)]
    with Window(pool, extents, 8 * PAGE, medium) as window:
        assert len(window.layout.calls) == 1
        assert pages_of(window.view()) == list(range(5, 13))


def test_where_the_kernel_chooses_no_aligned_address_the_window_does(tmp_path: Path) -> None:
    with (tmp_path / "pool").open("wb+") as file:
        file.truncate(8 * MIB)
        fd, medium = file.fileno(), Medium("tmpfs", Commit.STORE, PAGE, "always")
        windows = []
        for shift in range(4):  # the bytes of neither file nor pool are aligned
            extent = Extent(shift * PAGE, shift * PAGE + 2 * MIB, 5 * MIB)
            window = Window(fd, [extent], 4 * MIB, medium, offset=extent.offset)
            windows.append(window)
            assert (window.address - extent.start) % PMD.size == 0
            assert window.layout.level == PMD
        for window in windows:
            window.close()


def test_holes_of_a_read_window_are_zeros(pool: int, medium: Medium) -> None:
    extents = [Extent(PAGE, 9 * PAGE, PAGE)]
    with Window(pool, extents, 3 * PAGE, medium) as window:
        assert bytes(window.view()) == bytes(PAGE) + bytes([9]) * PAGE + bytes(PAGE)


def test_a_writable_window_over_a_hole_is_refused(pool: int, medium: Medium) -> None:
    with pytest.raises(Invalid, match="holes there; allocate"):
        Window(pool, [Extent(PAGE, PAGE, PAGE)], 2 * PAGE, medium, writable=True)


def test_a_request_in_the_middle_shows_exactly_its_bytes(pool: int, medium: Medium) -> None:
    extents = [Extent(0, 10 * PAGE, 4 * PAGE)]
    with Window(pool, extents, 10, medium, offset=2 * PAGE - 5) as window:
        assert bytes(window.view()) == bytes([11] * 5 + [12] * 5)
        assert window.length == 10


def test_an_empty_window_has_an_empty_view(pool: int, medium: Medium) -> None:
    with Window(pool, [], 0, medium, populate=True) as window:
        assert bytes(window.view()) == b""
        assert window.page_sizes() == {2 * MIB: 0, PAGE: 0}


def test_stores_through_a_writable_window_reach_the_pool(pool: int, medium: Medium) -> None:
    with Window(pool, [Extent(0, PAGE, PAGE)], PAGE, medium, writable=True) as window:
        window.view()[100:105] = b"hello"
        window.persist(100, 5)
    assert os.pread(pool, 5, PAGE + 100) == b"hello"


def test_publishing_persists_and_then_tells_those_who_cached_the_file(
    pool: int, medium: Medium
) -> None:
    told: list[tuple[str, object]] = []
    window = Window(
        pool,
        [Extent(0, PAGE, PAGE)],
        PAGE,
        medium,
        writable=True,
        grantor=Told(told, lambda: os.pread(pool, 5, PAGE)),
    )
    with window:
        window.view()[:5] = b"there"
        window.publish()
        assert told == [("publish", b"there")]
    assert told[1:] == [("closed", b"there")]


def test_a_read_windows_view_and_array_refuse_stores(pool: int, medium: Medium) -> None:
    with Window(pool, [Extent(0, 0, PAGE)], PAGE, medium) as window:
        with pytest.raises(TypeError, match="read-only"):
            window.view()[0] = 1
        with pytest.raises(ValueError, match="read-only"):
            window.array()[0] = 1
        with pytest.raises(Invalid, match="nothing to persist"):
            window.persist(0, 1)


def test_the_kernel_refuses_to_make_a_read_only_descriptors_window_writable(
    pool: int, medium: Medium
) -> None:
    fd = os.open(f"/proc/self/fd/{pool}", os.O_RDONLY)
    with Window(fd, [Extent(0, 0, PAGE)], PAGE, medium) as window:
        with pytest.raises(PermissionError):
            libc.mprotect(window.address, PAGE, libc.PROT_READ | libc.PROT_WRITE)
        with pytest.raises(Denied, match="the descriptor does not allow it"):
            Window(fd, [Extent(0, 0, PAGE)], PAGE, medium, writable=True)
    os.close(fd)


def test_a_store_to_a_read_window_kills_and_changes_nothing(pool: int, medium: Medium) -> None:
    with Window(pool, [Extent(0, 5 * PAGE, PAGE)], PAGE, medium) as window:
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGSEGV, signal.SIG_DFL)
            ctypes.memset(window.address, 0xFF, 1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGSEGV
        assert os.pread(pool, 1, 5 * PAGE) == b"\x05"


def test_an_array_has_the_asked_type_and_shape_without_a_copy(pool: int, medium: Medium) -> None:
    with Window(pool, [Extent(0, 0, PAGE)], PAGE, medium, writable=True) as window:
        table = window.array("<u4", (8, 16))
        table[1, 0] = 0x01020304
        assert bytes(window.view()[64:68]) == b"\x04\x03\x02\x01"
        assert window.array("float64").shape == (PAGE // 8,)
        del table


def test_an_array_larger_than_the_window_is_refused(pool: int, medium: Medium) -> None:
    with (
        Window(pool, [Extent(0, 0, PAGE)], PAGE, medium) as window,
        pytest.raises(Invalid, match="1025 items of 4 bytes exceed 4096"),
    ):
        window.array("u4", 1025)


HOLDERS: dict[str, Callable[[Window], Any]] = {
    "view": lambda window: window.view(),
    "slice": lambda window: window.view()[3:9],
    "array": lambda window: window.array(),
}


@pytest.mark.parametrize("hold", HOLDERS)
def test_closing_with_a_live_view_raises_buffer_error(pool: int, medium: Medium, hold: str) -> None:
    window = Window(pool, [Extent(0, 3 * PAGE, PAGE)], PAGE, medium)
    held = HOLDERS[hold](window)
    with pytest.raises(BufferError, match="still in use"):
        window.close()
    assert held[0] == 3
    del held
    window.close()
    assert window.closed


def test_an_error_in_the_block_is_not_hidden_by_a_live_view(pool: int, medium: Medium) -> None:
    def fail() -> None:
        with Window(pool, [Extent(0, 0, PAGE)], PAGE, medium) as window:
            view = window.view()
            raise ZeroDivisionError(view[0])

    with pytest.raises(ZeroDivisionError):
        fail()


def mapped(address: int) -> bool:
    return bool(pages.areas(address, PAGE))


def test_a_forgotten_window_is_unmapped_with_its_last_view(pool: int, medium: Medium) -> None:
    ends: list[tuple[str, object]] = []
    window = Window(
        pool,
        [Extent(0, 0, PAGE)],
        PAGE,
        medium,
        grantor=Told(ends),
    )
    address, view = window.address, window.view()
    del window
    gc.collect()
    assert view[0] == 0
    assert mapped(address)
    view.release()
    del view
    gc.collect()
    assert not mapped(address)
    assert ends == [("dropped", None)]


def test_a_window_can_not_be_copied_or_pickled(pool: int, medium: Medium) -> None:
    with Window(pool, [Extent(0, 0, PAGE)], PAGE, medium) as window:
        for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="map the file again"):
                attempt(window)


def test_a_window_that_is_interrupted_while_it_is_made_leaves_nothing_mapped(
    pool: int, medium: Medium, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def interrupted(window: Window) -> None:
        made.append(window.address)
        raise KeyboardInterrupt

    monkeypatch.setattr(Window, "_populate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Window(pool, [Extent(0, 0, PAGE)], PAGE, medium, populate=True)
    assert not mapped(made[0])


def test_a_closed_window_says_so(pool: int, medium: Medium) -> None:
    window = Window(pool, [Extent(0, 0, PAGE)], PAGE, medium)
    window.close()
    window.close()
    with pytest.raises(Invalid, match="closed"):
        window.view()


def test_a_sealed_window_cannot_be_unmapped_remapped_or_unprotected(
    pool: int, medium: Medium
) -> None:
    told: list[tuple[str, object]] = []
    extents = [Extent(0, 4 * PAGE, PAGE)]
    window = Window(pool, extents, PAGE, medium, sealed=True, grantor=Told(told))
    address = window.address
    fixed = libc.MAP_FIXED | libc.MAP_PRIVATE | libc.MAP_ANONYMOUS
    move = libc.MREMAP_FIXED | libc.MREMAP_MAYMOVE
    with pytest.raises(PermissionError):
        libc.munmap(address, PAGE)
    with pytest.raises(PermissionError):
        libc.mprotect(address, PAGE, libc.PROT_NONE)
    with pytest.raises(PermissionError):
        libc.mmap(address, PAGE, libc.PROT_READ, fixed)
    spare = libc.mmap(0, PAGE, libc.PROT_READ, libc.MAP_PRIVATE | libc.MAP_ANONYMOUS)
    with pytest.raises(PermissionError):
        libc.mremap(spare, PAGE, PAGE, move, address)
    libc.munmap(spare, PAGE)
    window.close()
    assert ctypes.string_at(address, 1) == b"\x04"
    assert told == []


def test_a_writable_window_cannot_be_sealed(pool: int, medium: Medium) -> None:
    with pytest.raises(Invalid, match="only a shared, read-only window"):
        Window(pool, [Extent(0, 0, PAGE)], PAGE, medium, writable=True, sealed=True)


def test_running_out_of_mappings_is_reported_as_what_it_is(pool: int, medium: Medium) -> None:
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    extents = [Extent(n * PAGE, (n % 2) * 2 * PAGE, PAGE) for n in range(limit + 1)]
    with pytest.raises(TooManyMappings, match=f"vm.max_map_count is {limit}; raise it"):
        Window(pool, extents, (limit + 1) * PAGE, medium)
    assert len(Path("/proc/self/maps").read_text().splitlines()) < limit // 2


def test_an_unmappable_length_is_out_of_memory(pool: int, medium: Medium) -> None:
    with pytest.raises(NoMemory, match="can't reserve"):
        Window(pool, [], 1 << 60, medium)


def test_on_a_medium_of_large_pages_the_view_starts_inside_the_page(pool: int) -> None:
    # the layout alone: the kernel's part is tested on a real hugetlbfs
    medium = detect(pool)._replace(name="hugetlbfs", page_size=PMD.size)
    extents = [Extent(0, PMD.size + 3 * PAGE, 2 * PAGE)]
    os.ftruncate(pool, 4 * MIB)
    with Window(pool, extents, 2 * PAGE, medium) as window:
        assert window.mapped[1] == PMD.size
        assert window.address % PMD.size == 3 * PAGE


def test_extents_that_share_a_large_page_are_unsupported(pool: int) -> None:
    medium = detect(pool)._replace(name="hugetlbfs", page_size=PMD.size)
    extents = [Extent(0, 0, PAGE), Extent(PAGE, PMD.size + PAGE, PAGE)]
    with pytest.raises(Unsupported, match="share one"):
        Window(pool, extents, 2 * PAGE, medium)
