import ctypes
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfsmap.errors import Invalid, NoMemory, TooManyMappings
from vfsmap.mapping.overlay import PrivateWindow
from vfsmap.pmem import libc, pages
from vfsmap.pmem.medium import Medium, detect
from vfsmap.units import KIB, MIB, PMD, PTE, Extent, Level

PAGE = 4 * KIB
SIZE = 6 * MIB


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A file of letters, a different one in each page of a kind."""
    path: Path = tmp_path_factory.mktemp("overlay") / "pool"
    path.write_bytes(b"".join(bytes([65 + n % 26]) * PAGE for n in range(SIZE // PAGE)))
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.fixture
def medium(pool: int) -> Medium:
    return detect(pool)


def window(pool: int, medium: Medium, cow: Level = PTE, *, stores: bool = True) -> PrivateWindow:
    return PrivateWindow(pool, [Extent(0, 0, SIZE)], SIZE, medium, cow=cow, stores=stores)


def content(pool: int) -> bytes:
    return os.pread(pool, SIZE, 0)


@pytest.mark.parametrize("cow", [PTE, PMD], ids=str)
@pytest.mark.parametrize("stores", [True, False], ids=["stores", "no stores"])
def test_a_write_changes_the_window_and_never_the_pool(
    pool: int, medium: Medium, cow: Level, stores: bool
) -> None:
    before = content(pool)
    expected = bytearray(before)
    with window(pool, medium, cow, stores=stores) as private:
        for at, data in (
            (10, b"one"),
            (PAGE - 2, b"four"),
            (10, b"two"),
            (2 * MIB - 3, b"a" * 9000),
        ):
            private.write(at, data)
            expected[at : at + len(data)] = data
        assert bytes(private.view()) == expected
    assert content(pool) == before


def test_plain_stores_stay_in_the_window(pool: int, medium: Medium) -> None:
    before = content(pool)
    with window(pool, medium) as private:
        private.view()[5000:5003] = b"new"
        assert bytes(private.view()[4999:5004]) == before[4999:5000] + b"new" + before[5003:5004]
    assert content(pool) == before


def test_a_window_without_stores_dies_of_a_stray_one_even_where_it_was_written(
    pool: int, medium: Medium
) -> None:
    with window(pool, medium, stores=False) as private:
        private.write(0, b"new")
        with pytest.raises(TypeError, match="read-only"):
            private.view()[0] = 1
        for at in (0, 2 * PAGE):
            child = os.fork()
            if child == 0:
                signal.signal(signal.SIGSEGV, signal.SIG_DFL)
                ctypes.memset(private.address + at, 0xFF, 1)
                os._exit(0)
            assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGSEGV


def test_what_is_owned_is_copied_once(pool: int, medium: Medium) -> None:
    with window(pool, medium) as private:
        assert private.own(PAGE + 1, 2 * PAGE) == 3 * PAGE
        assert private.own(0, 3 * PAGE) == PAGE
        assert private.write(PAGE, b"in place") == 0
        assert private.owned() == 4 * PAGE
        assert private.own(7, 0) == 0


def test_a_block_at_the_end_of_a_window_is_cut_short(pool: int, medium: Medium) -> None:
    extents = [Extent(0, 0, SIZE - MIB)]
    private = PrivateWindow(pool, extents, SIZE - MIB, medium, cow=PMD)
    with private:
        assert private.own(0, SIZE - MIB) == SIZE - MIB == private.owned()
        assert bytes(private.view()) == content(pool)[: SIZE - MIB]


def test_views_stay_valid_while_blocks_are_laid_over(pool: int, medium: Medium) -> None:
    with window(pool, medium, PMD) as private:
        view = private.view()
        private.write(3 * MIB, b"seen")
        assert bytes(view[3 * MIB : 3 * MIB + 4]) == b"seen"
        view.release()


@pytest.mark.parametrize("cow", [PTE, PMD], ids=str)
def test_another_thread_sees_old_or_new_bytes_and_nothing_else(
    pool: int, medium: Medium, cow: Level
) -> None:
    texts = [b"<" * 64, b">" * 64]
    seen: set[bytes] = set()
    done = threading.Event()
    with window(pool, medium, cow, stores=False) as private:
        private.write(PAGE, texts[0])

        def look() -> None:
            while not done.is_set():
                seen.add(ctypes.string_at(private.address + PAGE, 64))

        reader = threading.Thread(target=look)
        reader.start()
        for turn in range(300):
            private.write(PAGE, texts[turn % 2])
        done.set()
        reader.join()
    assert seen <= set(texts)
    assert seen


def test_nothing_is_left_mapped(pool: int, medium: Medium) -> None:
    private = window(pool, medium, PMD)
    private.own(0, SIZE)
    where = private.mapped
    private.close()
    assert pages.areas(*where) == []


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (SIZE, 1), (0, SIZE + 1)])
def test_a_part_outside_the_window_is_refused(
    pool: int, medium: Medium, offset: int, length: int
) -> None:
    with window(pool, medium) as private:
        with pytest.raises(Invalid, match="exceed the window"):
            private.own(offset, length)
        with pytest.raises(Invalid, match="exceed the window"):
            private.write(offset, bytes(length))


def test_a_private_window_has_nothing_to_persist(pool: int, medium: Medium) -> None:
    with window(pool, medium) as private, pytest.raises(Invalid, match="private: there is nothing"):
        private.persist(0, 1)


def test_the_limit_of_mappings_is_named_and_the_window_stays_whole(
    pool: int, medium: Medium, monkeypatch: pytest.MonkeyPatch
) -> None:
    with window(pool, medium) as private:

        def full(*_: int) -> int:
            raise OSError(12, "Cannot allocate memory")

        monkeypatch.setattr(libc, "mremap", full)
        with pytest.raises(NoMemory, match="can't lay 4K over the window"):
            private.write(0, b"x")
        monkeypatch.undo()
        assert bytes(private.view()) == content(pool)
        assert private.owned() == 0


def test_running_out_of_mappings_while_writing_is_reported(pool: int, medium: Medium) -> None:
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    with Path("/proc/self/maps").open() as lines:
        spare = limit - sum(1 for _ in lines) - 60
    anonymous = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS
    filler = libc.mmap(0, spare * PAGE, libc.PROT_NONE, anonymous)

    def write_all(private: PrivateWindow) -> None:
        for page in range(0, SIZE // PAGE, 2):  # each leaves two mappings more
            private.write(page * PAGE, b"x")

    try:
        for page in range(0, spare, 2):
            libc.mprotect(filler + page * PAGE, PAGE, libc.PROT_READ)
        with window(pool, medium) as private:
            with pytest.raises(TooManyMappings, match=f"vm.max_map_count is {limit}"):
                write_all(private)
            assert bytes(private.view()[SIZE - PAGE :]) == content(pool)[SIZE - PAGE :]
            assert private.owned() > 0
    finally:
        libc.munmap(filler, spare * PAGE)
