"""What the tests of the mapping daemon share: a pool, its daemon, clients."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from vfsmap.daemon.client import Client
from vfsmap.fs import FileSystem
from vfsmap.pool import Pool
from vfsmap.testing.daemon import Daemon, Listener, daemon
from vfsmap.units import MIB


@pytest.fixture
def fs(tmp_path: Path) -> Iterator[FileSystem]:
    made = FileSystem.format(Pool.create(tmp_path / "pool", 32 * MIB))
    yield made
    if made.pool.pmem.fd >= 0:
        made.close()


@pytest.fixture
def served(fs: FileSystem, tmp_path: Path) -> Iterator[Daemon]:
    with daemon(fs, tmp_path / "s") as running:
        yield running


@pytest.fixture
def client(served: Daemon) -> Iterator[Client]:
    with served.client() as made:
        yield made


@pytest.fixture
def events(served: Daemon) -> Iterator[Listener]:
    with served.client() as made:
        yield Listener(made)


@pytest.fixture
def invalidated(fs: FileSystem) -> list[int]:
    found: list[int] = []
    fs.invalidators.append(found.append)
    return found
