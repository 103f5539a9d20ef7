"""Metrics for Prometheus: what a server has counted, as it is when it is asked.

A thread answers one client after the other, so that no number of them, and none that is slow, takes
descriptors or threads from the server; the loop is asked for a sample only when one is wanted.
"""

import logging
import socket
import socketserver
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import accumulate
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import trio

import vfsmap
from vfsmap.daemon.stats import Statistics
from vfsmap.errors import Busy, Invalid, Unsupported
from vfsmap.pool import Pool

try:
    from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        InfoMetricFamily,
        Metric,
    )
    from prometheus_client.registry import Collector
except ImportError as exc:
    raise Unsupported(
        "--metrics needs prometheus_client; install it: pip install 'vfsmap[metrics]'"
    ) from exc

log = logging.getLogger("vfsmap.metrics")
LOOPBACK: Final = "127.0.0.1"
_CLIENT_PATIENCE: Final = 5
"""Seconds that a client may take for each piece of its request."""
_SHORTEST: Final = 10
"""Durations of less than 2**10 ns, about 1 us, are counted as one."""
_LONGEST: Final = 34
"""And so are those of more than 2**34 ns, about 17 s."""
_NS: Final = 1e9


def parse_address(text: str) -> tuple[str, int]:
    """Return the host and the port of ``PORT``, ``HOST:PORT`` or ``[HOST]:PORT``.

    Raises:
        Invalid: it is none of them.
    """
    host, colon, port = text.rpartition(":")
    host = host.strip("[]") or LOOPBACK
    bare_colon = colon and not text.startswith("[") and ":" in host
    if bare_colon or not port.isdecimal() or int(port) > 0xFFFF:
        raise Invalid(f"--metrics {text}: PORT, HOST:PORT or [HOST]:PORT is expected")
    return host, int(port)


class Samples(Collector):
    """Makes metrics of a sample of the server's counters."""

    def __init__(self, pool: Pool, sample: Callable[[], dict[str, Any]]) -> None:
        self._pool = pool
        self._sample = sample

    def describe(self) -> list[Metric]:
        """Tell nothing beforehand: a sample would be needed."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Return the metrics of a new sample."""
        sample = self._sample()
        pool = self._pool
        facts = {
            "version": vfsmap.__version__,
            "pool": str(pool.path),
            "uuid": str(pool.uuid),
            "label": pool.label,
            "medium": pool.pmem.medium.name,
            "promise": pool.promise.value,
        }
        yield InfoMetricFamily("vfsmap", "What is served.", facts)
        yield _gauge("start_time_seconds", "When counting began.", sample["started_ns"] / _NS)
        yield _gauge("pool_writable", "0 after a failure, too.", float(pool.writable))
        yield _gauge("pool_size_bytes", "Size of the pool.", sample["size"])
        yield _gauge("pool_free_bytes", "Bytes of no file and not of the log.", sample["free"])
        yield _gauge("inodes", "Files and directories.", sample["inodes"])
        writable = sample["writable_leases"]
        leases = {"read": sample["leases"] - writable, "write": writable}
        yield _gauges("leases", "Leases that are held.", "rights", leases)
        events = CounterMetricFamily("vfsmap_events", "What has happened.", labels=["kind"])
        for kind, count in sample["events"].items():
            events.add_metric([kind], count)
        yield events
        yield from _tallies("request", "operation", "Requests of the kernel", sample["requests"])
        yield from _tallies("call", "method", "Calls of the daemon's methods", sample["calls"])
        if coverage := sample.get("coverage"):
            yield from _coverage(coverage)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"vfsmap_{name}", text, value)


