"""What a private store costs: copied 4 KiB at a time, or 2 MiB at a time.

The same changes are made to a private window in four ways: plain stores on tmpfs, where the kernel
copies 4 KiB; blocks of 4 KiB and of 2 MiB laid over the window by ``own()``; plain stores on
hugetlbfs, where the kernel copies 2 MiB.  Each round makes a new window for each way.  It needs
1 GiB of memory.
"""

import contextlib
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import numpy

from vfsmap.mapping.overlay import PrivateWindow
from vfsmap.mapping.window import Window
from vfsmap.pmem import libc, pages
from vfsmap.pmem.medium import Commit, Medium
from vfsmap.units import KIB, MIB, PMD, PTE, Extent, Level, format_size
from vfsmap_tools.bench import places
from vfsmap_tools.bench.results import Grid, Result
from vfsmap_tools.bench.runner import quantiles

SIZE: Final = 256 * MIB
READS: Final = 1 << 20
MEDIA: Final = {
    "tmpfs": Medium("tmpfs", Commit.STORE, PTE.size, "always"),
    "hugetlbfs": Medium("hugetlbfs", Commit.STORE, PMD.size),
}
PATTERNS: Final = {"a byte in each 4 KiB": 4 * KIB, "a byte in each 2 MiB": 2 * MIB, "all bytes": 1}


class Way(NamedTuple):
    """How private bytes come about."""

    name: str
    medium: str
    cow: Level
    owns: bool
    """Blocks are laid over by own() first; else the store alone makes the kernel copy."""


WAYS: Final = (
    Way("plain stores, tmpfs", "tmpfs", PTE, owns=False),
    Way("own() in 4 KiB, tmpfs", "tmpfs", PTE, owns=True),
    Way("own() in 2 MiB, tmpfs", "tmpfs", PMD, owns=True),
    Way("plain stores, hugetlbfs", "hugetlbfs", PMD, owns=False),
)


class Cost(NamedTuple):
    """What one pattern cost one way."""

    milliseconds: float
    copied: int
    """Bytes of private memory that exist afterwards."""
    tables: int
    """Bytes by which the process's page tables grew."""
    nanoseconds_a_read: float
    """Of a load at random afterwards, all of it having been touched."""


def run(quick: bool) -> Result:
    """Measure private stores; ``quick`` makes fewer rounds on a smaller window."""
    size, rounds = (32 * MIB, 2) if quick else (SIZE, 7)
    result = Result(
        "cow",
        "Private stores at 4 KiB and at 2 MiB",
        f"A private window of {format_size(size)} is stored to in four ways; what was copied, and "
        "what reading at random costs afterwards. Background: copy-on-write.md.",
    )
    with _files(size) as files:
        costs: dict[tuple[str, str], list[Cost]] = {}
        firsts: dict[str, list[float]] = {way.name: [] for way in WAYS}
        for number in range(rounds):
            turn = number % len(WAYS)
            for way in WAYS[turn:] + WAYS[:turn]:
                for pattern, stride in PATTERNS.items():
                    cost = _change(files[way.medium], size, way, stride)
                    costs.setdefault((pattern, way.name), []).append(cost)
                firsts[way.name].extend(_first_stores(files[way.medium], size, way))
    medians = {key: _median(found) for key, found in costs.items()}
    columns = ["pattern", "way", "ms", "copied", "tables", "ns a read"]
    rows: list[list[str | int | float]] = [
        [
            pattern,
            way.name,
            (cost := medians[pattern, way.name]).milliseconds,
            format_size(cost.copied),
            format_size(cost.tables),
            cost.nanoseconds_a_read,
        ]
        for pattern in PATTERNS
        for way in WAYS
    ]
    result.grids.append(Grid("Stores by pattern", columns, rows))
    result.grids.append(
        Grid(
            "The first store to a block, microseconds",
            ["way", "median", "90 %", "99 %", "99.9 %"],
            [[name, *quantiles(found)] for name, found in firsts.items()],
        )
    )
    even = _break_even({way.name: medians["a byte in each 4 KiB", way.name] for way in WAYS})
    unit = PMD.size // PTE.size
    result.grids.append(
        Grid("Copying a unit at once is cheaper", ["from", "of"], [[round(even, 1), unit]])
    )
    return result


