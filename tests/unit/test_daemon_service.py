"""The daemon's methods, called over its socket, on a pool without a mount."""

import fcntl
import mmap
import os
import time
from pathlib import Path
from typing import Any

import pytest

from vfsmap.daemon import grants, service
from vfsmap.daemon.client import Client
from vfsmap.daemon.connection import Limits
from vfsmap.errors import (
    Busy,
    Exists,
    Invalid,
    NoMemory,
    NoSpace,
    NotFound,
    ProtocolError,
    ReadOnly,
    Sealed,
    TooManyMappings,
    Unsupported,
)
from vfsmap.fs import FileSystem
from vfsmap.pmem import libc
from vfsmap.pool import Pool
from vfsmap.testing.daemon import (
    Daemon,
    Listener,
    daemon,
    make,
    map_it,
    pattern,
)
from vfsmap.units import GIB, KIB, MIB, PMD, Extent

SIZE = 32 * MIB


# Map


def test_the_extents_lead_to_the_files_bytes_in_the_descriptor(
    fs: FileSystem, served: Daemon, client: Client
) -> None:
    data = pattern(3 * MIB)
    served.run(make, fs, b"file", data)
    answer, (pool,) = client.call("Map", path="/file")
    found = b"".join(os.pread(pool, e["length"], e["start"]) for e in answer["extents"])
    os.close(pool)
    assert found[: 3 * MIB] == data
    assert not any(found[3 * MIB :])
    assert (answer["offset"], answer["length"], answer["pool"]) == (0, 3 * MIB, 0)
    assert answer["medium"]["page_size"] == 4 * KIB
    assert answer["sealed"] is False


def test_the_end_of_a_file_is_handed_out_in_whole_units(
    fs: FileSystem, served: Daemon, client: Client
) -> None:
    served.run(make, fs, b"file", pattern(5 * MIB))
    answer = map_it(client, path="/file", offset=4 * MIB + 5, length=10)
    assert [(e["offset"], e["length"]) for e in answer["extents"]] == [(4 * MIB, 2 * MIB)]
    assert answer["extents"][0]["start"] % (2 * MIB) == 0


