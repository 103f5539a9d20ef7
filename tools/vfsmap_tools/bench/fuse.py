"""The mount beside a do-nothing pyfuse3 file system, fuse2fs, bindfs, and the kernel's own.

All keep their bytes on the same tmpfs, every server is a process of its own, and the load is the
same few system calls for each.
"""

import contextlib
import itertools
import mmap
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

from vfsmap.units import GIB, KIB, MIB
from vfsmap_tools.bench import places
from vfsmap_tools.bench.results import Grid, Plot, Result
from vfsmap_tools.bench.runner import (
    Goal,
    Measure,
    alternate,
    distribution,
    judge,
    quantiles,
    timed,
)

FILES: Final = 1000
SIZE: Final = 128 * MIB
READS: Final = 10_000
SAMPLES: Final = 5_000
IDLE_LIMIT: Final = 0.01
"""The part of one core that an idle mount may take."""
LISTING_LIMIT: Final = 1.25
"""How much longer an entry of a directory ten times as large may take: linear, with some noise."""
GOALS: Final = (
    Goal("create+close", "do-nothing", 1.5),
    Goal("create+close", "fuse2fs", 1.2),
    Goal("unlink", "do-nothing", 1.2),
    Goal("unlink", "fuse2fs", 0.6),
    Goal("random 4K O_DIRECT reads", "do-nothing", 2),
    Goal("random 4K O_DIRECT reads", "fuse2fs", 1),
    Goal("sequential 1M rewrites", "do-nothing", 0.9),
    Goal("sequential 1M rewrites", "fuse2fs", 3.5),
    Goal("sequential 1M rewrites of what was read", "do-nothing", 0.9),
    Goal("cold sequential reads", "do-nothing", 0.9),
    Goal("cold sequential reads", "fuse2fs", 3),
)


