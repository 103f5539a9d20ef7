"""What the number of files costs: opening a pool, memory, making, listing and asking about them.

It needs some 4 GiB in /dev/shm for a million files.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Final

from vfsmap.fs import FileSystem
from vfsmap.pool import Pool
from vfsmap.units import GIB, KIB
from vfsmap_tools.bench.results import Curve, Grid, Plot, Result

COUNTS: Final = (1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)
_QUICK_COUNTS: Final = 5
_LIMITS: Final = {100_000: 1.0, 1_000_000: 8.0}
"""Seconds in which a pool of so many files is promised to open."""
_MEMORY_LIMIT: Final = 1.2 * KIB
"""Bytes of memory that a file is promised to cost at most."""
_FILES_A_DIRECTORY: Final = 1000
_OPENINGS: Final = 3

_OPEN = """
import json, resource, sys, time
from vfsmap.fs import FileSystem
from vfsmap.pool import Pool

def memory():
    fields = open("/proc/self/statm").read().split()
    return (int(fields[1]) - int(fields[2])) * resource.getpagesize()

before, began = memory(), time.perf_counter()
fs = FileSystem(Pool.open(sys.argv[1]))
seconds = time.perf_counter() - began
print(json.dumps({"seconds": seconds, "memory": memory() - before}))
"""


def fill(path: Path, count: int) -> None:
    """Make a pool of so many small files, a thousand to a directory."""
    size = max(count * 5 * KIB, GIB // 16) + GIB // 4
    with FileSystem.format(Pool.create(path, size - size % (4 * KIB))) as fs:
        for number in range(count):
            if number % _FILES_A_DIRECTORY == 0:
                directory = fs.mkdir(1, b"directory-%d" % number, 0o755, 0, 0).ino
            file = fs.create(directory, b"file-number-%07d" % number, 0o644, 0, 0)
            fs.write(file.ino, 0, b"a small file\n")


def opened(path: Path) -> dict[str, float]:
    """Open a pool in a new process; return seconds, and bytes of memory that it took."""
    result = subprocess.run([sys.executable, "-c", _OPEN, path], capture_output=True, check=True)
    answer: dict[str, float] = json.loads(result.stdout)
    return answer


def directory_costs(count: int) -> tuple[float, float]:
    """Return microseconds an entry for listing a directory, and for asking about each name."""
    with (
        TemporaryDirectory(dir="/dev/shm") as place,
        FileSystem.format(Pool.create(Path(place) / "pool", GIB)) as fs,
    ):
        for number in range(count):
            fs.create(1, b"file-number-%07d" % number, 0o644, 0, 0)
        began = time.perf_counter()
        entries = fs.entries(1)
        listed = time.perf_counter()
        for _, name, _ in entries:
            fs.lookup(1, name)
        asked = time.perf_counter()
    return (listed - began) / count * 1e6, (asked - listed) / count * 1e6


def run(quick: bool) -> Result:
    """Measure how costs grow with the number of files."""
    result = Result(
        "counts",
        "Cost against the number of files",
        "Pools of small files, a thousand to a directory, opened in a process of its own; and one "
        "directory of so many files, listed, each name asked for. The library alone, no mount.",
    )
    rows: list[list[str | int | float]] = []
    for count in COUNTS[: _QUICK_COUNTS if quick else None]:
        with TemporaryDirectory(dir="/dev/shm") as place:
            pool = Path(place) / "pool"
            began = time.perf_counter()
            fill(pool, count)
            made = (time.perf_counter() - began) / count * 1e6
            costs = [opened(pool) for _ in range(_OPENINGS)]
        directory = directory_costs(count)
        seconds = median(cost["seconds"] for cost in costs)
        memory = median(cost["memory"] for cost in costs) / count
        rows.append([count, seconds, round(memory), made, *directory])
        if count in _LIMITS:
            what = f"opening {count:,} files: seconds"
            result.promise(what, seconds, _LIMITS[count], at_most=True)
            what = f"opening {count:,} files: bytes of memory a file"
            result.promise(what, memory, _MEMORY_LIMIT, at_most=True)
    columns = [
        "files",
        "open, s",
        "memory a file, bytes",
        "create and write, us",
        "list, us an entry",
        "look up, us",
    ]
    result.grids.append(Grid("", columns, rows))
    counts = [float(row[0]) for row in rows]

    def curve(label: str, at: int) -> Curve:
        return Curve(label, counts, [float(row[at]) for row in rows])

    opening = [curve("opening a pool", 1)]
    single = [
        curve("create and write", 3),
        curve("list, an entry", 4),
        curve("look up", 5),
    ]
    result.plots += [
        Plot("opening", "Opening a pool", "files", "seconds", opening, log_x=True, log_y=True),
        Plot("single", "One file", "files", "microseconds", single, log_x=True, log_y=True),
    ]
    return result
