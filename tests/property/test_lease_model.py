"""The lease table against three plain sets, whatever order things happen in."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from vfsmap.mapping.lease import Holder, Lease, LeaseTable

HOLDERS = [Holder(pid, 0) for pid in range(3)]


class LeaseTableMachine(RuleBasedStateMachine):
    held = Bundle("held")
    orphans = Bundle("orphans")

    def __init__(self) -> None:
        super().__init__()
        self.table = LeaseTable()
        self.model: dict[Lease, Holder | None] = {}

    @rule(target=held, holder=st.sampled_from(HOLDERS), writable=st.booleans())
    def grant(self, holder: Holder, writable: bool) -> Lease:
        lease = self.table.grant(1, 0, 1, writable=writable, holder=holder, extents=[], pin=0)
        self.model[lease] = holder
        return lease

    @rule(target=orphans, lease=consumes(held))
    def orphan(self, lease: Lease) -> Lease:
        self.table.orphan(lease)
        self.model[lease] = None
        return lease

    @rule(lease=consumes(orphans))
    def end(self, lease: Lease) -> None:
        assert self.table.end(lease)
        assert not self.table.end(lease)
        del self.model[lease]

    @invariant()
    def agrees(self) -> None:
        assert self.table.after(0, len(self.table)) == list(self.model)
        nobodys = {lease for lease, who in self.model.items() if who is None}
        assert set(self.table.orphans()) == nobodys
        for holder in HOLDERS:
            mine = [lease for lease, who in self.model.items() if who is holder]
            assert self.table.held_by(holder) == mine
            assert all(self.table.get(lease.lease, holder) is lease for lease in mine)


TestLeaseTable = LeaseTableMachine.TestCase
TestLeaseTable.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
