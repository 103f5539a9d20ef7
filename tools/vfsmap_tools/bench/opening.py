"""Opening a pool of many files, and its memory; listing and asking about a large directory.

Run it as ``python -m vfsmap_tools.bench.opening``; it needs some 2 GiB in /dev/shm for a million
files, a tenth with ``--quick``.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import click

from vfsmap.fs import FileSystem
from vfsmap.pool import Pool
from vfsmap.units import GIB, KIB

COUNTS: Final = (1_000, 10_000, 100_000, 1_000_000)
_LIMITS: Final = {100_000: 1.0, 1_000_000: 8.0}
"""Seconds in which a pool of so many files is promised to open."""
_MEMORY_LIMIT: Final = 1.2 * KIB
"""Bytes of memory that a file is promised to cost at most."""
_FILES_A_DIRECTORY: Final = 1000

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


def directory_costs(count: int) -> dict[str, float]:
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
    return {"readdir_us": (listed - began) / count * 1e6, "stat_us": (asked - listed) / count * 1e6}


def run(quick: bool) -> dict[str, Any]:
    """Return what was measured, by the number of files."""
    found: dict[str, Any] = {"opening": {}, "directory": {}}
    for count in COUNTS[: -1 if quick else None]:
        with TemporaryDirectory(dir="/dev/shm") as place:
            pool = Path(place) / "pool"
            fill(pool, count)
            cost = opened(pool)
        found["opening"][count] = {
            "seconds": round(cost["seconds"], 3),
            "us_per_file": round(cost["seconds"] / count * 1e6, 2),
            "bytes_per_file": round(cost["memory"] / count),
        }
    for count in COUNTS[1:3]:
        found["directory"][count] = {k: round(v, 2) for k, v in directory_costs(count).items()}
    return found


def met(found: dict[str, Any]) -> bool:
    """Tell whether the promises are kept."""
    return all(
        found["opening"][count]["seconds"] <= limit
        and found["opening"][count]["bytes_per_file"] <= _MEMORY_LIMIT
        for count, limit in _LIMITS.items()
        if count in found["opening"]
    )


@click.command()
@click.option("--quick", is_flag=True, help="Up to 100,000 files only.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(quick: bool, as_json: bool) -> None:
    """Measure how opening, memory and directories grow with the number of files."""
    found = run(quick)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        for what, rows in found.items():
            for count, row in rows.items():
                facts = ", ".join(
                    f"{name.replace('_', ' ')} {value}" for name, value in row.items()
                )
                print(f"{what:10} {count:>9,} files: {facts}")
    sys.exit(not met(found))


if __name__ == "__main__":
    main()
