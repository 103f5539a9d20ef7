"""Every window of a process but the first: asked for by an attribute, on a real mount."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vfsmap
from vfsmap.daemon import attach
from vfsmap.daemon.client import Client, HeldTicket, clients, connect
from vfsmap.errors import Busy, Denied, Invalid, Unsupported
from vfsmap.testing.commands import Server, pool_for_all, served_pool
from vfsmap.testing.daemon import Listener, pattern
from vfsmap.testing.media import tmpfs
from vfsmap.testing.posix import refused
from vfsmap.testing.users import as_user
from vfsmap.units import KIB, MIB, PMD


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with pool_for_all() as served:
        yield served


@pytest.fixture
def path(server: Server, request: pytest.FixtureRequest) -> Path:
    made = server.make_directory(request.node.name) / "file"
    made.write_bytes(pattern(4 * MIB))
    return made


@pytest.fixture
def first(path: Path) -> Iterator[vfsmap.Window]:
    """A first window, with which the ticket comes."""
    other = path.with_name("first")
    other.write_bytes(bytes(64 * KIB))
    with vfsmap.map(other) as window:
        yield window


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The methods that are called from now on."""
    made: list[str] = []
    call = Client.call

    def noted(client: Client, method: str, *rest: Any, **parameters: Any) -> Any:
        made.append(method)
        return call(client, method, *rest, **parameters)

    monkeypatch.setattr(Client, "call", noted)
    return made


def ticket_of(path: Path) -> HeldTicket | None:
    client = clients.get(str(path), path.stat().st_dev)
    assert isinstance(client, Client)
    return client.ticket


def leases(path: Path) -> list[dict[str, Any]]:
    with connect(path) as client:
        found = client.call("Leases")[0]["leases"]
    return [lease for lease in found if lease["inode"] == path.stat().st_ino]


@pytest.mark.usefixtures("first")
def test_a_second_window_needs_no_call_and_shows_the_pools_own_bytes(
    path: Path, calls: list[str]
) -> None:
    with vfsmap.map(path, level=PMD, populate=True) as window:
        assert calls == []
        assert window.direct
        assert window.view() == pattern(4 * MIB)
        assert window.page_sizes() == {2 * MIB: 4 * MIB, 4 * KIB: 0}
    with vfsmap.map(path, offset=MIB + 5, length=100) as window:
        assert calls == []
        assert window.view() == pattern(4 * MIB)[MIB + 5 : MIB + 105]
    with vfsmap.map(path, private=True) as private:
        assert calls == []
        private.view()[:5] = b"hello"
    assert path.read_bytes()[:5] == bytes(5)


def test_a_ticket_outlives_the_first_window_and_keeps_nothing_open(
    server: Server, path: Path, calls: list[str]
) -> None:
    vfsmap.map(path).close()
    calls.clear()
    for _ in range(3):
        with vfsmap.map(path) as window:
            assert window.direct
            assert pool_descriptors(server.pool) == []
    assert calls == []


@pytest.mark.usefixtures("first")
def test_such_a_lease_is_one_as_any_other(server: Server, path: Path, calls: list[str]) -> None:
    with connect(server.directory) as client:
        events = Listener(client)
        window = vfsmap.map(path, offset=MIB)
        assert calls == []
        granted = events.next("granted")
        assert (granted["offset"], granted["length"]) == (MIB, 3 * MIB)
        assert (granted["pid"], granted["writable"]) == (os.getpid(), False)
        assert [lease["lease"] for lease in leases(path)] == [granted["lease"]]
        with refused(Busy.errno):
            os.truncate(path, 2 * MIB)
        window.close()
        assert events.next("ended")["lease"] == granted["lease"]
    assert leases(path) == []
    os.truncate(path, 0)


@pytest.mark.usefixtures("first")
def test_a_window_that_is_collected_gives_such_a_lease_back(path: Path, calls: list[str]) -> None:
    vfsmap.map(path)
    assert calls == []
    while leases(path):
        os.sched_yield()


@pytest.mark.usefixtures("first")
def test_a_writable_window_is_never_granted_by_an_attribute(path: Path, calls: list[str]) -> None:
    with vfsmap.map(path, writable=True) as window:
        assert calls == ["Map"]
        assert window.writable