def _gauges(name: str, text: str, label: str, values: dict[str, float]) -> Metric:
    family = GaugeMetricFamily(f"vfsmap_{name}", text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _tallies(name: str, label: str, what: str, tallies: list[dict[str, Any]]) -> Iterator[Metric]:
    durations = HistogramMetricFamily(
        f"vfsmap_{name}_duration_seconds", f"{what}: how long they took.", labels=[label]
    )
    errors = CounterMetricFamily(
        f"vfsmap_{name}_errors", f"{what} that were answered with an error.", labels=[label]
    )
    moved = CounterMetricFamily(
        f"vfsmap_{name}_bytes", f"{what}: bytes read or written.", labels=[label]
    )
    for tally in tallies:
        labels = [tally["name"]]
        durations.add_metric(labels, _buckets(tally["latency"]), tally["time_ns"] / _NS)
        errors.add_metric(labels, tally["errors"])
        moved.add_metric(labels, tally["bytes"])
    yield from (durations, errors, moved)


def _buckets(latency: list[int]) -> list[tuple[str, float]]:
    """Return how many took at most so many seconds, for a row of bounds that is always the same."""
    below = [*accumulate(latency)] or [0]
    buckets = [
        (repr((1 << n) / _NS), float(below[min(n, len(below) - 1)]))
        for n in range(_SHORTEST, _LONGEST + 1, 2)
    ]
    return [*buckets, ("+Inf", float(below[-1]))]


def _coverage(coverage: dict[str, int]) -> Iterator[Metric]:
    large, huge = coverage["large"], coverage["huge"]
    yield _gauge("coverage_time_seconds", "When files were counted.", coverage["time_ns"] / _NS)
    yield _gauge("file_bytes", "Bytes of files that have a place.", coverage["files"])
    yield _gauge("large_file_bytes", "Those of files of 2 MiB and more.", large)
    yield _gauges(
        "large_file_huge_bytes",
        "Of these, what entries of a level can map.",
        "level",
        {"2M": huge, "1G": coverage["giant"]},
    )
    yield _gauge("large_file_huge_ratio", "The 2 MiB part; 1: all.", huge / large if large else 1.0)
    yield _gauges(
        "free_unit_bytes",
        "Free bytes in whole units of a level.",
        "level",
        {"2M": coverage["free_huge"], "1G": coverage["free_giant"]},
    )


class _Server(WSGIServer):
    """Answers one client after the other."""

    def __init__(self, family: int, address: tuple[str, int]) -> None:
        self.address_family = family
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """Bind, without asking the network for our name."""
        socketserver.TCPServer.server_bind(self)
        # a server of http has these
        self.server_name, self.server_port = map(str, self.server_address[:2])  # type: ignore[assignment]
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Note that a client went away, or was too slow."""
        log.debug("a client was not answered", exc_info=True)


class _Handler(WSGIRequestHandler):
    timeout = _CLIENT_PATIENCE

    # the base class's name
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        log.debug(format, *args)


@asynccontextmanager
async def exporting(address: str, pool: Pool, statistics: Statistics) -> AsyncIterator[str]:
    """Answer Prometheus for as long as the block lasts; yields the URL.

    Raises:
        Invalid: the address is none.
        Busy: it can't be had.
    """
    host, port = parse_address(address)
    token = trio.lowlevel.current_trio_token()

    async def sample() -> dict[str, Any]:
        await statistics.count()
        return statistics.sample()

    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(Samples(pool, lambda: trio.from_thread.run(sample, trio_token=token)))
    try:
        family, _, _, _, where = await trio.to_thread.run_sync(_resolve, host, port)
        server = _Server(family, where[:2])
    except OSError as exc:
        raise Busy(
            f"can't serve metrics on {host} port {port}: {exc.strerror}; "
            f"name another address with --metrics"
        ) from exc
    with server:
        server.set_app(make_wsgi_app(registry))
        threading.Thread(target=server.serve_forever, daemon=True, name="metrics").start()
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{server.server_address[1]}/metrics"
        log.info("answering Prometheus at %s", url)
        try:
            yield url
        finally:
            # in a thread: a client that is being answered waits for this loop
            with trio.move_on_after(_CLIENT_PATIENCE, shield=True):
                await trio.to_thread.run_sync(server.shutdown, abandon_on_cancel=True)


def _resolve(host: str, port: int) -> Any:
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
