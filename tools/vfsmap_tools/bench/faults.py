"""What a page fault costs at 4 KiB, 2 MiB and 1 GiB, on pages that exist and on new ones.

A window over a file of each medium is made anew each time and touched from start to end; beside it
an mmap through the mount, whose pages are in the page cache.
"""

import mmap
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Final, NamedTuple

import click

from vfsmap.mapping.window import Window
from vfsmap.pmem.medium import Commit, Medium
from vfsmap.units import GIB, KIB, MIB, PMD, PTE, PUD, Extent, Level, format_size
from vfsmap_tools.bench import places
from vfsmap_tools.bench.results import Grid, Result
from vfsmap_tools.bench.runner import Goal, Measure, alternate, judge, median_of

SMALL: Final = "window, 4 KiB on tmpfs"
LARGE: Final = "window, 2 MiB on tmpfs"
MOUNT: Final = "mmap through the mount"


class Backing(NamedTuple):
    """A file, the size of whose pages is known."""

    path: Path
    size: int
    level: Level
    medium: Medium

    @contextmanager
    def view(self, *, writable: bool = False) -> Iterator[memoryview]:
        """Yield a window of the file that nobody has touched."""
        fd = os.open(self.path, os.O_RDWR)
        try:
            extents = [Extent(0, 0, self.size)]
            with (
                Window(fd, extents, self.size, self.medium, writable=writable) as window,
                window.view() as view,
            ):
                yield view
        finally:
            os.close(fd)

    def renew(self) -> None:
        """Have the file keep no page."""
        os.truncate(self.path, 0)
        os.truncate(self.path, self.size)

    def first_stores(self) -> float:
        """Return the microseconds that the first store to a new page takes."""
        self.renew()
        step = self.level.size
        with self.view(writable=True) as view:
            places_ = range(0, min(self.size, 512 * step), step)
            return _touch(view, places_, store=True)

    def first_loads(self) -> float:
        """Return the microseconds that the first load of a page that exists takes."""
        with self.view() as view:
            return _touch(view, range(0, min(self.size, 512 * 512 * KIB), self.level.size))


class Through:
    """A file of the mount, mapped as any program would."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextmanager
    def view(self) -> Iterator[memoryview]:
        """Yield a mapping of the file that nobody has touched."""
        with (
            self._path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped,
            memoryview(mapped) as view,
        ):
            yield view


def _touch(view: memoryview, at: range, *, store: bool = False) -> float:
    began = time.perf_counter()
    if store:
        for place in at:
            view[place] = 1
    else:
        for place in at:
            view[place]
    return (time.perf_counter() - began) / len(at) * 1e6


def _first_pass(peer: Backing | Through) -> float:
    """Return GiB/s of a pass that touches each 4 KiB once."""
    with peer.view() as view:
        began = time.perf_counter()
        view[:: PTE.size].tobytes()
        return len(view) / GIB / (time.perf_counter() - began)


def _second_pass(peer: Backing | Through) -> float:
    with peer.view() as view:
        view[:: PTE.size].tobytes()
        began = time.perf_counter()
        view[:: PTE.size].tobytes()
        return len(view) / GIB / (time.perf_counter() - began)


MEASURES: Final = (
    Measure("first pass", "GiB/s", _first_pass),
    Measure("second pass", "GiB/s", _second_pass),
)
GOALS: Final = (Goal("first pass", MOUNT, 1.0),)


@contextmanager
def _hugetlbfs(level: Level, size: int) -> Iterator[Path]:
    with (
        places.huge_pages(level, size // level.size),
        places.mounted("hugetlbfs", "vfsmap-bench", f"pagesize={format_size(level.size)}") as path,
    ):
        yield path


def _media(
    size: int,
) -> dict[str, tuple[Callable[[], AbstractContextManager[Path]], Level, Medium]]:
    tmpfs = f"{size // MIB + 64}M"
    return {
        LARGE: (
            lambda: places.tmpfs(tmpfs, "always"),
            PMD,
            Medium("tmpfs", Commit.STORE, PTE.size, "always"),
        ),
        SMALL: (
            lambda: places.tmpfs(tmpfs, "never"),
            PTE,
            Medium("tmpfs", Commit.STORE, PTE.size, "never"),
        ),
        "window, 2 MiB on hugetlbfs": (
            lambda: _hugetlbfs(PMD, size),
            PMD,
            Medium("hugetlbfs", Commit.STORE, PMD.size),
        ),
        "window, 1 GiB on hugetlbfs": (
            lambda: _hugetlbfs(PUD, max(size, PUD.size)),
            PUD,
            Medium("hugetlbfs", Commit.STORE, PUD.size),
        ),
    }


def run(quick: bool) -> Result:
    """Measure first touches."""
    size = 256 * MIB if quick else GIB
    result = Result(
        "faults",
        "First touch",
        f"A window over {format_size(size)} of pages that exist already, made anew for each pass, "
        "touched once in each 4 KiB; then single faults, on pages that exist and on new ones, "
        "which the kernel has to find and to zero.",
    )
    with ExitStack() as stack:
        backings: dict[str, Backing] = {}
        for name, (make, level, medium) in _media(size).items():
            try:
                place = stack.enter_context(make())
            except click.ClickException as exc:
                result.left_out.append(f"{name}: {exc.message}")
                continue
            backing = Backing(place / "file", max(size, level.size), level, medium)
            backing.path.touch()
            os.truncate(backing.path, backing.size)
            backings[name] = backing
        rows: list[list[str | int | float]] = []
        for name, backing in backings.items():
            new = median_of(backing.first_stores, 3 if quick else 7)
            _fill(backing)
            old = median_of(backing.first_loads, 3 if quick else 7)
            faults = size // min(backing.level.size, size)
            rows.append([name, round(old, 2), round(new, 2), faults, round(old * faults / 1e3, 3)])
        columns = ["mapping", "existing page", "new page", f"faults for {format_size(size)}", "ms"]
        result.grids.append(Grid("One fault, microseconds", columns, rows))
        place = stack.enter_context(places.tmpfs(f"{size // MIB + 512}M"))
        mount = stack.enter_context(places.pool(place, f"{size // MIB + 256}M"))
        path = mount / "file"
        with path.open("wb", buffering=0) as file:
            for _ in range(size // MIB):
                file.write(bytes(MIB))
        with path.open("rb", buffering=0) as file:
            while file.read(MIB):  # into the page cache: only the faults are to be measured
                pass
        peers: dict[str, Backing | Through] = {**backings, MOUNT: Through(path)}
        result.rates = alternate(MEASURES, peers, 3 if quick else 9)
        judge(result, GOALS)
    return result


def _fill(backing: Backing) -> None:
    with backing.view(writable=True) as view:
        for at in range(0, backing.size, PTE.size):
            view[at] = 1
