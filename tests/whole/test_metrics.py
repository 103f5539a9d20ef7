"""Metrics as Prometheus gets them from a real mount."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

import vfsmap as library
from vfsmap.daemon.client import connect
from vfsmap.errors import Invalid
from vfsmap.testing.commands import Server, served_pool, vfsmap
from vfsmap.testing.media import tmpfs
from vfsmap.units import MIB
from vfsmap_tools.metrics import parse_address

COUNT = "vfsmap_request_duration_seconds_count"
Found = dict[tuple[str, frozenset[str]], float]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with (
        tmpfs(huge="always", size="300M") as place,
        served_pool(place, "128M", "--metrics", "0") as served,
    ):
        yield served


def url(log: Path) -> str:
    found = re.findall(r"Prometheus at (\S+)", log.read_text())
    assert found
    return str(found[-1])


def scrape(log: Path) -> Found:
    """Return values by name and labels' values."""
    with urlopen(url(log)) as answer:
        text = answer.read().decode()
    return {
        (sample.name, frozenset(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(found: Found, name: str, *labels: str) -> float:
    return found[f"vfsmap_{name}", frozenset(labels)]


def test_requests_are_counted_with_their_durations_errors_and_bytes(server: Server) -> None:
    before = scrape(server.log).get((COUNT, frozenset({"create"})), 0)
    (server.directory / "file").write_bytes(bytes(300_000))
    for _ in range(3):
        with pytest.raises(FileExistsError):
            (server.directory / "file").mkdir()
    found = scrape(server.log)
    assert found[COUNT, frozenset({"create"})] == before + 1
    assert value(found, "request_bytes_total", "write") >= 300_000
    assert value(found, "request_duration_seconds_sum", "write") > 0
    buckets = [
        number
        for (name, labels), number in found.items()
        if name == "vfsmap_request_duration_seconds_bucket" and "write" in labels
    ]
    assert len(buckets) == 14
    assert sorted(buckets) == buckets
    assert buckets[-1] == found[COUNT, frozenset({"write"})]


def test_the_numbers_are_those_that_the_daemon_tells(server: Server) -> None:
    stats, _ = connect(server.directory).call("Stats")
    found = scrape(server.log)
    assert value(found, "pool_size_bytes") == stats["size"] == 128 * MIB
    assert value(found, "pool_free_bytes") == stats["free"]
    assert value(found, "inodes") == stats["inodes"]
    assert value(found, "pool_writable") == 1
    for tally in stats["calls"]:
        if tally["name"] != "Stats":
            assert value(found, "call_duration_seconds_count", tally["name"]) == tally["count"]
    info = next(labels for name, labels in found if name == "vfsmap_info")
    assert {str(server.pool), "tmpfs", library.__version__} <= info


def test_leases_events_and_huge_pages_are_told(server: Server) -> None:
    path = server.directory / "large"
    path.write_bytes(bytes(8 * MIB))
    granted = value(scrape(server.log), "events_total", "granted")
    written = time.time()
    with library.map(path), library.map(path, writable=True):
        found = scrape(server.log)
        while value(found, "coverage_time_seconds") < written:  # files are not counted every time
            found = scrape(server.log)
    assert value(found, "leases", "read") == 1
    assert value(found, "leases", "write") == 1
    assert value(found, "events_total", "granted") == granted + 2
    assert value(found, "large_file_bytes") == 8 * MIB
    huge = value(found, "large_file_huge_bytes", "2M")
    assert 4 * MIB <= huge <= 8 * MIB
    assert value(found, "large_file_huge_ratio") == huge / (8 * MIB)
    assert 0 < value(found, "free_unit_bytes", "2M") <= value(found, "pool_free_bytes")


def test_a_follower_has_metrics_of_its_own(server: Server) -> None:
    second, log = server.directory.with_name("second"), server.log.with_name("second.log")
    second.mkdir()
    vfsmap("mount", "--follow", server.pool, second, "--metrics", "0", "--log", log)
    try:
        list(second.iterdir())
        found = scrape(log)
    finally:
        vfsmap("umount", second)
    assert value(found, "pool_writable") == 0
    assert value(found, "request_duration_seconds_count", "readdir") > 0


def test_metrics_are_for_this_machine_alone_unless_a_host_is_named(server: Server) -> None:
    port = int(url(server.log).rpartition(":")[2].removesuffix("/metrics"))
    listening = [
        fields[1]
        for fields in map(str.split, Path("/proc/net/tcp").read_text().splitlines()[1:])
        if fields[1].endswith(f":{port:04X}") and fields[3] == "0A"
    ]
    assert listening == [f"0100007F:{port:04X}"]


def test_clients_that_only_come_take_nothing_from_the_mount(server: Server) -> None:
    host, port = url(server.log).removeprefix("http://").removesuffix("/metrics").split(":")
    descriptors = Path(f"/proc/{server.pid}/fd")
    threads = Path(f"/proc/{server.pid}/task")
    scrape(server.log)
    before = len(os.listdir(descriptors)), len(os.listdir(threads))
    with ExitStack() as stack:
        for _ in range(40):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex((host, int(port)))
            with suppress(OSError):  # most have to wait in the queue
                sock.send(b"GET /metr")
        (server.directory / "meanwhile").write_bytes(b"text")
        assert (server.directory / "meanwhile").read_bytes() == b"text"
        after = len(os.listdir(descriptors)), len(os.listdir(threads))
    assert after[0] <= before[0] + 2
    assert after[1] <= before[1] + 2
    assert value(scrape(server.log), "pool_writable") == 1


def test_a_server_ends_while_a_client_dawdles(server: Server) -> None:
    host, port = url(server.log).removeprefix("http://").removesuffix("/metrics").split(":")
    with socket.create_connection((host, int(port))) as sock:
        sock.send(b"GET /metr")
        server.unmount()
    server.mount()
    assert value(scrape(server.log), "inodes") >= 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("9464", ("127.0.0.1", 9464)),
        (":9464", ("127.0.0.1", 9464)),
        ("0.0.0.0:9464", ("0.0.0.0", 9464)),
        ("localhost:0", ("localhost", 0)),
        ("[::1]:9464", ("::1", 9464)),
        ("[::]:65535", ("::", 65535)),
    ],
)
def test_an_address_is_a_port_with_or_without_a_host(text: str, expected: tuple[str, int]) -> None:
    assert parse_address(text) == expected


@pytest.mark.parametrize("text", ["", "host", "host:", ":", "::1:80", "1:2:3", "host:65536", "-1"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(Invalid, match="PORT, HOST:PORT"):
        parse_address(text)


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    vfsmap("format", tmp_path / "pool", "--size", "16M")
    return tmp_path / "pool"


def complaint(pool: Path, address: str, **environment: str) -> tuple[int, str]:
    result = subprocess.run(
        [sys.executable, "-m", "vfsmap_tools.cli", "serve", str(pool), "--metrics", address],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert result.stderr.count("\n") == 1, result.stderr
    return result.returncode, result.stderr


def test_a_wrong_or_taken_address_is_refused_in_one_line(pool: Path) -> None:
    code, text = complaint(pool, "lots")
    assert code == 2
    assert "--metrics lots: PORT" in text
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, text = complaint(pool, str(port))
    assert code == 1
    assert f"port {port}: Address already in use; name another" in text


def test_without_prometheus_client_the_package_to_install_is_named(pool: Path) -> None:
    (pool.parent / "prometheus_client.py").write_text("raise ImportError('none here')\n")
    code, text = complaint(pool, "0", PYTHONPATH=str(pool.parent))
    assert code == 1
    assert "pip install 'vfsmap[metrics]'" in text
