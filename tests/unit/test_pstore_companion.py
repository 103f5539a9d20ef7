"""The page beside a region goes when its last user does, and never from under one."""

import fcntl
import os
from pathlib import Path

import pytest

from vfsmap.pstore import Geometry, Recorder, Region, format_region
from vfsmap.units import KIB


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "region"
    format_region(file, Geometry(64 * KIB, 8 * KIB, 16 * KIB, 16 * KIB))
    return file


def pages(path: Path) -> list[Path]:
    status = path.stat()
    name = f"vfsmap-pstore-{status.st_dev:x}.{status.st_ino:x}*"
    return list(Path("/dev/shm").glob(name))


def test_last_one_to_close_a_region_leaves_nothing_in_shared_memory(path: Path) -> None:
    with Recorder(path), Region.open(path, writable=True) as region:
        region.close()
        assert pages(path)
    assert pages(path) == []


def test_page_stays_while_a_forked_child_may_use_it(path: Path) -> None:
    go, told = os.pipe()
    with Recorder(path, watch=False) as recorder:
        child = os.fork()
        if not child:
            os.close(told)
            os.read(go, 1)
            recorder.console("from the child\n")
            os._exit(0)
    os.close(go)
    with Recorder(path, watch=False) as later:
        assert later.region.companion
        with later.region.locked():
            os.close(told)
            assert os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        os.waitpid(child, 0)
        assert later.region.file("console-ramoops-0").data == b"from the child\n"


def test_page_removed_while_another_opens_it_is_made_anew(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Region.open(path, writable=True)
    real = fcntl.flock

    def flock(fd: int, how: int) -> None:
        if how == fcntl.LOCK_SH:  # the last user leaves between our open() and our flock()
            monkeypatch.setattr(fcntl, "flock", real)
            first.close()
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with Region.open(path, writable=True) as second:
        assert fcntl.flock is real
        assert len(pages(path)) == 1
        assert second.companion
        with second.locked():
            pass
    assert pages(path) == []
