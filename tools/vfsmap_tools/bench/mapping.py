"""What a mapping costs: asking for it, copying out of it, beside their plain counterparts."""

import mmap
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import vfsmap
from vfsmap.pmem import libc, pages
from vfsmap.units import MIB, PMD, PTE, format_size
from vfsmap_tools.bench import places
from vfsmap_tools.bench.results import Grid, Plot, Rates, Result
from vfsmap_tools.bench.runner import Measure, alternate, distribution, quantiles, timed

_SIZE: Final = 64 * MIB
_RATE: Final = "calls/s"
MAP_LIMIT: Final = 3.0
"""A warm map() takes at most so many round trips that pass a descriptor."""
COPY_LIMIT: Final = 0.97
"""Copying out of a window is at least so fast as out of a plain mmap of the same medium."""


@contextmanager
def echo() -> Iterator[Callable[[], None]]:
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


class _Peers:
    """What is called, and what is copied out of."""

    def __init__(self, path: Path, exchange: Callable[[], None], count: int) -> None:
        self._path = path
        self._exchange = exchange
        self._count = count
        self._windows: list[vfsmap.Window] = []

    def _map(self) -> None:
        self._windows.append(vfsmap.map(self._path))

    def _close(self) -> None:
        while self._windows:
            self._windows.pop().close()

    def rate(self, name: str) -> float:
        """Return how often a second a mapping is made, or a descriptor passed."""
        action = self._map if name == "vfsmap.map()" else self._exchange
        began = time.perf_counter()
        for _ in range(self._count):
            action()
        spent = time.perf_counter() - began
        self._close()
        return self._count / spent

    def samples(self, name: str) -> list[float]:
        """Return the microseconds of single calls."""
        found = timed(self._map if name == "vfsmap.map()" else self._exchange, 10 * self._count)
        self._close()
        return found


def run(quick: bool) -> Result:
    """Measure map() and copying out of a window."""
    result = Result(
        "mapping",
        "Asking for a mapping, and using it",
        f"vfsmap.map() of a file of {format_size(_SIZE)} on a warm connection beside a bare round "
        "trip that passes a descriptor; copying out of the window beside copying out of a plain "
        "mmap of the same tmpfs and of an mmap through the mount.",
    )
    with ExitStack() as stack:
        medium = stack.enter_context(places.tmpfs("1G"))
        mount = stack.enter_context(places.pool(medium, "256M"))
        exchange = stack.enter_context(echo())
        path, plain = mount / "file", medium / "plain"
        for target in (path, plain):
            target.write_bytes(os.urandom(MIB) * (_SIZE // MIB))
        stack.enter_context(vfsmap.map(path))  # keeps the connection warm
        rounds, count = (5, 100) if quick else (15, 300)
        peers = _Peers(path, exchange, count)
        names = ["vfsmap.map()", "socket round trip"]
        asking = [Measure("asking", _RATE, peers.rate)]
        result.rates += alternate(asking, {name: name for name in names}, rounds)
        trips = 1 / result.rates[0].ratio("socket round trip")
        samples = {name: peers.samples(name) for name in names}
        result.rates += _copying(path, plain, result, rounds)
        share = result.rates[1].ratio("plain mmap")
        result.promise("map(): in round trips", trips, MAP_LIMIT, at_most=True)
        result.promise("copying: window's share of plain mmap's speed", share, COPY_LIMIT)
    curves = [distribution(name, found) for name, found in samples.items()]
    title = "map() and a bare round trip: share of calls that were faster"
    result.plots.append(Plot("latency", title, "microseconds", "%", curves, log_x=True))
    columns = ["call", "median", "90 %", "99 %", "99.9 %"]
    rows: list[list[str | int | float]] = [[n, *quantiles(s)] for n, s in samples.items()]
    result.grids.append(Grid("Latency, microseconds", columns, rows))
    return result


def _copying(path: Path, plain: Path, result: Result, rounds: int) -> list[Rates]:
    buffer = bytearray(_SIZE)

    def speed(source: memoryview) -> float:
        began = time.perf_counter()
        for _ in range(3):
            buffer[:] = source
        return 3 * _SIZE / MIB / (time.perf_counter() - began)

    with ExitStack() as stack:
        window = stack.enter_context(vfsmap.map(path, populate=True))
        maps = {"window": window.view()}
        for name, target in (("plain mmap", plain), ("mmap through the mount", path)):
            file = stack.enter_context(target.open("rb"))
            maps[name] = memoryview(
                stack.enter_context(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
            )
        for view in maps.values():
            stack.enter_context(view)
        rates = alternate([Measure("copying", "MiB/s", speed)], maps, rounds)
        rows: list[list[str | int | float]] = []
        for name, view in maps.items():
            sizes = _page_sizes(view)
            rows.append([name, sizes.get(PMD.size, 0) // MIB, sizes.get(PTE.size, 0) // MIB])
        result.grids.append(
            Grid("How the kernel maps it, MiB", ["mapping", "by 2 MiB", "by 4 KiB"], rows)
        )
    return rates


def _page_sizes(view: memoryview) -> dict[int, int]:
    return pages.page_sizes(libc.address_of(view), len(view))
