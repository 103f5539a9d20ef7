"""One file under everything at once: several descriptors, direct and not, maps, cuts, copies.

Each step is done to the file and to a bytearray; after each, size and a random range are compared,
and now and then all of it, through a descriptor that is opened for that.
"""

import mmap
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from vfsmap.testing.serve import served

MOST: Final = 5 * 1024 * 1024 + 777
"""Beyond two units, so that the file is moved into huge ones on the way."""
PAGE: Final = mmap.PAGESIZE


class Exerciser:
    """A file and what should be in it."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path = path
        self.chance = random.Random(seed)
        self.model = bytearray()
        self.fds: list[int] = []
        self.direct = -1
        self.maps: list[mmap.mmap] = []

    def run(self, steps: int) -> None:
        """Do random steps and compare after each."""
        self.path.touch()
        weighed: dict[Callable[[], object], int] = {
            self.write: 8,
            self.append: 2,
            self.write_direct: 4,
            self.write_vector: 2,
            self.store: 8,
            self.cut: 2,
            self.grow: 3,
            self.copy: 2,
            self.sync: 2,
            self.reopen: 2,
            self.remap: 3,
        }
        try:
            self.reopen()
            for number in range(steps):
                (step,) = self.chance.choices(list(weighed), list(weighed.values()))
                step()
                self.compare(f"step {number}, {step.__name__}", whole=number % 40 == 39)
            self.compare("the end", whole=True)
        finally:
            self.close()

    # places and bytes

    def range(self, most: int = 300_000, limit: int | None = None) -> tuple[int, int]:
        """Return a start and an end, more often than not at the edges that matter."""
        limit = MOST if limit is None else limit
        start = self.chance.randrange(limit)
        if self.chance.random() < 0.3:
            start -= start % self.chance.choice((512, PAGE, 1 << 21))
        length = self.chance.choice((1, 100, PAGE, self.chance.randrange(1, most)))
        return start, min(start + length, limit)

    def data(self, length: int) -> bytes:
        return self.chance.randbytes(length)

    def put(self, start: int, data: bytes) -> None:
        self.model.extend(bytes(max(0, start - len(self.model))))
        self.model[start : start + len(data)] = data

    # steps

    def write(self) -> None:
        start, end = self.range()
        data = self.data(end - start)
        assert os.pwrite(self.chance.choice(self.fds), data, start) == len(data)
        self.put(start, data)

    def append(self) -> None:
        if len(self.model) < MOST - PAGE:
            fd = os.open(self.path, os.O_WRONLY | os.O_APPEND)
            data = self.data(self.chance.randrange(1, PAGE))
            os.write(fd, data)
            os.close(fd)
            self.model += data

    def write_direct(self) -> None:
        start, end = self.range()
        start -= start % PAGE
        with aligned(PAGE * ((end - start) // PAGE + 1)) as buffer:
            data = self.data(len(buffer))
            buffer[:] = data
            assert os.pwrite(self.direct, buffer, start) == len(data)
        self.put(start, data)

    def write_vector(self) -> None:
        start, end = self.range()
        pieces = [self.data((end - start) // 3 + 1) for _ in range(3)]
        os.pwritev(self.chance.choice(self.fds), pieces, start)
        self.put(start, b"".join(pieces))

    def store(self) -> None:
        if self.maps:
            view = self.chance.choice(self.maps)
            start, end = self.range(limit=min(len(view), len(self.model)))
            data = self.data(end - start)
            view[start:end] = data
            self.put(start, data)

    def cut(self) -> None:
        size, _ = self.range(limit=len(self.model) + 1)
        self.drop_maps()
        self.resize(size)

    def grow(self) -> None:
        size, _ = self.range()
        if size > len(self.model):
            self.resize(size)

    def resize(self, size: int) -> None:
        if self.chance.random() < 0.5:
            os.truncate(self.path, size)
        else:
            os.ftruncate(self.chance.choice(self.fds), size)
        del self.model[size:]
        self.model.extend(bytes(size - len(self.model)))

    def copy(self) -> None:
        if not self.model:
            return
        start, end = self.range(limit=len(self.model))
        to = self.chance.randrange(MOST)
        if start < to + end - start and to < end:
            return  # within one file, ranges may not overlap
        one, other = self.chance.choice(self.fds), self.chance.choice(self.fds)
        copied = os.copy_file_range(one, other, end - start, start, to)
        assert copied > 0
        self.put(to, bytes(self.model[start : start + copied]))

    def sync(self) -> None:
        fd = self.chance.choice(self.fds)
        (os.fsync if self.chance.random() < 0.5 else os.fdatasync)(fd)
        for view in self.maps:
            view.flush()
        if self.chance.random() < 0.5:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def reopen(self) -> None:
        for fd in (*self.fds, self.direct):
            if fd >= 0:
                os.close(fd)
        self.fds = [os.open(self.path, os.O_RDWR) for _ in range(3)]
        self.direct = os.open(self.path, os.O_RDWR | os.O_DIRECT)

    def remap(self) -> None:
        if len(self.maps) > 2:
            self.drop_maps()
        if self.model:
            self.maps.append(mmap.mmap(self.chance.choice(self.fds), len(self.model)))

    # the comparison

    def compare(self, what: str, *, whole: bool) -> None:
        assert os.stat(self.path).st_size == len(self.model), what
        if not self.model:
            return
        start, end = (0, len(self.model)) if whole else self.range(limit=len(self.model))
        wanted = bytes(self.model[start:end])
        for way, found in self.read(start, end):
            if found != wanted:
                at = next(i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b)
                raise AssertionError(f"{what}: {way} differs at {start + at:#x}")

    def read(self, start: int, end: int) -> Iterator[tuple[str, bytes]]:
        yield "a descriptor", os.pread(self.chance.choice(self.fds), end - start, start)
        for view in self.maps:
            if end <= len(view):
                yield "a map", view[start:end]
        page = start - start % PAGE
        with aligned(-(-(end - page) // PAGE) * PAGE) as buffer:
            os.preadv(self.direct, [buffer], page)
            yield "a direct descriptor", bytes(buffer[start - page : end - page])
        with self.path.open("rb") as file:
            file.seek(start)
            yield "a new descriptor", file.read(end - start)

    def drop_maps(self) -> None:
        for view in self.maps:
            view.close()
        self.maps.clear()

    def close(self) -> None:
        self.drop_maps()
        for fd in (*self.fds, self.direct):
            os.close(fd)


@contextmanager
def aligned(length: int) -> Iterator[memoryview]:
    """Yield a buffer at the start of a page, as direct I/O may want it."""
    with mmap.mmap(-1, length) as pages, memoryview(pages) as view:
        yield view


@pytest.mark.parametrize(
    ("seed", "steps"),
    [(1, 300), (2, 300), *(pytest.param(n, 5000, marks=pytest.mark.slow) for n in range(3, 9))],
)
def test_a_file_under_everything_at_once_agrees_with_a_model(
    here: Path, seed: int, steps: int
) -> None:
    Exerciser(here / "it", seed).run(steps)


@pytest.mark.parametrize("options", ["writeback", "noatime,nobusypoll"])
def test_with_other_options_it_agrees_too_and_after_the_next_mount(
    place: tuple[Path, Path], options: str
) -> None:
    exerciser = Exerciser(place[1] / "it", 7)
    with served(*place, options):
        exerciser.run(250)
    with served(*place):
        assert exerciser.path.read_bytes() == exerciser.model
