"""Memory of many processes that load the same modules: shared text beside a copy for each.

Each process puts the text and the read-only data of four modules, bound to user space, at their
addresses.  What a process has to answer for is the kernel's word (Pss: each page divided by the
number of those who map it; the mount's server maps the pool, too).
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final, NamedTuple

import vfsmap
from vfsmap.kmod.host import Host
from vfsmap.kmod.module import Module, find_modules
from vfsmap.kmod.pack import RODATA, TEXT
from vfsmap.kmod.runner import Runner
from vfsmap.kmod.store import Store
from vfsmap.kmod.userspace import user_host
from vfsmap.units import KIB, align_up
from vfsmap_tools.bench import places
from vfsmap_tools.bench.results import Curve, Grid, Plot, Result

NAMES: Final = ("crc7", "reed_solomon", "lz4_compress", "xfs")
_MODULES: Final = Path(".cache/debian/612")
_COUNTS: Final = (1, 2, 5, 10)


class Share(NamedTuple):
    """What a number of processes answer for, bytes."""

    processes: int
    in_place: int
    """Pss of the mapped text and read-only data, all processes together."""
    anonymous: int
    """What of those ranges is private to a process."""
    copied: int
    """What as many copies of the same text and read-only data take."""


def memory_of(pid: int, addresses: set[int]) -> dict[str, int]:
    """Return what the kernel says about a process's mappings that start at some addresses."""
    found: dict[str, int] = {}
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-[0-9a-f]+ ", line):
            inside = int(match[1], 16) in addresses
        elif inside and (match := re.fullmatch(r"(\w+): +(\d+) kB", line)):
            found[match[1]] = found.get(match[1], 0) + int(match[2]) * KIB
    return found


def measure(directory: Path, modules: Path) -> Iterator[Share]:
    """Load in more and more processes; yield what they take each time."""
    paths = {p.name.partition(".")[0].replace("-", "_"): p for p in find_modules(modules)}
    store = Store(directory / "store")
    variants = store.add([Module.open(paths[name]) for name in NAMES], Host(user_host()))
    files = store.index.packs[variants[0].pack].files
    addresses = {files[name].address for name in (TEXT, RODATA)}
    once = sum(align_up(v.sizes[area], 4 * KIB) for v in variants for area in (TEXT, RODATA))
    with ExitStack() as stack:
        runners: list[Runner] = []
        for count in _COUNTS:
            while len(runners) < count:
                runners.append(Runner(store.directory, NAMES, vfsmap.map))
                stack.callback(runners[-1].close)
            found = [memory_of(runner.pid, addresses) for runner in runners]
            yield Share(
                count,
                sum(each["Pss"] for each in found),
                sum(each["Anonymous"] for each in found),
                count * once,
            )


def run(quick: bool) -> Result:
    """Measure the memory of one to ten processes; there is no quicker way."""
    result = Result(
        "kmod_memory",
        "Memory of processes that load the same modules",
        "Text and read-only data of four modules of Linux 6.12, mapped in place from a pool on "
        "tmpfs: what the processes and nobody else answer for (Pss), beside a copy for each.",
    )
    if not _MODULES.is_dir():
        result.left_out.append(f"everything: {_MODULES} is not there; `make test` fetches it")
        return result
    with places.tmpfs("300M") as medium, places.pool(medium, "256M") as mount:
        shares = list(measure(mount, _MODULES))
    columns = ["processes", "mapped in place, KiB", "of it private, KiB", "copied, KiB"]
    rows: list[list[str | int | float]] = [[s[0], *(size // KIB for size in s[1:])] for s in shares]
    result.grids.append(Grid("All processes together", columns, rows))
    curves = [
        Curve(
            "mapped in place", [s.processes for s in shares], [s.in_place // KIB for s in shares]
        ),
        Curve("copied", [s.processes for s in shares], [s.copied // KIB for s in shares]),
    ]
    title = "Memory for text and read-only data of four modules"
    result.plots.append(Plot("processes", title, "processes", "KiB", curves))
    private = max(s.anonymous for s in shares)
    result.promise("bytes of text private to a process", private, 0, at_most=True)
    growth = shares[-1].in_place / shares[0].in_place
    result.promise("ten processes: times the memory of one", growth, 2, at_most=True)
    return result
