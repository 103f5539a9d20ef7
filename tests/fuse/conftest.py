"""A real mount for the tests of this directory."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import NamedTuple

import pytest

from vfsmap.fs import FileSystem
from vfsmap.pool import Pool
from vfsmap.testing.media import tmpfs
from vfsmap.testing.serve import Server, served


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needs = {
        "there is no /dev/fuse": os.access("/dev/fuse", os.R_OK | os.W_OK),
        "only root can be other users": os.geteuid() == 0,
    }
    missing = [reason for reason, there in needs.items() if not there]
    if missing and os.environ.get("VFSMAP_FORCE_FUSE") != "1":
        for item in items:
            if item.path.is_relative_to(Path(__file__).parent):
                item.add_marker(pytest.mark.skip(reason=missing[0]))  # not in `make test`


class Place(NamedTuple):
    """A pool, and where to mount it."""

    pool: Path
    mountpoint: Path


class Places:
    """Makes pools on a tmpfs of huge pages, and directories to mount them on."""

    def __init__(self, medium: Path, mounts: Path) -> None:
        self._medium = medium
        self._mounts = mounts
        self._numbers = count()

    def make(self, size: str = "64M", owner: int = 0) -> Place:
        name = f"pool-{next(self._numbers)}"
        place = Place(self._medium / name, self._mounts / name)
        with Pool.create(place.pool, size) as pool:
            FileSystem.format(pool, uid=owner, gid=owner)
        place.mountpoint.mkdir()
        for path in place:
            os.chown(path, owner, owner)
        return place


@pytest.fixture(scope="session")
def places() -> Iterator[Places]:
    with ExitStack() as stack:
        medium = stack.enter_context(tmpfs(size="2G"))
        mounts = Path(stack.enter_context(TemporaryDirectory(prefix="vfsmap-mounts-")))
        medium.chmod(0o777)
        mounts.chmod(0o755)
        yield Places(medium, mounts)


@pytest.fixture
def place(places: Places) -> Place:
    """A formatted pool of the test's own that is not mounted."""
    return places.make()


@pytest.fixture(scope="session")
def server(places: Places) -> Iterator[Server]:
    """The mount that most tests share; no test may make its server stumble over a bug."""
    place = places.make("512M")
    with served(place.pool, place.mountpoint) as server:
        yield server
        assert server.call("failed") is None


@pytest.fixture
def here(server: Server, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory on the shared mount, open to every user; the current one, too."""
    path = Path(mkdtemp(dir=server.mountpoint))
    path.chmod(0o777)
    monkeypatch.chdir(path)
    return path
