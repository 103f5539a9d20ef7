"""A capability that is laid down, so that libfuse has no pipe to splice through, and taken up."""

import os
from pathlib import Path

import pytest

from vfsmap.pmem import libc
from vfsmap.testing.posix import as_user
from vfsmap_fuse.splicing import Splicing

CAP_SYS_NICE = 23


def has(capability: int, status: Path = Path("/proc/thread-self/status")) -> bool:
    for line in status.read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> capability & 1)
    raise AssertionError(status)


@pytest.fixture
def splicing(monkeypatch: pytest.MonkeyPatch) -> Splicing:
    """One that lays down another capability: in a container root may lack the one it is about."""
    monkeypatch.setattr(libc, "CAP_SYS_RESOURCE", CAP_SYS_NICE)
    return Splicing()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has capabilities to lay down")
def test_the_capability_is_away_until_splicing_is_permitted_again(splicing: Splicing) -> None:
    assert has(CAP_SYS_NICE)
    splicing.forbid()
    try:
        assert not has(CAP_SYS_NICE)
        assert has(CAP_SYS_NICE - 1)
    finally:
        splicing.permit()
    assert has(CAP_SYS_NICE)


def test_a_capability_that_is_not_there_is_not_taken_up(splicing: Splicing) -> None:
    if os.geteuid() == 0:
        libc.set_capability(CAP_SYS_NICE, False)
    try:
        splicing.forbid()
        splicing.permit()
        assert not has(CAP_SYS_NICE)
    finally:
        if os.geteuid() == 0:
            libc.set_capability(CAP_SYS_NICE, True)


@pytest.mark.skipif(os.geteuid() != 0, reason="it becomes another user")
def test_a_capability_that_is_not_permitted_is_refused() -> None:
    with pytest.raises(PermissionError):
        as_user(lambda: libc.set_capability(CAP_SYS_NICE, True))
