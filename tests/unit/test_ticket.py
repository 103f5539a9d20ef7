"""Tickets: the attribute's name, its value, and whose questions are answered."""

import os
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given as examples
from hypothesis import strategies as st

from vfsmap.daemon.connection import Connection
from vfsmap.daemon.ticket import EXTENTS_MAX, SECRET_SIZE, VALUE_MAX, Ticket
from vfsmap.daemon.tickets import Tickets
from vfsmap.errors import Busy, NoData
from vfsmap.mapping.lease import Holder, Lease, LeaseId
from vfsmap.units import Extent

SECRET = bytes(range(SECRET_SIZE))
numbers = st.integers(0, 2**63 - 1)
extents = st.builds(Extent, numbers, numbers, numbers)


def lease(*parts: Extent, number: int = 1, length: int = 4096) -> Lease:
    return Lease(
        LeaseId(number), 2, 0, length, writable=False, holder=Holder(1, 0), extents=parts, pin=1
    )


class Peer:
    """What tickets know of a connection."""

    def __init__(self, pid: int, uid: int) -> None:
        self.holder = Holder(pid, uid)
        self.closed = False


def connection(pid: int, uid: int = 0) -> Connection:
    return cast("Connection", Peer(pid, uid))


class Granter:
    """Notes what it was asked for, and grants it."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def __call__(self, *asked: Any) -> Lease | None:
        self.asked.append(asked[1:])
        return lease(Extent(0, 8192, 4096))


@pytest.fixture
def granter() -> Granter:
    return Granter()


@pytest.fixture
def tickets(granter: Granter) -> Tickets:
    return Tickets(granter)


# the value


@examples(number=numbers, length=numbers, parts=st.lists(extents, max_size=EXTENTS_MAX))
def test_a_value_tells_lease_length_and_extents_and_fits(
    number: int, length: int, parts: list[Extent]
) -> None:
    ticket = Ticket("user.vfsmap.lease.1", SECRET)
    value = ticket.value(lease(*parts, number=number, length=length))
    assert len(value) <= VALUE_MAX
    assert ticket.lease_of(value) == (number, length, parts)


@examples(st.binary(max_size=VALUE_MAX))
def test_a_value_without_the_secret_tells_of_nothing(value: bytes) -> None:
    assert Ticket("user.vfsmap.lease.1", SECRET).lease_of(value) is None


@examples(st.integers(0, VALUE_MAX - 1))
def test_half_a_value_tells_of_nothing_or_of_whole_extents(size: int) -> None:
    ticket = Ticket("user.vfsmap.lease.1", SECRET)
    parts = [Extent(n, n, n) for n in range(EXTENTS_MAX)]
    found = ticket.lease_of(ticket.value(lease(*parts))[:size])
    assert found is None or found[2] == parts[: (size - 32) // 24]


# who is answered


def given(tickets: Tickets, holder: Connection) -> Ticket:
    ticket = tickets.of(holder)
    assert ticket is not None
    return ticket


def test_a_process_of_no_known_namespace_gets_no_ticket(tickets: Tickets) -> None:
    assert tickets.of(connection(0)) is None


def ask(tickets: Tickets, attribute: str, *, pid: int | None = None, uid: int = 0) -> bytes:
    return tickets.lease(2, attribute.encode(), os.getpid() if pid is None else pid, uid)


def test_the_range_reaches_whoever_grants(tickets: Tickets, granter: Granter) -> None:
    ticket = given(tickets, connection(os.getpid()))
    assert ticket.lease_of(ask(tickets, ticket.attribute(4096, 10, 2 << 20))) is not None
    ask(tickets, ticket.attribute(0, None, 0))
    assert granter.asked == [(2, 4096, 10, 2 << 20), (2, 0, None, 0)]


def test_a_connection_keeps_its_ticket_and_others_have_others(tickets: Tickets) -> None:
    one, other = connection(1), connection(2)
    assert given(tickets, one) is given(tickets, one)
    assert given(tickets, one).name != given(tickets, other).name
    assert given(tickets, one).secret != given(tickets, other).secret


@pytest.mark.parametrize(
    "range_", ["-1.0.0", "0.-1.0", "0.0", "0.0.0.0", "a.0.0", "", "0..", "..0"]
)
def test_a_name_that_is_none_has_no_value(tickets: Tickets, range_: str, granter: Granter) -> None:
    ticket = given(tickets, connection(os.getpid()))
    with pytest.raises(NoData):
        ask(tickets, f"{ticket.name}.{range_}")
    assert not granter.asked


@pytest.mark.parametrize("range_", [f"{2**63}.0.0", f"0.{2**63}.0", f"0..{'9' * 200}"])
def test_a_number_that_no_file_has_room_for_is_not_asked_for(
    tickets: Tickets, range_: str, granter: Granter
) -> None:
    ticket = given(tickets, connection(os.getpid()))
    with pytest.raises(NoData):
        ask(tickets, f"{ticket.name}.{range_}")
    assert not granter.asked


def test_another_user_or_process_is_not_answered(tickets: Tickets, granter: Granter) -> None:
    ticket = given(tickets, connection(os.getpid(), uid=5))
    with pytest.raises(NoData):
        ask(tickets, ticket.attribute(0, None, 0), uid=0)
    with pytest.raises(NoData):
        ask(tickets, ticket.attribute(0, None, 0), uid=5, pid=os.getppid())
    assert not granter.asked
    assert ask(tickets, ticket.attribute(0, None, 0), uid=5)


def test_every_thread_of_the_process_is_answered(tickets: Tickets) -> None:
    parent = os.getppid()
    ticket = given(tickets, connection(parent))
    for task in Path(f"/proc/{parent}/task").iterdir():
        assert ask(tickets, ticket.attribute(0, None, 0), pid=int(task.name))


def test_a_ticket_ends_with_its_connection(tickets: Tickets, granter: Granter) -> None:
    here = connection(os.getpid())
    ticket = given(tickets, here)
    tickets.end(here)
    tickets.end(here)
    with pytest.raises(NoData):
        ask(tickets, ticket.attribute(0, None, 0))
    closed = connection(os.getpid())
    ticket = given(tickets, closed)
    vars(closed)["closed"] = True
    with pytest.raises(NoData):
        ask(tickets, ticket.attribute(0, None, 0))
    assert not granter.asked


def test_what_can_not_be_granted_has_no_value_whatever_the_reason() -> None:
    def refuse(*_: object) -> Lease | None:
        raise Busy("not now")

    for grant in (refuse, lambda *_: None):
        tickets = Tickets(cast("Any", grant))
        ticket = given(tickets, connection(os.getpid()))
        with pytest.raises(NoData):
            ask(tickets, ticket.attribute(0, None, 0))
