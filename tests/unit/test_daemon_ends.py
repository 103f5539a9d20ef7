"""Coherence with the mount, and how leases end: by release, by hang-up, by death."""

import mmap
import os
import subprocess
import sys
import threading

import pytest

from vfsmap.daemon import ends
from vfsmap.daemon.client import Client
from vfsmap.errors import Busy, Invalid, NotFound
from vfsmap.fs import ROOT, FileSystem
from vfsmap.pmem import Pmem
from vfsmap.pmem.procmaps import Scan, scan
from vfsmap.testing.daemon import Daemon, Listener, make, map_it, pattern
from vfsmap.units import KIB, MIB


def test_publishing_changes_the_times_and_drops_what_the_mount_has_cached(
    fs: FileSystem, served: Daemon, client: Client, invalidated: list[int]
) -> None:
    ino = served.run(make, fs, b"file", pattern(8 * KIB))
    before = served.run(lambda: fs.get(ino).mtime_ns)
    lease = map_it(client, path="/file", writable=True)["lease"]
    assert invalidated == []
    client.call("Publish", lease=lease)
    assert invalidated == [ino]
    assert served.run(lambda: fs.get(ino).mtime_ns) > before


def test_releasing_a_writable_lease_does_so_too_and_a_read_lease_does_not(
    fs: FileSystem, served: Daemon, client: Client, invalidated: list[int]
) -> None:
    ino = served.run(make, fs, b"file", pattern(8 * KIB))
    before = served.run(lambda: fs.get(ino).mtime_ns)
    read = map_it(client, path="/file")["lease"]
    with pytest.raises(Invalid, match="nothing to publish"):
        client.call("Publish", lease=read)
    client.call("Release", lease=read)
    assert invalidated == []
    assert served.run(lambda: fs.get(ino).mtime_ns) == before
    client.call("Release", lease=map_it(client, path="/file", writable=True)["lease"])
    assert invalidated == [ino]
    assert served.run(lambda: fs.get(ino).mtime_ns) > before


def test_a_writable_lease_whose_holder_has_hung_up_is_shown_when_it_ends(
    fs: FileSystem, served: Daemon, events: Listener
) -> None:
    shown = threading.Event()
    fs.invalidators.append(lambda ino: shown.set())
    served.run(make, fs, b"file", pattern(8 * KIB))
    with served.client() as holder:
        map_it(holder, path="/file", writable=True)
    events.next("granted")
    events.next("ended")
    assert shown.wait(10)


def test_a_lease_is_given_back_once_and_by_its_own_connection(
    fs: FileSystem, served: Daemon, client: Client
) -> None:
    served.run(make, fs, b"file", pattern(8 * KIB))
    lease = map_it(client, path="/file")["lease"]
    with served.client() as other:
        for method in ("Release", "Publish"):
            with pytest.raises(NotFound, match="holds no lease"):
                other.call(method, lease=lease)
        with pytest.raises(NotFound):
            other.call("Violation", lease=lease, detail="x")
    client.call("Release", lease=lease)
    with pytest.raises(NotFound):
        client.call("Release", lease=lease)


def test_a_mapping_outlives_its_connection_and_keeps_the_bytes(
    fs: FileSystem, served: Daemon, client: Client, events: Listener
) -> None:
    ino = served.run(make, fs, b"file", pattern(4 * MIB))
    holder = served.client()
    answer, (pool,) = holder.call("Map", path="/file")
    lease = events.next("granted")["lease"]
    extent = answer["extents"][0]
    mapped = mmap.mmap(pool, 4096, mmap.MAP_SHARED, mmap.PROT_READ, offset=extent["start"] + MIB)
    os.close(pool)
    holder.close()
    served.run(fs.unlink, ROOT, b"file")
    # a scan that finds it mapped does not end it
    served.run(fs.end_stale_pins)
    (seen,) = client.call("Leases")[0]["leases"]
    assert (seen["lease"], seen["orphaned"], seen["inode"]) == (lease, True, ino)
    assert mapped[:8] == (MIB // 8).to_bytes(8, "little")
    free = served.run(lambda: fs.pool.space.free_bytes)
    mapped.close()
    assert events.next("ended")["lease"] == lease
    served.run(fs.pool.sync)  # what is freed may be used again when that is durable
    assert served.run(lambda: fs.pool.space.free_bytes) == free + 4 * MIB


def test_a_released_window_is_in_nobodys_way(
    fs: FileSystem, served: Daemon, client: Client
) -> None:
    ino = served.run(make, fs, b"file", pattern(4 * MIB))
    lease = map_it(client, path="/file")["lease"]
    with pytest.raises(Busy, match="mapped"):
        served.run(lambda: fs.setattr(ino, size=0))
    client.call("Release", lease=lease)
    served.run(lambda: fs.setattr(ino, size=0))  # at once, before any scan was due


def test_a_lease_whose_holder_answers_for_it_ends_without_asking_the_kernel(
    fs: FileSystem,
    served: Daemon,
    client: Client,
    events: Listener,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ends, "scan", lambda pmem: pytest.fail("it was scanned"))
    ino = served.run(make, fs, b"file", pattern(4 * MIB))
    lease = map_it(client, path="/file")["lease"]
    client.call("Release", lease=lease, alone=True)
    served.run(lambda: fs.setattr(ino, size=0))
    assert client.call("Leases")[0]["leases"] == []
    events.next("granted")
    assert events.next("ended")["lease"] == lease


def test_who_keeps_a_mapping_does_not_have_us_scan_for_it_all_the_time(
    fs: FileSystem, served: Daemon, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    ino = served.run(make, fs, b"file", pattern(4 * MIB))
    answer, (pool,) = client.call("Map", path="/file")
    start = answer["extents"][0]["start"]
    scans = []

    def counted(pmem: Pmem) -> Scan:
        scans.append(pmem)
        return scan(pmem)

    monkeypatch.setattr(ends, "scan", counted)
    monkeypatch.setattr(ends, "_SCAN_REST_NS", 1 << 62)
    with mmap.mmap(pool, 4096, mmap.MAP_SHARED, mmap.PROT_READ, offset=start):
        os.close(pool)
        client.call("Release", lease=answer["lease"])
        for _ in range(50):
            with pytest.raises(Busy):
                served.run(lambda: fs.setattr(ino, size=0))
    assert 1 <= len(scans) <= 3


HOLDER = """
import os, sys, time
from vfsmap.daemon.client import Client
client = Client(sys.argv[1])
client.call("Map", path="/file")
sys.stdin.readline()
import socket
copy = socket.socket(fileno=os.dup(client._socket.fileno()))
if os.fork() == 0:             # the child keeps the connection open
    print(os.getpid(), flush=True)
    time.sleep(600)
os._exit(0)
"""


def test_a_holders_death_is_seen_though_a_child_keeps_its_connection(
    fs: FileSystem, served: Daemon, events: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ends, "RESCAN_INTERVAL", 0.05)
    served.run(make, fs, b"file", pattern(8 * KIB))
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, served.socket],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        events.next("granted")
        assert holder.stdin is not None
        assert holder.stdout is not None
        holder.stdin.write("\n")
        holder.stdin.flush()
        child = int(holder.stdout.readline())
        events.next("ended")
        os.kill(child, 9)
