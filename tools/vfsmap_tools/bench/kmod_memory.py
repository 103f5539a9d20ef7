"""Memory of many processes that load the same modules: shared text beside a copy for each.

Each process puts the text and the read-only data of four modules, bound to user space, at their
addresses.  What a process has to answer for is the kernel's word (Pss: each page divided by the
number of those who map it; the mount's server maps the pool, too).  It needs root, and a kernel
package that the tests have fetched: ``python -m vfsmap_tools.bench.kmod_memory``.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple

import click

import vfsmap
from vfsmap.kmod.host import Host
from vfsmap.kmod.module import Module, find_modules
from vfsmap.kmod.pack import RODATA, TEXT
from vfsmap.kmod.runner import Runner
from vfsmap.kmod.store import Store
from vfsmap.kmod.userspace import user_host
from vfsmap.units import KIB, align_up
from vfsmap_tools.console import print_json, print_table

NAMES: Final = ("crc7", "reed_solomon", "lz4_compress", "xfs")
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


def _run(*arguments: object) -> None:
    command = [sys.executable, "-m", "vfsmap_tools.cli", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


@contextmanager
def _mounted() -> Iterator[Path]:
    """Yield a directory of a mounted pool, on a tmpfs in huge pages."""
    with ExitStack() as stack:
        place = Path(stack.enter_context(TemporaryDirectory(prefix="vfsmap-bench-")))
        medium, mountpoint = place / "medium", place / "mnt"
        medium.mkdir()
        mountpoint.mkdir()
        options = "size=300M,huge=always"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "bench", medium], check=True)
        stack.callback(lambda: subprocess.run(["umount", medium], check=True))
        _run("format", medium / "pool", "--size", "256M")
        _run("mount", medium / "pool", mountpoint)
        stack.callback(_run, "umount", mountpoint)
        yield mountpoint


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


@click.command()
@click.option("--modules", type=Path, default=Path(".cache/debian/612"), help="A kernel package.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(modules: Path, as_json: bool) -> None:
    """Measure; exit with 1 when another process takes more memory for text."""
    if not modules.is_dir():
        sys.exit(f"{modules} is not there; run the tests once, they fetch it")
    with _mounted() as directory:
        shares = list(measure(directory, modules))
    if as_json:
        print_json([share._asdict() for share in shares])
    else:
        columns = ("processes", "mapped in place, KiB", "of it private, KiB", "copied, KiB")
        print_table(columns, [[s.processes, *(size // KIB for size in s[1:])] for s in shares])
    if any(s.anonymous for s in shares) or shares[-1].in_place > 2 * shares[0].in_place:
        sys.exit(1)


if __name__ == "__main__":
    main()