class Load:
    """The load on one peer: a directory of its own, and large files in it.

    One is written and read, the other written only: whether the page cache holds a file makes a
    difference to whoever writes past it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._dir = os.open(root, os.O_RDONLY)
        self._names: list[str] = []
        self._numbers = itertools.count()
        self._large, self._written = root / "large", root / "written"
        for path in (self._large, self._written):
            with path.open("wb", buffering=0) as file:
                for _ in range(SIZE // MIB):
                    file.write(bytes(MIB))

    def close(self) -> None:
        """Let go of the peer, so that it can be unmounted."""
        os.close(self._dir)

    def create(self) -> float:
        """Create and close empty files of new names."""
        self._names = [f"file-{next(self._numbers)}" for _ in range(FILES)]
        flags, where = os.O_CREAT | os.O_EXCL | os.O_WRONLY, self._dir
        start = time.perf_counter()
        for name in self._names:
            os.close(os.open(name, flags, 0o644, dir_fd=where))
        return FILES / (time.perf_counter() - start)

    def unlink(self) -> float:
        """Unlink the files made last."""
        start = time.perf_counter()
        for name in self._names:
            os.unlink(name, dir_fd=self._dir)
        return FILES / (time.perf_counter() - start)

    def random_reads(self) -> float:
        """Read single blocks past the page cache."""
        places = [random.randrange(SIZE // (4 * KIB)) * 4 * KIB for _ in range(READS)]
        flags = os.O_RDONLY | os.O_DIRECT
        with _opened(self._large, flags) as fd, mmap.mmap(-1, 4 * KIB) as buffer:
            buffers = [buffer]
            start = time.perf_counter()
            for place in places:
                os.preadv(fd, buffers, place)
            return READS / (time.perf_counter() - start)

    def rewrites(self) -> float:
        """Write over a file that nobody reads, from start to end."""
        return _rewrite(self._written)

    def rewrites_of_read(self) -> float:
        """Write over a file from start to end, all of which was read after it was written last."""
        with _opened(self._large, os.O_RDONLY) as fd:
            while os.read(fd, MIB):
                pass
        return _rewrite(self._large)

    def cold_reads(self) -> float:
        """Read the large file from start to end, with nothing of it in the page cache.

        The second time counts: the first one takes free pages, and those a virtual machine may
        have to get back from its host, in rounds that befall one peer and not the next.
        """
        with _opened(self._large, os.O_RDONLY) as fd, mmap.mmap(-1, MIB) as buffer:
            for _ in range(2):
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                start = time.perf_counter()
                for place in range(0, SIZE, MIB):
                    os.preadv(fd, [buffer], place)
                spent = time.perf_counter() - start
            return SIZE / MIB / spent

    def latencies(self, samples: int) -> dict[str, list[float]]:
        """Return the microseconds of single operations."""
        numbers = itertools.count()
        flags, where = os.O_CREAT | os.O_EXCL | os.O_WRONLY, self._dir
        removed = itertools.count()
        direct = os.O_RDONLY | os.O_DIRECT
        with _opened(self._large, direct) as fd, mmap.mmap(-1, 4 * KIB) as buffer:
            blocks = SIZE // (4 * KIB)
            chance = random.Random(1)
            return {
                "create+close": timed(
                    lambda: os.close(os.open(f"timed-{next(numbers)}", flags, 0o644, dir_fd=where)),
                    samples,
                ),
                "unlink": timed(lambda: os.unlink(f"timed-{next(removed)}", dir_fd=where), samples),
                "random 4K O_DIRECT read": timed(
                    lambda: os.preadv(fd, [buffer], chance.randrange(blocks) * 4 * KIB), samples
                ),
            }


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def _rewrite(path: Path) -> float:
    """Return the MiB a second, written from whole pages as dd and cp do."""
    with _opened(path, os.O_WRONLY) as fd, mmap.mmap(-1, MIB) as buffer:
        buffer[:] = bytes(MIB)  # the kernel finds pages for it now, not within the first write
        start = time.perf_counter()
        for place in range(0, SIZE, MIB):
            os.pwrite(fd, buffer, place)
        return SIZE / MIB / (time.perf_counter() - start)


MEASURES: Final = (
    Measure("create+close", "/s", Load.create),
    Measure("unlink", "/s", Load.unlink),
    Measure("random 4K O_DIRECT reads", "/s", Load.random_reads),
    Measure("sequential 1M rewrites", "MiB/s", Load.rewrites),
    Measure("sequential 1M rewrites of what was read", "MiB/s", Load.rewrites_of_read),
    Measure("cold sequential reads", "MiB/s", Load.cold_reads),
)


Peer = Callable[[Path], AbstractContextManager[tuple[Path, int]]]
"""Given a medium, a file system on it: where it is mounted, and the process that serves it."""


@contextlib.contextmanager
def _served(command: list[str], directory: Path) -> Iterator[tuple[Path, int]]:
    with places.running(command, directory) as pid:
        yield directory, pid


@contextlib.contextmanager
def _vfsmap(medium: Path) -> Iterator[tuple[Path, int]]:
    path = medium / "pool"
    places.vfsmap("format", path, "--size", "2G")
    with places.scratch() as directory:
        command = places.module("vfsmap_tools.cli", "mount", "--foreground", path, directory)
        with _served(command, directory) as served:
            yield served


@contextlib.contextmanager
def _do_nothing(_: Path, *mode: str) -> Iterator[tuple[Path, int]]:
    with places.scratch() as directory:
        command = places.module("vfsmap_tools.bench.donothing", directory, *mode)
        with _served(command, directory) as served:
            yield served


def _do_nothing_busy(medium: Path) -> AbstractContextManager[tuple[Path, int]]:
    return _do_nothing(medium, "busy")


@contextlib.contextmanager
def _fuse2fs(medium: Path) -> Iterator[tuple[Path, int]]:
    file = medium / "fuse2fs"
    with file.open("wb") as made:
        made.truncate(GIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", file], check=True)
    with (
        places.scratch() as directory,
        _served(["fuse2fs", str(file), str(directory), "-f"], directory) as served,
    ):
        yield served


@contextlib.contextmanager
def _bindfs(medium: Path) -> Iterator[tuple[Path, int]]:
    below = medium / "below"
    below.mkdir()
    with (
        places.scratch() as directory,
        _served(["bindfs", "-f", str(below), str(directory)], directory) as served,
    ):
        yield served


@contextlib.contextmanager
def _tmpfs(medium: Path) -> Iterator[tuple[Path, int]]:
    directory = medium / "plain"
    directory.mkdir()
    yield directory, 0


@contextlib.contextmanager
def _ext4(medium: Path) -> Iterator[tuple[Path, int]]:
    with places.image("ext4", medium / "ext4", GIB) as directory:
        yield directory, 0


PEERS: Final[dict[str, Peer]] = {
    "vfsmap": _vfsmap,
    "do-nothing": _do_nothing,
    "do-nothing, busy": _do_nothing_busy,
    "fuse2fs": _fuse2fs,
    "bindfs": _bindfs,
    "ext4": _ext4,
    "tmpfs": _tmpfs,
}


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def idle_share(pid: int, seconds: float = 5) -> float:
    """Return the part of one core that an idle server takes."""
    time.sleep(1)  # the kernel forgets what was unlinked a moment ago
    before = _processor_seconds(pid)
    time.sleep(seconds)
    return (_processor_seconds(pid) - before) / seconds


def listing_cost(root: Path, count: int) -> float:
    """Return the microseconds that an entry takes to list and stat among so many entries."""
    directory = Path(tempfile.mkdtemp(prefix="listing-", dir=root))
    where = os.open(directory, os.O_RDONLY)
    for number in range(count):
        os.mknod(f"{number}", dir_fd=where)
    os.close(where)
    start = time.perf_counter()
    with os.scandir(directory) as entries:
        listed = sum(entry.stat().st_nlink for entry in entries)
    spent = time.perf_counter() - start
    shutil.rmtree(directory)
    return spent / listed * 1e6


def _latencies(result: Result, loads: dict[str, Load], count: int) -> None:
    samples = {name: load.latencies(count) for name, load in loads.items()}
    operations = list(next(iter(samples.values())))
    rows: list[list[str | int | float]] = [
        [what, name, *quantiles(found[what])]
        for what in operations
        for name, found in samples.items()
    ]
    columns = ["operation", "file system", "median", "90 %", "99 %", "99.9 %"]
    result.grids.append(Grid("Latency, microseconds", columns, rows))
    for what in operations:
        curves = [distribution(name, found[what]) for name, found in samples.items()]
        name = "latency-" + what.partition("+")[0].partition(" ")[0]
        title = f"{what}: share of calls that were faster"
        result.plots.append(Plot(name, title, "microseconds", "%", curves, log_x=True))


def run(quick: bool) -> Result:
    """Measure the mount beside its peers."""
    result = Result(
        "fuse",
        "The mounted file system",
        f"{FILES:,} files created and unlinked, {READS:,} random reads of 4 KiB past the page "
        f"cache, and files of {SIZE // MIB} MiB rewritten and read from start to end; what was "
        "read is in the page cache, and vfsmap has it dropped as it writes past it. do-nothing "
        "is a pyfuse3 file system that keeps nothing; busy gives it the mount's busy-polling.",
    )
    with contextlib.ExitStack() as stack:
        medium = stack.enter_context(places.tmpfs("7G"))
        loads, pids = {}, {}
        for name, peer in PEERS.items():
            program = name if name in ("fuse2fs", "bindfs") else "true"
            if shutil.which(program) is None:
                result.left_out.append(f"{name}, which is not installed")
                continue
            root, pids[name] = stack.enter_context(peer(medium))
            loads[name] = stack.enter_context(contextlib.closing(Load(root)))
        result.rates = alternate(MEASURES, loads, 2 if quick else 21)
        judge(result, GOALS)
        _latencies(result, loads, SAMPLES // 10 if quick else SAMPLES)
        share = idle_share(pids["vfsmap"], 2 if quick else 10)
        result.promise("idle: part of one core", share, IDLE_LIMIT, at_most=True)
        counts = few, many = (1_000, 10_000) if quick else (10_000, 100_000)
        root, times = loads["vfsmap"].root, 1 if quick else 3
        costs = [[listing_cost(root, count) for count in counts] for _ in range(times)]
        small, large = map(statistics.median, zip(*costs, strict=True))
        result.promise(
            f"listing: an entry among {many:,} costs so many times one among {few:,}",
            large / small,
            LISTING_LIMIT,
            at_most=True,
        )
    return result
