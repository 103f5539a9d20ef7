import pytest

from vfsmap.errors import NoMemory, NotFound
from vfsmap.mapping.lease import Holder, Lease, LeaseTable
from vfsmap.units import Extent

ALICE, BOB = Holder(1, 0), Holder(1, 0)  # the same process, by two connections


def grant(table: LeaseTable, holder: Holder = ALICE, pin: int = 7) -> Lease:
    return table.grant(
        5, 0, 4096, writable=False, holder=holder, extents=[Extent(0, 4096, 4096)], pin=pin
    )


def test_a_lease_is_found_by_its_holder_alone() -> None:
    table = LeaseTable()
    lease = grant(table)
    assert table.get(lease.lease, ALICE) is lease
    with pytest.raises(NotFound, match="holds no lease 1"):
        table.get(lease.lease, BOB)
    with pytest.raises(NotFound):
        table.get(999, ALICE)


def test_two_connections_of_one_process_are_two_holders() -> None:
    table = LeaseTable()
    mine, other = grant(table, ALICE), grant(table, BOB)
    assert table.held_by(ALICE) == [mine]
    assert table.held_by(BOB) == [other]


def test_an_orphan_is_nobodys_and_still_there_until_it_ends() -> None:
    table = LeaseTable()
    lease = grant(table)
    table.orphan(lease)
    assert lease.orphaned
    with pytest.raises(NotFound):
        table.get(lease.lease, ALICE)
    assert table.held_by(ALICE) == []
    assert table.after(0, 9) == table.orphans() == [lease]
    assert table.end(lease)
    assert len(table) == 0
    assert not table.orphans()


def test_leases_are_told_in_their_order_a_part_at_a_time() -> None:
    table = LeaseTable()
    first, second, third = (grant(table) for _ in range(3))
    assert table.after(0, 2) == [first, second]
    assert table.after(first.lease, 2) == [second, third]
    table.orphan(second)
    table.end(second)
    assert table.after(first.lease, 2) == [third]
    assert table.after(third.lease, 2) == []


def test_a_lease_that_was_ended_meanwhile_is_ended_once() -> None:
    table = LeaseTable()
    lease = grant(table)
    table.orphan(lease)
    assert table.end(lease)
    assert not table.end(lease)


def test_a_holder_has_a_limited_number_of_leases_at_a_time() -> None:
    table = LeaseTable()
    first = grant(table)
    grant(table)
    table.require_room(ALICE, 3)
    with pytest.raises(NoMemory, match="holds 2 leases"):
        table.require_room(ALICE, 2)
    table.require_room(BOB, 2)
    table.orphan(first)
    table.require_room(ALICE, 2)


def test_numbers_of_leases_are_never_used_again() -> None:
    table = LeaseTable()
    seen = set()
    for _ in range(5):
        lease = grant(table)
        seen.add(lease.lease)
        table.orphan(lease)
        table.end(lease)
    assert len(seen) == 5