def test_a_read_lease_has_a_descriptor_that_can_not_write(
    fs: FileSystem, served: Daemon, client: Client
) -> None:
    served.run(make, fs, b"file", pattern(64 * KIB))
    _, (pool,) = client.call("Map", path="/file")
    assert fcntl.fcntl(pool, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    with (
        mmap.mmap(pool, 4096, mmap.MAP_SHARED, mmap.PROT_READ, offset=MIB) as mapped,
        pytest.raises(PermissionError),
    ):
        libc.mprotect(libc.address_of(mapped), 4096, libc.PROT_READ | libc.PROT_WRITE)
    os.close(pool)
    _, (pool,) = client.call("Map", path="/file", writable=True)
    assert fcntl.fcntl(pool, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
    os.close(pool)


def test_a_client_that_outlives_the_daemon_does_not_keep_the_pool_locked(
    fs: FileSystem, tmp_path: Path
) -> None:
    make(fs, b"file", pattern(64 * KIB))
    with daemon(fs, tmp_path / "s") as running, running.client() as client:
        _, (pool,) = client.call("Map", path="/file", writable=True)
    fs.close()
    Pool.open(tmp_path / "pool", "w").close()
    os.close(pool)


def test_holes_are_allocated_before_they_are_mapped(
    fs: FileSystem, served: Daemon, client: Client
) -> None:
    ino = served.run(make, fs, b"sparse")
    served.run(lambda: fs.setattr(ino, size=5 * MIB))
    assert served.run(fs.extents, ino) == []
    answer = map_it(client, path="/sparse", offset=MIB, length=2 * MIB)
    covered = sum(e["length"] for e in answer["extents"])
    assert covered >= 2 * MIB
    assert served.run(fs.is_allocated, ino, MIB, 2 * MIB)


def test_a_sealed_files_holes_stay_and_it_is_not_mapped_for_writing(
    fs: FileSystem, served: Daemon, client: Client
) -> None:
    ino = served.run(make, fs, b"sealed", pattern(64 * KIB))
    served.run(lambda: fs.setattr(ino, size=4 * MIB))
    before = served.run(fs.extents, ino)
    served.run(fs.seal, ino, b"descriptor", [])
    answer = map_it(client, path="/sealed")
    assert answer["sealed"] is True
    assert [Extent(**e) for e in answer["extents"]] == before
    with pytest.raises(Sealed):
        client.call("Map", path="/sealed", writable=True)


def test_a_range_outside_the_file_is_refused_and_an_empty_one_is_not(
    fs: FileSystem, served: Daemon, client: Client
) -> None:
    served.run(make, fs, b"file", pattern(64 * KIB))
    served.run(make, fs, b"empty")
    for offset, length in ((0, 64 * KIB + 1), (1, 64 * KIB), (65537, 0)):
        with pytest.raises(Invalid, match="not inside the file, which has 65536 bytes; grow it"):
            client.call("Map", path="/file", offset=offset, length=length)
    assert map_it(client, path="/empty")["length"] == 0
    assert map_it(client, path="/file", offset=64 * KIB)["length"] == 0
    with pytest.raises(ProtocolError, match=r"InvalidParameter.*length"):
        client.call("Map", path="/file", length=-1)


def test_a_small_file_is_moved_into_a_unit_where_one_is_demanded(
    fs: FileSystem, served: Daemon, client: Client
) -> None:
    data = pattern(64 * KIB)
    served.run(make, fs, b"file", data)
    answer, (pool,) = client.call("Map", path="/file", level=PMD.size)
    (extent,) = answer["extents"]
    assert (extent["start"] % PMD.size, extent["length"]) == (0, PMD.size)
    assert os.pread(pool, len(data), extent["start"]) == data
    os.close(pool)


def test_a_level_that_can_not_be_had_is_an_error_with_its_reason(
    fs: FileSystem, served: Daemon, client: Client
) -> None:
    served.run(make, fs, b"file", pattern(64 * KIB))
    with pytest.raises(NoSpace):
        client.call("Map", path="/file", level=GIB)
    with pytest.raises(Unsupported, match="no page-table entry maps 8K"):
        client.call("Map", path="/file", level=8 * KIB)
    # what is leased stays where it is
    map_it(client, path="/file")
    with pytest.raises(Busy, match="mapped"):
        client.call("Map", path="/file", level=PMD.size)


@pytest.mark.parametrize(
    ("extents", "complaint"),
    [
        ([Extent(0, 4 * MIB, 2 * MIB)], "there is a hole"),
        ([Extent(0, 4 * MIB, 2 * MIB), Extent(2 * MIB, 7 * MIB, 2 * MIB)], "not a multiple"),
        ([Extent(0, 4 * MIB, 3 * MIB)], "is shorter"),
    ],
)
def test_why_a_level_can_not_map_a_range_is_said_with_the_place(
    extents: list[Extent], complaint: str
) -> None:
    with pytest.raises(Unsupported, match=f"file offset 0x200000 .*entry of 2M: .*{complaint}"):
        grants.require_level(extents, 0, 4 * MIB, PMD.size)


def test_a_file_in_more_pieces_than_a_process_can_map_is_refused(
    fs: FileSystem, served: Daemon, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pieces(fs, served, 4)
    assert len(map_it(client, path="/pieces")["extents"]) == 4
    monkeypatch.setattr(grants, "EXTENTS_MAX", 3)
    with pytest.raises(TooManyMappings, match="4 pieces"):
        client.call("Map", path="/pieces")


def make_pieces(fs: FileSystem, served: Daemon, count: int) -> int:
    """Make a file whose blocks lie apart."""

    def alternate() -> int:
        mine = make(fs, b"pieces")
        other = make(fs, b"between")
        for n in range(count):
            fs.write(mine, n * 4 * KIB, bytes(4 * KIB))
            fs.write(other, n * 4 * KIB, bytes(4 * KIB))
        return mine

    return served.run(alternate)


def test_a_connection_holds_so_many_leases_and_no_more(fs: FileSystem, tmp_path: Path) -> None:
    make(fs, b"file", pattern(8 * KIB))
    with (
        daemon(fs, tmp_path / "s", limits=Limits(leases_max=2)) as running,
        running.client() as one,
        running.client() as other,
    ):
        first = map_it(one, path="/file")
        map_it(one, path="/file")
        with pytest.raises(NoMemory, match="holds 2 leases already; release some"):
            one.call("Map", path="/file")
        map_it(other, path="/file")
        one.call("Release", lease=first["lease"])
        map_it(one, path="/file")


def test_a_read_only_pool_gives_read_leases_alone(fs: FileSystem, tmp_path: Path) -> None:
    data = pattern(20 * KIB)
    make(fs, b"file", data)
    fs.close()
    with (
        FileSystem(Pool.open(tmp_path / "pool", "r")) as readable,
        daemon(readable, tmp_path / "s") as running,
        running.client() as client,
    ):
        answer, (pool,) = client.call("Map", path="/file")
        assert os.pread(pool, 20 * KIB, answer["extents"][0]["start"]) == data
        # behind the end there may be anything, and nobody may zero it
        assert sum(e["length"] for e in answer["extents"]) == 20 * KIB
        os.close(pool)
        with pytest.raises(ReadOnly):
            client.call("Map", path="/file", writable=True)
        assert client.call("GetInfo")[0]["writable"] is False


def test_what_is_persisted_in_a_window_is_found_again_in_the_file(
    fs: FileSystem, served: Daemon, client: Client
) -> None:
    assert fs.pool.grouped
    served.run(make, fs, b"file", pattern(64 * KIB))
    before = served.synced
    map_it(client, path="/file")
    assert served.synced == before
    map_it(client, path="/file", writable=True)
    assert served.synced == before + 1
    assert not fs.pool.journal.pending


# the other methods


def test_leases_are_listed_with_their_holders(
    fs: FileSystem, served: Daemon, client: Client
) -> None:
    ino = served.run(make, fs, b"file", pattern(64 * KIB))
    before = time.time_ns()
    granted = map_it(client, path="/file", offset=4096, length=100, writable=True)
    (lease,) = client.call("Leases")[0]["leases"]
    assert before <= lease.pop("granted_ns") <= time.time_ns()
    assert lease == {
        "lease": granted["lease"],
        "inode": ino,
        "offset": 4096,
        "length": 100,
        "writable": True,
        "pid": os.getpid(),
        "uid": os.geteuid(),
        "orphaned": False,
    }


@pytest.mark.parametrize("level", [1, 2048, 5 * MIB])
def test_a_level_that_is_none_is_refused_at_once(
    fs: FileSystem, served: Daemon, client: Client, level: int
) -> None:
    served.run(make, fs, b"file", pattern(64 * KIB))
    with pytest.raises(Unsupported, match="no page-table entry maps"):
        client.call("Map", path="/file", level=level)


def test_leases_are_listed_a_part_at_a_time_and_the_client_asks_for_all(
    fs: FileSystem, served: Daemon, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "LEASES_REPLIED", 2)
    served.run(make, fs, b"file", pattern(64 * KIB))
    granted = [map_it(client, path="/file", length=4096)["lease"] for _ in range(5)]
    assert [one["lease"] for one in client.call("Leases")[0]["leases"]] == granted[:2]
    assert [one["lease"] for one in client.leases()] == granted


def test_events_tell_what_happens_in_its_order(
    fs: FileSystem, served: Daemon, client: Client, events: Listener
) -> None:
    ino = served.run(make, fs, b"file", pattern(64 * KIB))
    lease = map_it(client, path="/file", length=4096, writable=True)["lease"]
    client.call("Violation", lease=lease, offset=8, length=5, detail="poke at 0x8 refused")
    with pytest.raises(NotFound):
        client.call("Map", path="/missing")
    client.call("Release", lease=lease)
    who = {"pid": os.getpid(), "uid": os.geteuid()}
    what = {"lease": lease, "inode": ino, "writable": True}
    seen = [events.next(kind) for kind in ("granted", "violation", "refused", "ended")]
    for event in seen:
        assert event.pop("time_ns") > 0
    whole = {"offset": 0, "length": 4096}
    part = {"offset": 8, "length": 5, "detail": "poke at 0x8 refused"}
    assert seen == [
        {"kind": "granted", **who, **what, **whole},
        {"kind": "violation", **who, **what, **part},
        {"kind": "refused", **who, "detail": seen[2]["detail"]},
        {"kind": "ended", **who, **what, **whole},
    ]
    assert "missing" in seen[2]["detail"]


def test_extents_come_in_portions(
    fs: FileSystem, served: Daemon, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    ino = make_pieces(fs, served, 5)
    monkeypatch.setattr(service, "_EXTENTS_REPLIED", 2)
    found: list[dict[str, int]] = []
    offset = 0
    while portion := client.call("Extents", path="/pieces", offset=offset)[0]["extents"]:
        assert len(portion) <= 2
        found += portion
        offset = found[-1]["offset"] + found[-1]["length"]
    assert [Extent(**extent) for extent in found] == served.run(fs.extents, ino)


def test_a_sealed_files_descriptor_and_tree_are_told(
    fs: FileSystem, served: Daemon, client: Client
) -> None:
    ino = served.run(make, fs, b"file", pattern(64 * KIB))
    assert "descriptor" not in client.call("Extents", path="/file")[0]
    served.run(fs.seal, ino, b"descriptor", [b"tree" * 1024])
    answer = client.call("Extents", path="/file", tree=True)[0]
    assert bytes.fromhex(answer["descriptor"]) == b"descriptor".ljust(256, b"\0")
    assert [Extent(**e) for e in answer["extents"]] == served.run(fs.tree_extents, ino)
    assert client.call("Extents", path="/file", tree=True, offset=1 << 40)[0]["extents"] == []


def test_allocate_makes_a_file_and_grows_it_in_units(
    fs: FileSystem, served: Daemon, client: Client, invalidated: list[int]
) -> None:
    with pytest.raises(NotFound):
        client.call("Allocate", path="/new", length=MIB)
    answer, _ = client.call("Allocate", path="/new", create=True, length=5 * MIB, level=PMD.size)
    assert answer["size"] == 5 * MIB
    extents = served.run(fs.extents, answer["inode"])
    assert all(extent.start % PMD.size == 0 for extent in extents)
    assert sum(extent.length for extent in extents) == 6 * MIB
    assert invalidated == [answer["inode"]]
    again, _ = client.call("Allocate", path="/new", create=True, offset=MIB, length=MIB)
    assert again == answer
    with pytest.raises(Exists, match="directory"):
        client.call("Allocate", path="/", create=True, length=MIB)


def test_allocate_refuses_what_there_is_no_room_for(
    fs: FileSystem, served: Daemon, client: Client
) -> None:
    served.run(make, fs, b"file")
    with pytest.raises(NoSpace):
        client.call("Allocate", path="/file", length=SIZE)
    with pytest.raises(Invalid, match="level 5"):
        client.call("Allocate", path="/file", length=MIB, level=5)
    with pytest.raises((Invalid, NoSpace)):
        client.call("Allocate", path="/file", length=1 << 62, offset=1 << 62)
    assert client.call("GetInfo")[0]["free"] > 0


def test_the_info_says_what_is_served(fs: FileSystem, served: Daemon, client: Client) -> None:
    info, _ = client.call("GetInfo")
    assert info["uuid"] == str(fs.pool.uuid)
    assert info["size"] == fs.pool.size
    assert info["medium"]["name"] == fs.pool.pmem.medium.name
    assert (info["mounted"], info["trusted"], info["writable"]) == (False, True, True)


@pytest.mark.parametrize("wanted", [{"lease": "1"}, {}, {"lease": 1, "more": 2}, {"lease": None}])
def test_parameters_of_the_wrong_type_are_named(client: Client, wanted: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match=r"InvalidParameter.*(lease|more)"):
        client.call("Release", **wanted)


def test_stats_tell_of_calls_events_leases_and_coverage(
    served: Daemon, client: Client, fs: FileSystem
) -> None:
    served.run(make, fs, b"large", bytes(4 * MIB))
    before, _ = client.call("Stats")
    assert "coverage" not in before
    map_it(client, path="/large")
    map_it(client, path="/large", writable=True)
    with pytest.raises(NotFound):
        map_it(client, path="/missing")
    after, _ = client.call("Stats", coverage=True)
    calls = {each["name"]: each for each in after["calls"]}
    assert (calls["Map"]["count"], calls["Map"]["errors"]) == (3, 1)
    assert sum(calls["Map"]["latency"]) == 3
    assert calls["Stats"]["count"] == 1  # this one has not ended
    assert (after["leases"], after["writable_leases"]) == (2, 1)
    assert (after["events"]["granted"], after["events"]["refused"]) == (2, 1)
    assert after["coverage"]["large"] == after["coverage"]["huge"] == 4 * MIB
    assert after["time_ns"] > before["time_ns"] > before["started_ns"]
    assert client.call("Stats")[0]["coverage"] == after["coverage"]


def test_calls_of_methods_that_do_not_exist_are_not_counted(client: Client) -> None:
    with pytest.raises(ProtocolError):
        client.call("Missing")
    assert "Missing" not in {each["name"] for each in client.call("Stats")[0]["calls"]}
