"""A pool beside a dict: on every kind of medium, with a tiny log, killed at any time."""

import multiprocessing
from contextlib import ExitStack
from ctypes import c_uint64
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import ClassVar
from unittest.mock import patch

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from vfsmap.errors import NoSpace, PoolDamaged
from vfsmap.pmem import Medium
from vfsmap.pool import Oid, Pool, Structure, Transaction, checkpoint, journal, superblock
from vfsmap.testing.pools import FLUSHED, GROUPED, STORED, killed, make_pool, scratch
from vfsmap.units import KIB, MIB, PMD, PTE, Level

LOG = 96 * KIB


class Number(Structure):
    _fields_: ClassVar = [("value", c_uint64), ("ballast", c_uint64 * 30)]


State = tuple[dict[Oid, int | bytes], Oid | None]
"""What the pool holds, as numbers and the byte an arena is full of; and its root."""


class Stop(Exception):
    pass


LEVEL = st.sampled_from([PTE, PMD])
CHANGES = st.lists(
    st.tuples(st.sampled_from(["new", "set", "delete", "arena", "root"]), st.integers(0, 1 << 40)),
    max_size=30,
)


class PoolModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.objects: dict[Oid, int | bytes] = {}
        self.root: Oid | None = None
        self.may_be_durable: list[State] = [({}, None)]

    def teardown(self) -> None:
        self.stack.close()

    @initialize(medium=st.sampled_from([STORED, FLUSHED, GROUPED]))
    def make(self, medium: Medium) -> None:
        for module in (checkpoint, journal):  # so that a checkpoint takes many transactions
            self.stack.enter_context(patch.object(module, "_SLICE", 600))
        path = self.stack.enter_context(scratch()) / "pool"
        self.pool = make_pool(path, 12 * MIB, medium, log=LOG)
        self.empty = self.pool.space.free_bytes

    def change(self, tx: Transaction, what: str, draw: int) -> None:
        """Make one change in the pool and in the model."""
        oids = list(self.objects)
        oid = oids[draw % len(oids)] if oids else None
        if what == "new":
            self.objects[tx.new(Number(value=draw))] = draw
        elif what == "arena":
            level: Level = PMD if draw % 7 == 0 else PTE
            size = (draw % 700 + 1) * 4 * KIB
            self.objects[tx.allocate(size, level=level)] = b""
        elif oid is None:
            return
        elif what == "set" and isinstance(self.objects[oid], int):
            tx.set(oid, Number(value=draw))
            self.objects[oid] = draw
        elif what == "root":
            tx.root = oid
            self.root = oid
        elif what == "delete" and oid in self.pool.objects:
            tx.delete(oid)
            del self.objects[oid]
            self.root = None if oid == self.root else self.root

    @rule(changes=CHANGES, stop=st.booleans() | st.just(False))
    def transact(self, changes: list[tuple[str, int]], stop: bool) -> None:
        before = dict(self.objects), self.root
        try:
            with self.pool.transaction() as tx:
                for what, draw in changes:
                    self.change(tx, what, draw)
                if stop:
                    raise Stop
        except (Stop, NoSpace):
            self.objects, self.root = before
        self.fill_new_arenas()
        self.note_durable()

    @rule(sizes=st.lists(st.integers(1, 700), min_size=1, max_size=4), level=LEVEL)
    def allocate(self, sizes: list[int], level: Level) -> None:
        changes = [("arena", size * 7 * KIB + (level is not PMD)) for size in sizes]
        self.transact(changes, False)

    @rule(draws=st.lists(st.integers(0, 1 << 40), min_size=1, max_size=4))
    def delete(self, draws: list[int]) -> None:
        self.transact([("delete", draw) for draw in draws], False)

    def note_durable(self, durable: bool = False) -> None:
        if durable or not self.pool.grouped:
            self.may_be_durable.clear()
        self.may_be_durable.append((dict(self.objects), self.root))

    def fill_new_arenas(self) -> None:
        for oid, content in self.objects.items():
            if content == b"":
                with self.pool.view(oid) as view:
                    assert bytes(view) == bytes(len(view)), "an arena shows old bytes"
                    view[:] = bytes([oid % 255 + 1]) * len(view)
                self.objects[oid] = bytes([oid % 255 + 1])

    @rule(turns=st.integers(1, 300), draw=st.integers(0, 1 << 40))
    def rewrite(self, turns: int, draw: int) -> None:
        """Fill the log with changes of one object."""
        numbers = [oid for oid, value in self.objects.items() if isinstance(value, int)]
        if numbers:
            oid = numbers[draw % len(numbers)]
            for turn in range(turns):
                with self.pool.transaction() as tx:
                    tx.set(oid, Number(value=turn))
                self.objects[oid] = turn
                self.note_durable()

    @rule()
    def sync(self) -> None:
        self.pool.sync()
        self.note_durable(durable=True)

    @rule()
    def give_back_what_is_free(self) -> None:
        while self.pool.space.trim():
            pass

    @rule()
    def kill(self) -> None:
        """Lose the last transactions; on a page cache the bytes of arenas stay as they are.

        A pool that needs room commits by itself, so it may be any number of transactions.
        """
        self.pool = killed(self.pool)
        for objects, root in reversed(self.may_be_durable):
            self.objects, self.root = dict(objects), root
            if set(self.pool.objects) - {0} == set(objects) and self.numbers_agree():
                break
        self.note_durable(durable=True)

    @rule()
    def reopen(self) -> None:
        self.sync()
        self.pool = killed(self.pool)

    def numbers_agree(self) -> bool:
        return self.pool.root == self.root and all(
            self.pool.get(oid, Number).value == value
            for oid, value in self.objects.items()
            if isinstance(value, int)
        )

    @invariant()
    def the_pool_holds_what_the_model_holds(self) -> None:
        assert set(self.pool.objects) - {0} == set(self.objects)
        assert self.pool.root == self.root
        used = 0
        for oid, content in self.objects.items():
            if isinstance(content, int):
                assert self.pool.get(oid, Number).value == content
            else:
                extent = self.pool.arena(oid)
                used += extent.length
                ends = extent.start, extent.start + extent.length - 1
                assert {self.pool.pmem.view[at] for at in ends} == {content[0]}
        if not self.pool.journal.pending:
            log = sum(place.length for place in self.pool.journal.halves)
            larger = sum(place.length for place in self.pool.journal._larger or ())
            assert self.pool.space.free_bytes == self.empty + 2 * LOG - log - larger - used