@pytest.mark.usefixtures("first")
def test_what_has_to_be_done_first_is_done_by_a_call(path: Path, calls: list[str]) -> None:
    with path.open("r+b") as dirty:  # a cached writer may have dirty pages
        dirty.write(b"hello")
        dirty.flush()
        with vfsmap.map(path) as window:
            assert calls == ["Map"]
            assert bytes(window.view()[:5]) == b"hello"
    os.truncate(path, 8 * MIB)  # a hole
    with vfsmap.map(path) as window:
        assert calls == ["Map", "Map"]
        assert len(window.view()) == 8 * MIB
    with vfsmap.map(path) as window:
        assert calls == ["Map", "Map"]
        assert window.view()[:8] == b"hello" + pattern(8)[5:]


@pytest.mark.parametrize(("pieces", "called"), [(4, []), (5, ["Map"])])
@pytest.mark.usefixtures("first")
def test_a_file_in_more_pieces_than_a_value_holds_is_mapped_by_a_call(
    path: Path, calls: list[str], pieces: int, called: list[str]
) -> None:
    between = path.with_name("between")
    path.unlink()
    with path.open("wb", buffering=0) as one, between.open("wb", buffering=0) as other:
        for number in range(pieces):
            one.write(bytes([number]) * 64 * KIB)
            other.write(bytes(64 * KIB))
    assert len(os.getxattr(path, "user.vfsmap.extents").splitlines()) == pieces
    with vfsmap.map(path) as window:
        assert window.view()[:: 64 * KIB] == bytes(range(pieces))
    assert calls == called


@pytest.mark.usefixtures("first")
def test_errors_are_those_of_the_call(path: Path) -> None:
    with pytest.raises(Invalid, match="not inside the file"):
        vfsmap.map(path, offset=5 * MIB, length=1)
    with pytest.raises(Unsupported, match="1G"):
        vfsmap.map(path, level=vfsmap.PUD)
    assert leases(path) == []


def map_two(allowed: Path, secret: Path) -> list[Any]:
    with vfsmap.map(allowed) as window:
        seen: list[Any] = [window.direct, ticket_of(allowed) is not None]
        vfsmap.map(allowed).close()
        seen.append(ticket_of(allowed) is not None)  # it can't open the pool by itself
        try:
            vfsmap.map(secret)
        except Denied:
            seen.append("Denied")
        with vfsmap.map(allowed, offset=8, length=8) as again:
            seen.append(bytes(again.view()).hex())
        return seen


def test_a_groups_member_is_served_by_calls_and_refused_what_it_may_not_read(path: Path) -> None:
    secret = path.with_name("secret")
    secret.write_bytes(b"secret")
    secret.chmod(0o600)
    path.chmod(0o644)
    expected = [True, True, False, "Denied", (1).to_bytes(8, "little").hex()]
    assert as_user(65534, map_two, path, secret, groups=(1,)) == expected


def read_attribute(path: Path, name: str) -> bool:
    try:
        os.getxattr(path, name)
    except OSError:
        return False
    return True


@pytest.mark.usefixtures("first")
def test_somebody_elses_ticket_gives_nothing(path: Path) -> None:
    ticket = ticket_of(path)
    assert ticket is not None
    name = ticket.ticket.attribute(0, None, 0)
    path.chmod(0o644)
    assert not as_user(65534, read_attribute, path, name)  # another user
    assert not as_user(65534, read_attribute, path, name, groups=(1,))
    assert not as_user(0, read_attribute, path, name)  # the same user, another process
    assert leases(path) == []