def _break_even(costs: dict[str, Cost]) -> float:
    """Return of how many stored 4 KiB pages in a unit on, copying the unit at once is cheaper."""
    _, small, large, _ = (costs[way.name].milliseconds for way in WAYS)
    return large / small * (PMD.size // PTE.size)


@contextlib.contextmanager
def _files(size: int) -> Iterator[dict[str, int]]:
    """Make a file of each medium; as many huge pages again are free for its copies."""
    flags = {"tmpfs": os.MFD_CLOEXEC, "hugetlbfs": os.MFD_HUGETLB | os.MFD_HUGE_2MB}
    with places.huge_pages(PMD, 2 * size // PMD.size), contextlib.ExitStack() as fds:
        files = {name: os.memfd_create(name, flag) for name, flag in flags.items()}
        for name, fd in files.items():
            fds.callback(os.close, fd)
            os.posix_fallocate(fd, 0, size)
            with Window(fd, [Extent(0, 0, size)], size, MEDIA[name], writable=True) as window:
                libc.try_collapse(*window.mapped)  # memfds follow the kernel's policy: never
        yield files


def _window(fd: int, size: int, way: Way) -> PrivateWindow:
    extents = [Extent(0, 0, size)]
    return PrivateWindow(fd, extents, size, MEDIA[way.medium], cow=way.cow, populate=True)


def _warm(size: int) -> None:
    """Have free memory at hand: a virtual machine may get its own from the host at first touch."""
    flags = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS
    address = libc.mmap(0, size, libc.PROT_READ | libc.PROT_WRITE, flags)
    libc.try_madvise(address, size, libc.MADV_HUGEPAGE)
    libc.try_madvise(address, size, libc.MADV_POPULATE_WRITE)
    libc.munmap(address, size)


def _change(fd: int, size: int, way: Way, stride: int) -> Cost:
    data = bytes(-(-size // stride))
    _warm(2 * size)
    tables = _table_bytes()
    with _window(fd, size, way) as window, window.view() as view:
        start = time.perf_counter()
        if way.owns:
            # neighbouring blocks are one call; apart, each is one of its own
            step = stride if stride > way.cow.size else size
            for at in range(0, size, step):
                window.own(at, 1 if step == stride else size)
        view[::stride] = data
        spent = time.perf_counter() - start
        read = _random_reads(view)
        return Cost(spent * 1e3, _private(window), _table_bytes() - tables, read)


def _first_stores(fd: int, size: int, way: Way) -> list[float]:
    """Return the microseconds that the first store to a block takes, for some blocks."""
    _warm(size)
    with _window(fd, size, way) as window, window.view() as view:
        spent = []
        for at in range(0, size, 4 * PMD.size):
            start = time.perf_counter()
            if way.owns:
                window.own(at, 1)
            view[at] = 1
            spent.append((time.perf_counter() - start) * 1e6)
        return spent


def _random_reads(view: memoryview) -> float:
    view[::4096].tobytes()
    words = numpy.frombuffer(view, "u8")
    places = numpy.random.default_rng(1).integers(0, len(words), READS)
    start = time.perf_counter()
    words[places].sum()
    return (time.perf_counter() - start) * 1e9 / READS


def _private(window: PrivateWindow) -> int:
    return sum(run.length for run in pages.runs(*window.mapped) if not run.file)


def _table_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmPTE:"):
            return int(line.split()[1]) * KIB
    return 0


def _median(costs: list[Cost]) -> Cost:
    middle = [statistics.median(values) for values in zip(*costs, strict=True)]
    return Cost(round(middle[0], 2), int(middle[1]), int(middle[2]), round(middle[3], 1))
