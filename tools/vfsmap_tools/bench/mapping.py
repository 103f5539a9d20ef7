"""What a mapping costs: asking for it, and copying out of it, beside their plain counterparts.

Run it as ``python -m vfsmap_tools.bench.mapping``; it needs root, for a tmpfs.
"""

import json
import mmap
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Final

import click

import vfsmap
from vfsmap.units import MIB

_SIZE: Final = 64 * MIB
MAP_LIMIT: Final = 3.0
"""A warm map() takes at most so many round trips that pass a descriptor."""
COPY_LIMIT: Final = 0.97
"""Copying out of a window is at least so fast as out of a plain mmap of the same medium."""


def _run(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "vfsmap_tools.cli", *map(str, arguments)], check=True)


@contextmanager
def _mounted() -> Iterator[tuple[Path, Path]]:
    """Yield a directory of a mounted pool, and the tmpfs that the pool is on."""
    with ExitStack() as stack:
        place = Path(stack.enter_context(TemporaryDirectory(prefix="vfsmap-bench-")))
        medium, mountpoint = place / "medium", place / "mnt"
        medium.mkdir()
        mountpoint.mkdir()
        options = "size=512M,huge=always"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "bench", medium], check=True)
        stack.callback(lambda: subprocess.run(["umount", medium], check=True))
        _run("format", medium / "pool", "--size", "256M")
        _run("mount", medium / "pool", mountpoint)
        stack.callback(_run, "umount", mountpoint)
        yield mountpoint, medium


@contextmanager
def _echo() -> Iterator[Callable[[], None]]:
    """Yield a function that has another process pass a descriptor back over a bare socket."""
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        ours.close()
        while True:
            data, fds, _, _ = socket.recv_fds(theirs, 4096, 1)
            if not data:
                os._exit(0)
            socket.send_fds(theirs, [data], fds)
            for fd in fds:
                os.close(fd)
    theirs.close()
    message = b"x" * 200

    def exchange() -> None:
        socket.send_fds(ours, [message], [ours.fileno()])
        _, fds, _, _ = socket.recv_fds(ours, 4096, 1)
        for fd in fds:
            os.close(fd)

    try:
        yield exchange
    finally:
        ours.close()
        os.waitpid(child, 0)


def _microseconds(action: Callable[[], object], count: int) -> float:
    began = time.perf_counter()
    for _ in range(count):
        action()
    return (time.perf_counter() - began) / count * 1e6


def run(quick: bool) -> dict[str, Any]:
    """Return medians of alternating rounds."""
    rounds, count = (5, 100) if quick else (15, 300)
    with _mounted() as (mountpoint, medium), _echo() as exchange:
        path, plain = mountpoint / "file", medium / "plain"
        for target in (path, plain):
            target.write_bytes(os.urandom(MIB) * (_SIZE // MIB))
        windows: list[vfsmap.Window] = []
        costs: dict[str, list[float]] = {"round trip": [], "map": [], "window": [], "mmap": []}
        buffer = bytearray(_SIZE)
        with (
            vfsmap.map(path, populate=True) as window,
            plain.open("rb") as file,
            mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped,
        ):
            view, other = window.view(), memoryview(mapped)
            for _ in range(rounds):
                costs["round trip"].append(_microseconds(exchange, count))
                costs["map"].append(_microseconds(lambda: windows.append(vfsmap.map(path)), count))
                while windows:
                    windows.pop().close()
                for name, source in (("window", view), ("mmap", other)):
                    costs[name].append(_microseconds(lambda s=source: _copy(buffer, s), 3))  # type: ignore[misc]
            view.release()
            other.release()
    medians = {name: median(values) for name, values in costs.items()}
    return {
        "microseconds": {name: round(value, 1) for name, value in medians.items()},
        "map in round trips": round(medians["map"] / medians["round trip"], 2),
        "window's share of mmap's speed": round(medians["mmap"] / medians["window"], 3),
    }


def _copy(buffer: bytearray, source: memoryview) -> None:
    buffer[:] = source


@click.command()
@click.option("--quick", is_flag=True, help="Fewer rounds.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(quick: bool, as_json: bool) -> None:
    """Measure map() and copying out of a window."""
    found = run(quick)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        for name, value in found.items():
            print(f"{name}: {value}")
    met = (
        found["map in round trips"] <= MAP_LIMIT
        and found["window's share of mmap's speed"] >= COPY_LIMIT
    )
    sys.exit(not met)


if __name__ == "__main__":
    main()
