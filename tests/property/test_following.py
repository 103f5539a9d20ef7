"""A follower beside its writer: whatever is done, it has what a fresh look finds."""

import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from ctypes import c_uint64
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import pytest

from vfsmap.fs import FileSystem, FollowedFileSystem
from vfsmap.pmem import Medium
from vfsmap.pool import Follower, Oid, Pool, Structure
from vfsmap.testing.oracle import snapshot
from vfsmap.testing.pools import (
    FLUSHED,
    GROUPED,
    STORED,
    killed_fs,
    make_fs,
    make_pool,
    open_pmem,
    scratch,
)
from vfsmap.testing.workload import Context, drawn, perform, plant
from vfsmap.units import KIB, MIB

MEDIA = [STORED, FLUSHED, GROUPED]


@pytest.fixture
def tiny_log() -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(patch("vfsmap.pool.journal.RESERVE", KIB))
        stack.enter_context(patch("vfsmap.pool.journal._SLICE", 512))
        stack.enter_context(patch("vfsmap.pool.checkpoint._SLICE", KIB))
        yield


def facts(fs: FileSystem) -> dict[str, Any]:
    """All that a reader can learn, and what the index is to be."""
    shown = snapshot(fs)
    inodes = [ino for ino, file in shown.files.items() if file.inode]  # the others are arenas
    return {
        "shown": shown,
        "objects": dict(fs.pool.objects),
        "count": fs.inode_count,
        "live": fs.pool.journal.live,
        "next": fs.pool.next_oid,
        "size": fs.pool.size,
        "free": sorted(fs.pool.space.runs()),
        "blocks": {ino: fs.get(ino).blocks for ino in inodes},
        "parents": {ino: fs.parent(ino) for ino in inodes if fs.get(ino).is_directory},
        "read": {ino: bytes(fs.read(ino, 0, 1 << 24)) for ino in inodes if fs.get(ino).is_file},
    }


def fresh(path: Path, medium: Medium) -> dict[str, Any]:
    with FileSystem(Pool(open_pmem(path, medium, writable=False))) as fs:
        return facts(fs)


@pytest.mark.parametrize("medium", MEDIA, ids=lambda medium: medium.name)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.usefixtures("tiny_log")
def test_a_follower_has_what_a_fresh_look_finds(seed: int, medium: Medium) -> None:
    rng = random.Random(seed)
    with scratch() as directory:
        path = directory / "pool"
        fs = make_fs(path, 24 * MIB, medium, log=8 * KIB)
        plant(fs)
        fs.pool.sync()
        first = fs.pool.journal.superblock.epoch
        followed = FollowedFileSystem(Pool(open_pmem(path, medium, writable=False)))
        context = Context(fs, random.Random(seed))
        for name in drawn(seed, 200, grouped=medium is GROUPED):
            perform(context, name)
            if rng.random() < 0.1:
                context.pool.sync()
            if rng.random() < 0.03:
                context.pool.journal.compact()
            if rng.random() < 0.02:
                context = Context(killed_fs(context.fs), context.rng)
            if rng.random() < 0.15:
                followed.refresh()
                assert facts(followed) == fresh(path, medium), name
        assert context.pool.journal.superblock.epoch > first + 2
        followed.close()
        context.fs.close()


WRITER = """
import sys
from ctypes import c_uint64
from unittest.mock import patch
from vfsmap.pool import Pool, Structure, checkpoint, journal

class Number(Structure):
    _fields_ = [("value", c_uint64), ("ballast", c_uint64 * 20)]

with patch.object(journal, "RESERVE", 1024), patch.object(journal, "_SLICE", 2048):
    with patch.object(checkpoint, "_SLICE", 1024), Pool.open(sys.argv[1]) as pool:
        ballast = [pool.root]
        for value in range(1, 1 << 40):
            with pool.transaction() as tx:  # both, or neither
                tx.set(1, Number(value=value))
                tx.set(2, Number(value=value))
                ballast.append(tx.new(Number(value=value)))
                if len(ballast) > 40 + value // 50:  # so that the log has to grow
                    tx.delete(ballast.pop(1))
            if value == 1:
                print(flush=True)
"""


class Number(Structure):
    _fields_: ClassVar = [("value", c_uint64), ("ballast", c_uint64 * 20)]


def test_a_follower_never_has_a_part_of_a_transaction() -> None:
    """Against a writer at full speed, whose log is compacted and grown all the time."""
    with scratch() as directory:
        path = directory / "pool"
        with make_pool(path, 32 * MIB, log=8 * KIB) as pool:
            for _ in range(2):
                with pool.transaction() as tx:
                    tx.root = tx.new(Number())
        command = [sys.executable, "-c", WRITER, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            try:
                followed = Pool.open(path, "r")
                follower = Follower(followed)
                latest = refreshes = 0
                epochs, halves = set[int](), set[object]()
                while len(epochs) < 100 or len(halves) < 3 or refreshes < 3000:
                    follower.refresh()
                    refreshes += 1
                    one, two = (followed.get(Oid(oid), Number).value for oid in (1, 2))
                    assert one == two >= latest
                    latest = one
                    epochs.add(int(followed.journal.superblock.epoch))
                    halves.add(followed.journal.halves)
                assert writer.poll() is None
            finally:
                writer.kill()
        with Pool.open(path) as recovered:  # by now nobody stores anything
            follower.refresh()
            assert followed.objects == recovered.objects
        followed.close()
