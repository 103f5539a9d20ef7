"""The mount's page cache beside windows: what a lease changes, seen from the mount's side.

The server is told to pin a range, as a lease does; stores of a window are stores into the pool's
file, at the place that the file's extents tell.
"""

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vfsmap.pmem import libc
from vfsmap.testing.posix import refused
from vfsmap.testing.serve import Server, served
from vfsmap_fuse.operations import DROPS_WRITTEN_PAGES

UNCACHED = os.O_DIRECT | os.O_DSYNC
SIZE = 8192


class Window:
    """Bytes of a file where they lie in the pool."""

    def __init__(self, server: Server, name: str) -> None:
        self.server = server
        self.ino = os.stat(name).st_ino
        (_, start, length), *_ = server.call("extents", self.ino)
        with server.pool.open("r+b") as file:
            whole = mmap.mmap(file.fileno(), 0)
        self.bytes = memoryview(whole)[start : start + length]

    @contextmanager
    def leased(self, *, writable: bool) -> Iterator[None]:
        pin = self.server.call("pin", self.ino, 0, SIZE, writable=writable)
        yield
        self.server.call("unpin", pin)

    def publish(self) -> None:
        self.server.call("invalidate", self.ino)


@pytest.fixture
def window(server: Server, here: Path) -> Window:
    Path("it").write_bytes(b"." * SIZE)
    return Window(server, "it")


@contextmanager
def opened(flags: int) -> Iterator[int]:
    fd = os.open("it", flags)
    yield fd
    os.close(fd)


def test_a_write_through_the_mount_is_in_the_pool_when_it_returns(window: Window) -> None:
    with opened(os.O_WRONLY) as fd:
        os.pwrite(fd, b"hello", 100)
        assert bytes(window.bytes[100:105]) == b"hello"


def test_stores_into_a_shared_map_of_the_mount_are_in_the_pool_after_msync(
    window: Window,
) -> None:
    with opened(os.O_RDWR) as fd, mmap.mmap(fd, SIZE) as view:
        view[5000:5005] = b"hello"
        view.flush()
        assert bytes(window.bytes[5000:5005]) == b"hello"


def test_a_window_s_store_is_seen_by_new_readers_at_once_while_it_is_leased(
    window: Window,
) -> None:
    Path("it").read_bytes()  # the kernel has it cached now
    with window.leased(writable=True):
        for word in (b"first", b"other"):
            window.bytes[:5] = word
            with opened(os.O_RDONLY) as fd:
                assert os.pread(fd, 5, 0) == word


def test_a_cached_reader_sees_a_window_s_store_after_publish(window: Window) -> None:
    with opened(os.O_RDONLY) as fd, window.leased(writable=True):
        assert os.pread(fd, 5, 0) == b"....."
        window.bytes[:5] = b"hello"
        window.publish()
        assert os.pread(fd, 5, 0) == b"hello"


def test_after_a_lease_new_readers_are_cached_again_and_right(window: Window) -> None:
    with window.leased(writable=True):
        window.bytes[:5] = b"hello"
    window.publish()
    with opened(os.O_RDONLY) as fd, mmap.mmap(fd, SIZE, prot=mmap.PROT_READ) as view:
        assert view[:5] == b"hello"


def test_a_cached_writer_is_known_until_its_last_descriptor_and_map_are_gone(
    window: Window,
) -> None:
    def writers() -> tuple[int, int]:
        use = window.server.call("use", window.ino)
        return use["cached_writers"], use["writers"]

    with opened(os.O_RDONLY), opened(os.O_RDONLY | os.O_DIRECT):
        assert writers() == (0, 0)
    with opened(os.O_WRONLY), opened(os.O_RDWR | UNCACHED):
        assert writers() == (0 if DROPS_WRITTEN_PAGES else 1, 1)
    with opened(os.O_RDWR), opened(os.O_RDWR | os.O_DIRECT), opened(os.O_WRONLY | os.O_APPEND):
        assert writers() == (3, 3)
    with opened(os.O_RDWR) as fd:
        view = mmap.mmap(os.dup(fd), SIZE)
    assert writers() == (1, 1)
    view.close()


def test_who_only_writes_is_cached_while_a_shared_map_may_be_dirty(window: Window) -> None:
    def cached_writers() -> int:
        count = window.server.call("use", window.ino)["cached_writers"]
        assert isinstance(count, int)
        return count

    with opened(os.O_RDWR) as fd, mmap.mmap(fd, SIZE) as view, opened(os.O_WRONLY) as writer:
        assert cached_writers() == 2
        view[:5] = b"store"
        os.pwrite(writer, b"write", 5)
        assert view[:11] == b"storewrite."
    assert Path("it").read_bytes()[:11] == b"storewrite."


