"""A capability that is laid down, so that libfuse has no pipe to splice through, and taken up.

In a container root may lack the one that it is about; so another one stands in for it here.
"""

from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from vfsmap.pmem import libc
from vfsmap.testing.killing import Arena, arena, be_server
from vfsmap.testing.posix import as_user
from vfsmap_fuse.operations import Operations
from vfsmap_fuse.splicing import Splicing

CAP_SYS_NICE = 23


def has(capability: int, process: int | str = "thread-self") -> bool:
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> capability & 1)
    raise AssertionError(process)


@pytest.fixture
def splicing(monkeypatch: pytest.MonkeyPatch) -> Splicing:
    monkeypatch.setattr(libc, "CAP_SYS_RESOURCE", CAP_SYS_NICE)
    return Splicing()


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
    libc.set_capability(CAP_SYS_NICE, False)
    try:
        splicing.forbid()
        splicing.permit()
        assert not has(CAP_SYS_NICE)
    finally:
        libc.set_capability(CAP_SYS_NICE, True)


def test_a_capability_that_is_not_permitted_is_refused() -> None:
    with pytest.raises(PermissionError):
        as_user(lambda: libc.set_capability(CAP_SYS_NICE, True))


def tell_at_the_first_request(made: Arena, ready: Connection) -> None:
    libc.CAP_SYS_RESOURCE = CAP_SYS_NICE  # type: ignore[misc]  # it stands in for it
    init = Operations.init

    def tell(self: Operations) -> None:
        ready.send(has(CAP_SYS_NICE))
        init(self)

    Operations.init = tell  # type: ignore[method-assign, assignment]  # it stands in for the real one
    be_server(made, ready)


def test_a_server_takes_its_first_request_without_and_the_others_with_the_capability() -> None:
    with arena("tmpfs") as made:
        with made.start(tell_at_the_first_request) as ready:
            assert ready.recv() is False
            assert ready.recv() is None
        assert made.server
        assert made.server.pid
        assert has(CAP_SYS_NICE, made.server.pid)
        made.stop()
