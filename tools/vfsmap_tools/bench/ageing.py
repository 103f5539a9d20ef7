"""Ageing: whether what is huge stays huge when files come, grow and go for a long time.

One seeded trace is lived by a pool and by images of ext4 and xfs of the same size; every tenth of a
turnover all files are asked where they lie, and the file system what is free.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Final, Protocol

from vfsmap.fs import ROOT, FileSystem
from vfsmap.fs.coverage import LARGE, Coverage, coverage, mappable, within
from vfsmap.pool import Pool
from vfsmap.units import GIB, MIB, PMD, PUD, Level, align_down, align_up, format_size
from vfsmap_tools.bench import places
from vfsmap_tools.bench.fsmap import free_runs
from vfsmap_tools.bench.results import Curve, Grid, Plot, Result
from vfsmap_tools.bench.trace import FULL, Step, trace
from vfsmap_tools.fiemap import placed_extents

GOAL: Final = 0.95
"""The part of the bytes of files of 2 MiB and more that stays huge."""
_CHUNK: Final = MIB
_ZEROS: Final = memoryview(bytes(_CHUNK))
_SAMPLES_A_TURNOVER: Final = 10
_DIRECTORIES: Final = 64


class Aged(Protocol):
    """A file system that lives the trace."""

    def live(self, step: Step) -> None:
        """Do a step."""

    def look(self) -> Coverage:
        """Return what is huge."""


class _OnPool:
    def __init__(self, fs: FileSystem) -> None:
        self._fs = fs
        self._directories = [
            fs.mkdir(ROOT, b"%d" % n, 0o755, 0, 0).ino for n in range(_DIRECTORIES)
        ]
        self._inodes: dict[int, int] = {}
        self._sizes: dict[int, int] = {}

    def live(self, step: Step) -> None:
        fs, directory, name = (
            self._fs,
            self._directories[step.file % _DIRECTORIES],
            b"%d" % step.file,
        )
        if step.kind == "delete":
            fs.unlink(directory, name)
            del self._inodes[step.file], self._sizes[step.file]
            fs.pool.space.trim()
            return
        if step.kind == "create":
            self._inodes[step.file] = fs.create(directory, name, 0o644, 0, 0).ino
            self._sizes[step.file] = 0
        ino, at = self._inodes[step.file], self._sizes[step.file]
        for piece in _pieces(step.length):
            at += fs.write(ino, at, piece)
        self._sizes[step.file] = at

    def look(self) -> Coverage:
        return coverage(self._fs)


class _OnKernel:
    def __init__(self, root: Path) -> None:
        self._root = root
        for n in range(_DIRECTORIES):
            (root / str(n)).mkdir()
        self._sizes: dict[int, int] = {}

    def _path(self, file: int) -> Path:
        return self._root / str(file % _DIRECTORIES) / str(file)

    def live(self, step: Step) -> None:
        path = self._path(step.file)
        if step.kind == "delete":
            path.unlink()
            del self._sizes[step.file]
            return
        with path.open("ab", buffering=0) as file:
            for piece in _pieces(step.length):
                file.write(piece)
        self._sizes[step.file] = self._sizes.get(step.file, 0) + step.length

    def look(self) -> Coverage:
        os.sync()
        files = large = huge = giant = 0
        for file, size in self._sizes.items():
            if size < LARGE:
                files += size
                continue
            fd = os.open(self._path(file), os.O_RDONLY)
            try:
                extents = placed_extents(fd, size) or []
            finally:
                os.close(fd)
            present = within(extents, size)
            files += present
            large += present
            huge += mappable(extents, size, PMD)
            giant += mappable(extents, size, PUD)
        free = list(free_runs(self._root))
        total, in_units, in_giants = (
            sum(length for _, length in free),
            _in_units(free, PMD),
            _in_units(free, PUD),
        )
        return Coverage(files, large, huge, giant, total, in_units, in_giants)


def _pieces(length: int) -> Iterator[memoryview]:
    for at in range(0, length, _CHUNK):
        yield _ZEROS[: min(_CHUNK, length - at)]


def _in_units(runs: Iterable[tuple[int, int]], level: Level) -> int:
    return sum(
        max(align_down(start + length, level.size) - align_up(start, level.size), 0)
        for start, length in runs
    )


@contextmanager
def _pool(size: int) -> Iterator[Aged]:
    with (
        places.tmpfs(f"{size // MIB + 16}M") as medium,
        FileSystem.format(Pool.create(medium / "pool", size)) as fs,
    ):
        yield _OnPool(fs)


@contextmanager
def _image(kind: str, size: int, *options: str) -> Iterator[Aged]:
    with (
        places.tmpfs(f"{size // MIB + 16}M") as medium,
        places.image(kind, medium / "image", size, *options) as root,
    ):
        yield _OnKernel(root)


def age(aged: Aged, steps: Iterable[Step]) -> Iterator[tuple[float, Coverage]]:
    """Live a trace; yield how old the file system is, in turnovers, and what is huge then."""
    due = 0.0
    for step in steps:
        aged.live(step)
        if step.turnover and step.turnover >= due:
            yield step.turnover, aged.look()
            due = step.turnover + 1 / _SAMPLES_A_TURNOVER
    yield step.turnover, aged.look()


def run(quick: bool) -> Result:
    """Age a pool, ext4 and xfs."""
    size, turnovers = (768 * MIB, 2) if quick else (6 * GIB, 10)
    result = Result(
        "ageing",
        "Ageing",
        f"File systems of {format_size(size)} are filled to {FULL:.0%} and turned over {turnovers} "
        "times: files of 1 KiB to 64 MiB are made, grow by appending, and are deleted at random, "
        "the same for each. Shown is the part of the bytes that page-table entries of 2 MiB, or "
        "1 GiB, could map: of files of 2 MiB and more, and of what is free. su=2m is what xfs is "
        "told on persistent memory, to have its files huge.",
    )
    kinds: dict[str, AbstractContextManager[Aged]] = {
        "vfsmap": _pool(size),
        "ext4": _image("ext4", size),
        "xfs": _image("xfs", size),
        "xfs, su=2m": _image("xfs", size, "-d", "su=2m,sw=1"),
    }
    found: dict[str, list[tuple[float, Coverage]]] = {}
    for name, made in kinds.items():
        with made as aged:
            found[name] = list(age(aged, trace(size, turnovers)))
    rows: list[list[str | int | float]] = []
    for name, samples in found.items():
        last = samples[-1][1]
        rows.append(
            [
                name,
                last.large // MIB,
                round(100 * last.share, 2),
                round(100 * min(sample.share for _, sample in samples), 2),
                last.giant // MIB,
                last.free // MIB,
                round(100 * last.free_huge / last.free, 1),
                round(100 * last.free_giant / last.free, 1),
            ]
        )
    columns = [
        "file system",
        "large files, MiB",
        "huge at the end, %",
        "at the worst, %",
        "by 1 GiB, MiB",
        "free, MiB",
        "free in 2 MiB, %",
        "free in 1 GiB, %",
    ]
    result.grids.append(Grid(f"After {turnovers} turnovers", columns, rows))
    worst = min(sample.share for _, sample in found["vfsmap"])
    result.promise("bytes of files of 2 MiB and more that are huge, at the worst", worst, GOAL)
    result.plots += [
        _plot("files", "Bytes of large files that 2 MiB entries can map", found, _share),
        _plot("free", "Free bytes in whole units of 2 MiB", found, _free_share),
        _plot("free-1G", "Free bytes in whole units of 1 GiB", found, _giant_share),
    ]
    return result


def _share(sample: Coverage) -> float:
    return sample.share


def _free_share(sample: Coverage) -> float:
    return sample.free_huge / max(sample.free, 1)


def _giant_share(sample: Coverage) -> float:
    return sample.free_giant / max(sample.free, 1)


def _plot(
    name: str,
    title: str,
    found: dict[str, list[tuple[float, Coverage]]],
    share: Callable[[Coverage], float],
) -> Plot:
    curves = [
        Curve(
            label,
            [round(age, 3) for age, _ in samples],
            [round(100 * share(sample), 2) for _, sample in samples],
        )
        for label, samples in found.items()
    ]
    return Plot(name, title, "turnovers", "%", curves)