TestPoolModel = PoolModel.TestCase
TestPoolModel.settings = settings(
    max_examples=100, stateful_step_count=30, deadline=None, derandomize=True
)


# a reader beside a writer


def _write(path: Path, started: Event) -> None:
    pool = Pool.open(path)
    for turn in range(3000):
        with pool.transaction() as tx:
            for oid in range(1, 21):
                tx.set(Oid(oid), Number(value=turn))
        started.set()
    pool.close()


def test_a_reader_beside_a_writer_sees_finished_states_only() -> None:
    """While the writer's log goes round and round, and every transaction changes all objects."""
    context = multiprocessing.get_context("fork")
    with scratch() as directory:
        pool = make_pool(directory / "pool", 8 * MIB, log=LOG)
        with pool.transaction() as tx:
            for _ in range(20):
                tx.new(Number())
        first = pool.journal.superblock.epoch
        pool.close()
        started = context.Event()
        writer = context.Process(target=_write, args=(pool.path, started))
        writer.start()
        started.wait()
        seen: list[int] = []
        while writer.is_alive():
            with Pool.open(pool.path, "r") as reader:
                assert reader.failed is None
                values = {reader.get(Oid(oid), Number).value for oid in range(1, 21)}
                assert len(values) == 1, "a transaction was seen half done"
                seen += values
        writer.join()
        assert writer.exitcode == 0
        assert seen == sorted(seen)
        with Pool.open(pool.path, "r") as reader:
            assert reader.journal.superblock.epoch > first + 20
            assert reader.get(Oid(1), Number).value == 2999


@pytest.mark.parametrize("torn", [1, 2])
def test_a_reader_looks_again_when_a_superblock_is_being_written(
    torn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0
    load = superblock.load

    def load_in_time(view: memoryview) -> object:
        nonlocal looks
        looks += 1
        if looks == torn:
            raise PoolDamaged("both copies are being written")
        return load(view)

    with scratch() as directory:
        make_pool(directory / "pool", 8 * MIB).close()
        monkeypatch.setattr(superblock, "load", load_in_time)
        Pool.open(directory / "pool", "r").close()
        assert looks == 3
