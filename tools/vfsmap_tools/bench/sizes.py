"""What the size of a file costs: mapping it, mapping and touching all of it, 1 MiB to 8 GiB."""

import mmap
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Final

import vfsmap
from vfsmap.units import GIB, MIB, PTE, format_size
from vfsmap_tools.bench import places
from vfsmap_tools.bench.results import Curve, Grid, Plot, Result

SIZES: Final = tuple(MIB << n for n in range(14))
_QUICK: Final = 256 * MIB
_PEERS_MOST: Final = 2 * GIB
"""What the peers are measured up to: each needs the memory once more, or twice."""
_MAP: Final = "vfsmap.map()"
_PASS: Final = "window, first pass"
Touch = Callable[[int], float]


def _pass(view: memoryview) -> None:
    view[:: PTE.size].tobytes()


class _Costs:
    """The milliseconds of each way for a size."""

    def __init__(self, path: Path, plain: Path) -> None:
        self._path = path
        self._plain = plain

    def map(self, size: int) -> float:
        began = time.perf_counter()
        with vfsmap.map(self._path, length=size):
            return _since(began)

    def touched(self, size: int) -> float:
        began = time.perf_counter()
        with vfsmap.map(self._path, length=size) as window, window.view() as view:
            _pass(view)
            return _since(began)

    def through(self, size: int) -> float:
        return _mapped(self._path, size)

    def cold(self, size: int) -> float:
        fd = os.open(self._path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
        return _mapped(self._path, size)

    def plain(self, size: int) -> float:
        return _mapped(self._plain, size)


def _since(began: float) -> float:
    return (time.perf_counter() - began) * 1e3


def _mapped(path: Path, size: int) -> float:
    with path.open("rb") as file:
        began = time.perf_counter()
        with (
            mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as mapped,
            memoryview(mapped) as view,
        ):
            _pass(view)
            return _since(began)


def _available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0


def run(quick: bool) -> Result:
    """Measure how costs grow with the size of a file."""
    result = Result(
        "sizes",
        "Cost against the size of a file",
        "One file of a pool on tmpfs: a prefix is mapped, and touched once in each 4 KiB. Beside "
        "it mmap of the same file through the mount, cold and with all of it in the page cache, "
        "and mmap of a file of a tmpfs of small pages.",
    )
    most = _most(quick, result)
    found = _measured(most, 3 if quick else 5)
    rows: list[list[str | int | float]] = [
        [format_size(int(size)), *(_at(curve, at) for curve in found)]
        for at, size in enumerate(found[0].x)
    ]
    result.grids.append(Grid("Milliseconds", ["size", *(curve.label for curve in found)], rows))
    result.plots.append(
        Plot(
            "time",
            "Mapping a file and touching all of it",
            "size",
            "milliseconds",
            found,
            log_x=True,
            log_y=True,
            bytes_x=True,
        )
    )
    return result


def _most(quick: bool, result: Result) -> int:
    """Return the largest size that there is memory for; say so when it is not the last."""
    most = _QUICK if quick else SIZES[-1]
    while most + 2 * min(most, _PEERS_MOST) > _available() * 0.8:
        result.left_out.append(f"{format_size(most)}: there is not enough memory")
        most //= 2
    return most


def _measured(most: int, rounds: int) -> list[Curve]:
    """Return the milliseconds of each way for each size, that of vfsmap.map() first."""
    peers_most = min(most, _PEERS_MOST)
    with ExitStack() as stack:
        medium = stack.enter_context(places.tmpfs(f"{most // MIB + 1024}M"))
        small = stack.enter_context(places.tmpfs(f"{peers_most // MIB + 64}M", "never"))
        mount = stack.enter_context(places.pool(medium, f"{most // MIB + 512}M"))
        path, plain = mount / "file", small / "plain"
        path.touch()
        os.truncate(path, most)
        with vfsmap.map(path, writable=True, populate=True):
            pass  # so that all of it is there
        with plain.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, peers_most)
        costs = _Costs(path, plain)
        ways: dict[str, tuple[Touch, int]] = {
            _MAP: (costs.map, most),
            _PASS: (costs.touched, most),
            "mmap of small pages, first pass": (costs.plain, peers_most),
            "mmap through the mount, cold": (costs.cold, peers_most),
            "mmap through the mount, cached": (costs.through, peers_most),
        }
        found: dict[str, Curve] = {name: Curve(name, [], []) for name in ways}
        for size in (size for size in SIZES if size <= most):
            spent: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(rounds):
                for name, (cost, limit) in ways.items():
                    if size <= limit:
                        spent[name].append(cost(size))
            for name, values in spent.items():
                if values:
                    found[name].x.append(float(size))
                    found[name].y.append(round(median(values), 4))
    return list(found.values())


def _at(curve: Curve, at: int) -> str | float:
    return curve.y[at] if at < len(curve.y) else ""