@pytest.mark.usefixtures("first")
def test_other_threads_use_the_same_ticket(path: Path, calls: list[str]) -> None:
    seen: list[bytes] = []

    def work() -> None:
        with vfsmap.map(path, offset=8, length=8) as window:
            seen.append(bytes(window.view()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(1).to_bytes(8, "little")]
    assert calls == []


def map_in_child(path: Path, calls: list[str]) -> list[Any]:
    with vfsmap.map(path) as window, vfsmap.map(path):
        return [window.direct, calls]


@pytest.mark.usefixtures("first")
def test_a_forked_child_gets_a_ticket_of_its_own(path: Path, calls: list[str]) -> None:
    assert as_user(0, map_in_child, path, calls) == [True, ["Map"]]


def pool_descriptors(pool: Path) -> list[str]:
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
        if target == str(pool):
            found.append(fd)
    return found


def test_threads_map_side_by_side_while_others_open_files(path: Path) -> None:
    failures: list[BaseException] = []
    other = path.with_name("other")
    other.write_bytes(b"!" * 4096)

    def work() -> None:
        try:
            for _ in range(300):
                with vfsmap.map(path, offset=8, length=8) as window:
                    assert window.view() == (1).to_bytes(8, "little")
        except BaseException as exc:
            failures.append(exc)

    def disturb() -> None:
        while not done.is_set():
            other.open("rb").close()

    done = threading.Event()
    disturber = threading.Thread(target=disturb)
    threads = [threading.Thread(target=work) for _ in range(3)]
    disturber.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    disturber.join()
    assert failures == []


@pytest.mark.parametrize("instead", [None, b"x" * 8192])
@pytest.mark.usefixtures("first")
def test_what_has_the_pools_path_and_is_not_the_pool_is_never_mapped(
    server: Server, path: Path, calls: list[str], instead: bytes | None
) -> None:
    aside = server.pool.with_suffix(".aside")
    server.pool.rename(aside)
    try:
        if instead is not None:
            server.pool.write_bytes(instead)
        with vfsmap.map(path) as window:
            assert window.direct
            assert window.view() == pattern(4 * MIB)
        vfsmap.map(path).close()
    finally:
        aside.rename(server.pool)
    assert calls == ["Map", "Map"]
    client = clients.get(str(path), path.stat().st_dev)
    assert isinstance(client, Client)
    clients.drop(client)  # the next one has a ticket again


@pytest.mark.usefixtures("first")
def test_a_daemon_of_another_user_is_not_asked_for_a_ticket(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connect(path) as client:
        assert client.may_ask_for_ticket()
        monkeypatch.setattr(Client, "server_uid", 65534)
        assert not client.may_ask_for_ticket()


@pytest.mark.usefixtures("first")
def test_a_forked_child_starts_without_its_parents_ticket(path: Path) -> None:
    assert as_user(0, ticket_is_missing_at_first, path)


def ticket_is_missing_at_first(path: Path) -> bool:
    return ticket_of(path) is None


@pytest.mark.parametrize(
    "forged", [b"", bytes(32), bytes(56), b"x" * 128], ids=["empty", "no extent", "one", "four"]
)
@pytest.mark.usefixtures("first")
def test_an_answer_that_is_not_the_daemons_is_not_believed(
    path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch, forged: bytes
) -> None:
    monkeypatch.setattr(os, "getxattr", lambda *_: forged)
    with vfsmap.map(path) as window:
        assert calls == ["Map"]
        assert window.view() == pattern(4 * MIB)


def test_what_a_signals_handler_raises_is_passed_on_and_leaves_no_lease(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with vfsmap.map(path, length=8):
        getxattr = os.getxattr

        def late(*arguments: Any) -> bytes:
            getxattr(*arguments)
            raise TimeoutError("time is up")

        with monkeypatch.context() as patch:
            patch.setattr(os, "getxattr", late)
            with pytest.raises(TimeoutError, match="time is up"):
                vfsmap.map(path, offset=2 * MIB)
    while leases(path):
        os.sched_yield()
    os.truncate(path, MIB)


@pytest.mark.usefixtures("first")
def test_what_a_signals_handler_raises_while_the_pool_is_opened_is_passed_on(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*_: Any) -> int:
        raise TimeoutError("time is up")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", late)
        with pytest.raises(TimeoutError, match="time is up"):
            vfsmap.map(path)
    assert ticket_of(path) is not None
    assert leases(path) == []


@pytest.mark.usefixtures("first")
def test_an_interrupted_window_leaves_no_lease(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(attach, "Window", interrupted)
        with pytest.raises(KeyboardInterrupt):
            vfsmap.map(path)
    assert leases(path) == []


def test_an_answer_that_nobody_took_ends_with_the_connection(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with vfsmap.map(path) as window:
        getxattr = os.getxattr

        def interrupted(*arguments: Any) -> bytes:
            getxattr(*arguments)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(os, "getxattr", interrupted)
            with pytest.raises(KeyboardInterrupt):
                vfsmap.map(path, offset=2 * MIB)
        assert window.view() == pattern(4 * MIB)
        with vfsmap.map(path, offset=8, length=8) as other:
            assert other.view() == (1).to_bytes(8, "little")
    while leases(path):
        os.sched_yield()


def test_a_ticket_of_a_killed_server_is_void_under_the_next_one(tmp_path: Path) -> None:
    with (
        tmpfs(size="100M") as place,
        served_pool(place, "64M", "--socket", tmp_path / "s") as own,
    ):
        path = own.directory / "file"
        path.write_bytes(pattern(64 * KIB))
        with vfsmap.map(path) as before:
            own.kill()
            own.mount()
            with vfsmap.map(path, offset=8, length=8) as window:
                assert window.direct
                assert window.view() == (1).to_bytes(8, "little")
                with vfsmap.map(path) as another:
                    assert another.view() == before.view()
