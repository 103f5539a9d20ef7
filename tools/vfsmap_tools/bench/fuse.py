"""The mount beside a do-nothing pyfuse3 file system and fuse2fs, all on the same tmpfs.

Every peer is a process of its own, and the load is the same few system calls for each.  Run it as
``python -m vfsmap_tools.bench.fuse``; it needs root (for a tmpfs) and fuse2fs.
"""

import contextlib
import itertools
import mmap
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple

import click

from vfsmap.units import GIB, KIB, MIB
from vfsmap_tools.bench.runner import Goal, Measure, alternate, report

FILES: Final = 1000
SIZE: Final = 128 * MIB
READS: Final = 10_000
GOALS: Final = (
    Goal("create+close", "do-nothing", 1.5),
    Goal("create+close", "fuse2fs", 1.2),
    Goal("unlink", "do-nothing", 1.2),
    Goal("unlink", "fuse2fs", 0.6),
    Goal("random 4K O_DIRECT reads", "do-nothing", 2),
    Goal("random 4K O_DIRECT reads", "fuse2fs", 1),
    Goal("sequential 1M rewrites", "do-nothing", 0.9),
    Goal("sequential 1M rewrites", "fuse2fs", 3.5),
    Goal("cold sequential reads", "do-nothing", 0.9),
    Goal("cold sequential reads", "fuse2fs", 3),
)


class Load:
    """The load on one peer: a directory of its own and one large file in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._dir = os.open(root, os.O_RDONLY)
        self._names: list[str] = []
        self._numbers = itertools.count()
        self._large = root / "large"
        with self._large.open("wb", buffering=0) as file:
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
        with self._opened(os.O_RDONLY | os.O_DIRECT) as fd, mmap.mmap(-1, 4 * KIB) as buffer:
            buffers = [buffer]
            start = time.perf_counter()
            for place in places:
                os.preadv(fd, buffers, place)
            return READS / (time.perf_counter() - start)

    def rewrites(self) -> float:
        """Write over the large file from start to end, through the page cache."""
        data = bytes(MIB)
        with self._opened(os.O_WRONLY) as fd:
            start = time.perf_counter()
            for place in range(0, SIZE, MIB):
                os.pwrite(fd, data, place)
            return SIZE / MIB / (time.perf_counter() - start)

    def cold_reads(self) -> float:
        """Read the large file from start to end, with nothing of it in the page cache."""
        with self._opened(os.O_RDONLY) as fd, mmap.mmap(-1, MIB) as buffer:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            start = time.perf_counter()
            for place in range(0, SIZE, MIB):
                os.preadv(fd, [buffer], place)
            return SIZE / MIB / (time.perf_counter() - start)

    @contextlib.contextmanager
    def _opened(self, flags: int) -> Iterator[int]:
        fd = os.open(self._large, flags)
        try:
            yield fd
        finally:
            os.close(fd)


MEASURES: Final = (
    Measure("create+close", "/s", Load.create),
    Measure("unlink", "/s", Load.unlink),
    Measure("random 4K O_DIRECT reads", "/s", Load.random_reads),
    Measure("sequential 1M rewrites", "MiB/s", Load.rewrites),
    Measure("cold sequential reads", "MiB/s", Load.cold_reads),
)


class Place(NamedTuple):
    """Where a peer keeps its bytes and where it is mounted."""

    medium: Path
    mountpoint: Path


def _module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", name, *arguments]


def _vfsmap(place: Place) -> list[str]:
    pool = str(place.medium / "pool")
    command = _module("vfsmap_tools.cli", "format", pool, "--size", "2G")
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return _module("vfsmap_tools.cli", "mount", "--foreground", pool, str(place.mountpoint))


def _do_nothing(place: Place) -> list[str]:
    return _module("vfsmap_tools.bench.donothing", str(place.mountpoint))


def _do_nothing_busy(place: Place) -> list[str]:
    return _module("vfsmap_tools.bench.donothing", str(place.mountpoint), "busy")


def _fuse2fs(place: Place) -> list[str]:
    image = place.medium / "image"
    with image.open("wb") as file:
        file.truncate(GIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    return ["fuse2fs", str(image), str(place.mountpoint), "-f"]


PEERS: Final[dict[str, Callable[[Place], list[str]]]] = {
    "vfsmap": _vfsmap,
    "do-nothing": _do_nothing,
    "do-nothing, busy": _do_nothing_busy,
    "fuse2fs": _fuse2fs,
}


@contextlib.contextmanager
def _running(command: list[str], mountpoint: Path) -> Iterator[int]:
    """Run a file system server until the block ends; yield its process id."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            deadline = time.monotonic() + 20
            while not mountpoint.is_mount():
                if server.poll() is not None or time.monotonic() > deadline:
                    raise click.ClickException(f"no mount came of {' '.join(command)}")
                time.sleep(0.05)
            yield server.pid
        finally:
            subprocess.run(["umount", mountpoint], check=server.poll() is None)
            server.wait(20)


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def idle_share(pid: int, seconds: float = 5) -> float:
    """Return the part of one core that an idle server takes."""
    before = _processor_seconds(pid)
    time.sleep(seconds)
    return (_processor_seconds(pid) - before) / seconds


def listing_growth(root: Path, few: int = 10_000, many: int = 100_000) -> float:
    """Return how much longer an entry takes to list and stat among many entries than among few."""
    seconds = []
    for count in (few, many):
        directory = root / f"listing-{count}"
        directory.mkdir()
        with _directory(directory) as fd:
            for number in range(count):
                os.mknod(f"{number}", dir_fd=fd)
        start = time.perf_counter()
        with os.scandir(directory) as entries:
            listed = sum(entry.stat().st_nlink for entry in entries)
        seconds.append((time.perf_counter() - start) / listed)
    return seconds[1] / seconds[0]


@contextlib.contextmanager
def _directory(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _tmpfs() -> Iterator[Path]:
    with TemporaryDirectory(prefix="vfsmap-bench-") as name:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "huge=always,size=6G", "vfsmap-bench", name], check=True
        )
        try:
            yield Path(name)
        finally:
            subprocess.run(["umount", name], check=True)


@click.command()
@click.option("--rounds", default=7, show_default=True, help="Measurements of each peer.")
@click.option("--peer", "names", multiple=True, type=click.Choice(list(PEERS)), help="Only these.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(rounds: int, names: tuple[str, ...], as_json: bool) -> None:
    """Measure the mount beside its peers; exit 1 when a goal is missed."""
    with contextlib.ExitStack() as stack:
        medium = stack.enter_context(_tmpfs())
        loads: dict[str, Load] = {}
        pids: dict[str, int] = {}
        for name in names or PEERS:
            mountpoint = Path(stack.enter_context(TemporaryDirectory(prefix="vfsmap-bench-")))
            command = PEERS[name](Place(medium, mountpoint))
            pids[name] = stack.enter_context(_running(command, mountpoint))
            loads[name] = stack.enter_context(contextlib.closing(Load(mountpoint)))
        met = report(alternate(MEASURES, loads, rounds), GOALS, as_json=as_json)
        for name, pid in pids.items():
            click.echo(f"{name}: {idle_share(pid):.2%} of a core when idle", err=True)
        if "vfsmap" in loads:
            growth = listing_growth(loads["vfsmap"].root)
            click.echo(
                f"vfsmap: an entry among 100,000 takes {growth:.2f} of one among 10,000", err=True
            )
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