def test_readers_and_their_maps_see_at_once_what_somebody_writes_past_the_cache(
    window: Window,
) -> None:
    with opened(os.O_RDONLY) as fd, opened(os.O_WRONLY) as writer:
        with mmap.mmap(fd, SIZE, prot=mmap.PROT_READ) as view:
            for number in range(100):
                word = b"%05d" % number
                place = number * 79
                assert view[place] == ord(".")
                os.pwrite(writer, word, place)
                assert view[place : place + 5] == word
                assert os.pread(fd, 5, place) == word
                os.pwrite(writer, b".....", place)
        os.ftruncate(writer, 10)
        assert os.pread(fd, SIZE, 0) == b"." * 10
        os.pwrite(writer, b"end", 20)
        assert os.pread(fd, SIZE, 0) == b"." * 10 + bytes(10) + b"end"
        assert os.fstat(fd).st_size == 23


def test_what_others_have_cached_stays_when_somebody_opens_the_file_to_write(
    window: Window,
) -> None:
    with opened(os.O_RDONLY) as fd, mmap.mmap(fd, SIZE, prot=mmap.PROT_READ) as view:
        assert view[SIZE - 1] == ord(".")
        with opened(os.O_WRONLY) as writer:
            os.pwrite(writer, b"x", 0)
        assert core_pages(view) == [False, True]
        assert view[:2] == b"x."


def core_pages(view: mmap.mmap) -> list[bool]:
    """Tell which pages of a map are in the page cache, by mincore(2)."""
    pages = SIZE // mmap.PAGESIZE
    found = (ctypes.c_ubyte * pages)()
    address = ctypes.c_void_p(libc.address_of(view))
    assert ctypes.CDLL(None).mincore(address, ctypes.c_size_t(SIZE), found) == 0
    return [bool(each & 1) for each in found]


def test_with_writeback_who_only_writes_is_cached(place: tuple[Path, Path]) -> None:
    with served(*place, "writeback") as server:
        file = place[1] / "it"
        with file.open("wb") as opened:
            use = server.call("use", os.fstat(opened.fileno()).st_ino)
            assert (use["cached_writers"], use["writers"]) == (1, 1)


def test_an_uncached_descriptor_can_not_be_mapped_shared(window: Window) -> None:
    with opened(os.O_RDWR | UNCACHED) as fd, refused(errno.ENODEV):
        mmap.mmap(fd, SIZE)


def test_a_direct_descriptor_alone_can_be_mapped_as_on_other_file_systems(window: Window) -> None:
    with opened(os.O_RDWR | os.O_DIRECT) as fd, mmap.mmap(fd, SIZE) as view:
        assert view[:3] == b"..."


def test_while_a_writable_lease_exists_new_opens_are_uncached(window: Window) -> None:
    with window.leased(writable=True):
        with opened(os.O_RDWR) as fd:
            with refused(errno.ENODEV):
                mmap.mmap(fd, SIZE)
            os.pwrite(fd, b"abc", 3)
            window.bytes[0:3] = b"xyz"
            assert os.pread(fd, 6, 0) == b"xyzabc"
            assert bytes(window.bytes[:6]) == b"xyzabc"
        assert window.server.call("use", window.ino)["cached_writers"] == 0
    with opened(os.O_RDWR) as fd, mmap.mmap(fd, SIZE) as view:
        assert view[:6] == b"xyzabc"


def test_while_only_read_leases_exist_opens_are_cached(window: Window) -> None:
    with window.leased(writable=False), opened(os.O_RDWR) as fd, mmap.mmap(fd, SIZE) as view:
        view[:5] = b"hello"
        view.flush()
        assert bytes(window.bytes[:5]) == b"hello"


def test_a_leased_range_can_not_be_cut_and_is_not_moved(window: Window) -> None:
    with window.leased(writable=False):
        for size in (0, SIZE - 1):
            with refused(errno.EBUSY):
                os.truncate("it", size)
        with refused(errno.EBUSY):
            os.close(os.open("it", os.O_WRONLY | os.O_TRUNC))
        with Path("it").open("ab") as file:
            file.write(b"x" * 4_000_000)
        window.bytes[:5] = b"hello"
        assert Path("it").read_bytes()[:8] == b"hello..."
    os.truncate("it", 5)
    assert Path("it").read_bytes() == b"hello"


def test_an_unlinked_leased_file_keeps_its_bytes(window: Window) -> None:
    with window.leased(writable=True):
        os.unlink("it")
        Path("other").write_bytes(b"!" * 64_000)
        assert bytes(window.bytes[:SIZE]) == b"." * SIZE


def test_a_file_grown_behind_the_mount_s_back_shows_its_size_after_publish(
    window: Window,
) -> None:
    assert os.stat("it").st_size == SIZE
    window.server.call("allocate", window.ino, SIZE, SIZE)
    window.publish()
    assert os.stat("it").st_size == 2 * SIZE
    assert Path("it").read_bytes() == b"." * SIZE + bytes(SIZE)
