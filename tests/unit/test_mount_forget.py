"""Deleted files that the kernel still knew: what becomes of them when it forgets them."""

import os
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import cast

import pytest
from pyfuse3 import RequestContext

from vfsmap.errors import NotFound
from vfsmap.fs import ROOT, FileSystem
from vfsmap.fs.state import BATCH_PIECES
from vfsmap.testing.pools import make_fs, scratch
from vfsmap.units import MIB
from vfsmap_fuse.operations import Operations

CALLER = cast("RequestContext", SimpleNamespace(uid=0, gid=0, pid=1, umask=0))


async def _nothing(*_: object) -> None:
    pass


@pytest.fixture
async def operations() -> AsyncIterator[Operations]:
    with scratch() as place, make_fs(place / "pool", 32 * MIB) as fs:
        yield Operations(fs, sync=_nothing, seal=_nothing)


async def made(operations: Operations, name: bytes, data: bytes = b"") -> int:
    """Return the number of a new, closed file, which the kernel knows."""
    handle, entry = await operations.create(ROOT, name, 0o600, os.O_WRONLY, CALLER)
    if data:
        await operations.write(handle.fh, 0, data)
    await operations.release(handle.fh)
    return entry.st_ino


async def deleted(operations: Operations, count: int) -> list[int]:
    """Return the numbers of files that have no name, and that the kernel knows."""
    inos = [await made(operations, b"%d" % number, b"x") for number in range(count)]
    for number in range(count):
        await operations.unlink(ROOT, b"%d" % number, CALLER)
    return inos


def is_there(fs: FileSystem, ino: int) -> bool:
    return ino in fs.pool.objects


async def test_deleted_files_end_together_once_the_kernel_has_forgotten_them(
    operations: Operations,
) -> None:
    fs = operations.fs
    free = (await operations.statfs(CALLER)).f_bfree
    inos = await deleted(operations, 50)
    assert all(is_there(fs, ino) for ino in inos)
    for ino in inos:
        await operations.forget([(ino, 1)])
    before = fs.pool.journal.log.sequence
    assert (await operations.statfs(CALLER)).f_bfree == free
    assert fs.pool.journal.log.sequence == before + 1
    assert not any(is_there(fs, ino) for ino in inos)
    assert fs.inode_count == 1


async def test_more_deleted_files_than_a_transaction_takes_end_too(operations: Operations) -> None:
    inos = await deleted(operations, BATCH_PIECES)  # each with an extent
    await operations.forget([(ino, 1) for ino in inos])
    await operations.statfs(CALLER)
    assert not any(is_there(operations.fs, ino) for ino in inos)


async def test_a_deleted_file_that_the_kernel_knows_again_does_not_end(
    operations: Operations,
) -> None:
    ino = await made(operations, b"one")
    await operations.link(ino, ROOT, b"other", CALLER)
    await operations.unlink(ROOT, b"one", CALLER)
    await operations.forget([(ino, 2)])
    await operations.lookup(ROOT, b"other", CALLER)  # before anything came of being forgotten
    await operations.unlink(ROOT, b"other", CALLER)
    await operations.statfs(CALLER)
    assert (await operations.getattr(ino, CALLER)).st_nlink == 0
    await operations.forget([(ino, 1)])
    await operations.statfs(CALLER)
    with pytest.raises(Exception, match="No such file"):
        await operations.getattr(ino, CALLER)


async def test_what_the_kernel_still_knows_ends_with_the_mount(operations: Operations) -> None:
    inos = await deleted(operations, 3)
    operations.forget_all()
    assert not any(is_there(operations.fs, ino) for ino in inos)


async def test_a_file_that_a_lease_keeps_outlives_the_kernels_memory_of_it(
    operations: Operations,
) -> None:
    fs = operations.fs
    (ino,) = await deleted(operations, 1)
    pin = fs.pin(ino, 0, 1, writable=False)
    await operations.forget([(ino, 1)])
    await operations.statfs(CALLER)
    assert is_there(fs, ino)
    fs.unpin(pin)
    with pytest.raises(NotFound):
        fs.get(ino)
