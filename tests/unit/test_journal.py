import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from unittest import mock

import pytest

from vfsmap.errors import MediumError, NoSpace, ReadOnly
from vfsmap.pmem import Medium, Pmem
from vfsmap.pool import Pool
from vfsmap.pool.journal import RESERVE
from vfsmap.pool.layout import USER_TAG
from vfsmap.pool.log import LogHalf
from vfsmap.testing.pools import (
    FLUSHED,
    GROUPED,
    STORED,
    killed,
    make_pool,
    open_pmem,
    scratch,
)
from vfsmap.units import KIB, MIB

TAG = USER_TAG | 1
MEDIA = pytest.mark.parametrize("medium", [STORED, FLUSHED, GROUPED], ids=lambda m: m.commit.value)


@pytest.fixture
def directory() -> Iterator[Path]:
    with scratch() as path:
        yield path


def fill(pool: Pool, count: int, size: int = 16) -> list[int]:
    """Store objects, many to a transaction; return their numbers."""
    oids: list[int] = []
    while len(oids) < count:
        with pool.transaction() as tx:
            for _ in range(min(500, count - len(oids))):
                oids.append(tx.new_oid())
                tx.put(oids[-1], TAG, oids[-1].to_bytes(8, "little") * (size // 8))
    return oids


def end(pool: Pool, oids: list[int]) -> None:
    with pool.transaction() as tx:
        for oid in oids:
            tx.end(oid)


def use_up(pool: Pool) -> None:
    """Take all the space that is left."""
    with suppress(NoSpace):
        while True:
            pool.space.take(2 * MIB, minimum=4 * KIB)


def checkpoint(pool: Pool) -> None:
    """Run a whole checkpoint now."""
    pool.journal._drop_checkpoint()
    pool.journal._finish_checkpoint()


def test_a_checkpoint_at_once_takes_every_object_along(directory: Path) -> None:
    for count in (0, 1, 511, 512, 513, 40 * 512 + 3):
        pool = make_pool(directory / str(count), 64 * MIB)
        fill(pool, count)
        checkpoint(pool)
        before = dict(pool.objects)
        with killed(pool) as again:
            assert again.objects == before
            assert again.next_oid == pool.next_oid


def test_what_a_dropped_checkpoint_left_is_not_taken_for_the_next_ones(directory: Path) -> None:
    pool = make_pool(directory / "pool", 64 * MIB)
    oids = fill(pool, 4000)
    pool.journal._start_checkpoint().copy_all(pool.next_oid)
    pool = killed(pool)
    end(pool, oids[10:])
    checkpoint(pool)
    before = dict(pool.objects)
    with killed(pool) as again:
        assert again.failed is None
        assert again.objects == before


@MEDIA
def test_transactions_during_a_checkpoint_are_kept(directory: Path, medium: Medium) -> None:
    pool = make_pool(directory / "pool", 64 * MIB, medium)
    oids = fill(pool, 3000)
    pool.journal._start_checkpoint()
    for oid in oids[::3]:
        end(pool, [oid])
    fill(pool, 100)
    pool.sync()
    assert pool.journal._checkpoint is None, "it should be finished by now"
    before = dict(pool.objects)
    with killed(pool) as again:
        assert again.objects == before


@MEDIA
def test_a_log_goes_round_and_round_while_objects_change(directory: Path, medium: Medium) -> None:
    pool = make_pool(directory / "pool", 4 * MIB, medium)
    oid = fill(pool, 1)[0]
    others = fill(pool, 200, size=64)
    epoch = pool.journal.superblock.epoch
    for turn in range(4000):
        with pool.transaction() as tx:
            tx.put(oid, TAG, turn.to_bytes(8, "little") * 60)
    pool.sync()
    assert pool.journal.superblock.epoch > epoch + 3
    with killed(pool) as again:
        assert again.objects[oid][16:24] == (3999).to_bytes(8, "little")
        assert set(again.objects) == {oid, *others}


@MEDIA
def test_a_full_log_grows_as_long_as_there_is_space(directory: Path, medium: Medium) -> None:
    pool = make_pool(directory / "pool", 16 * MIB, medium)
    first = pool.journal.halves
    fill(pool, 40_000, size=64)
    pool.sync()
    assert min(half.length for half in pool.journal.halves) > 2 * first[0].length
    before = dict(pool.objects)
    with killed(pool) as again:
        assert again.objects == before
        for half in first:  # and the room of the first halves is free again
            assert again.space.withhold(half.start, half.length)


@MEDIA
def test_a_log_that_can_not_grow_refuses_more_but_takes_deletes(
    directory: Path, medium: Medium
) -> None:
    pool = make_pool(directory / "pool", 4 * MIB, medium)
    use_up(pool)
    oids: list[int] = []
    with suppress(NoSpace):
        while True:
            oids += fill(pool, 1, size=400)
    pool.sync()
    before = dict(pool.objects)
    assert pool.journal.live > pool.journal.capacity - 1000
    free = pool.space.free_bytes
    with pytest.raises(NoSpace, match="the pool's log is full"):
        fill(pool, 1, size=400)
    assert (pool.objects, pool.space.free_bytes) == (before, free)
    for oid in oids[::2]:
        end(pool, [oid])
    oids = oids[1::2]
    pool.sync()
    fill(pool, 3, size=400)
    pool.sync()
    before = dict(pool.objects)
    with killed(pool) as again:
        assert again.objects == before
        assert set(oids) < set(again.objects)


def test_a_full_log_can_still_be_rewritten_in_place(directory: Path) -> None:
    pool = make_pool(directory / "pool", 4 * MIB)
    use_up(pool)
    count = pool.journal.capacity // 32
    oids = fill(pool, count)
    assert pool.journal.capacity - pool.journal.live < 32
    for turn in range(3 * RESERVE // 32):
        with pool.transaction() as tx:
            tx.put(oids[turn % count], TAG, bytes(16))
    before = dict(pool.objects)
    with killed(pool) as again:
        assert again.objects == before


# group commits


def test_what_is_not_committed_is_gone_after_a_kill_all_at_once(directory: Path) -> None:
    pool = make_pool(directory / "pool", 8 * MIB, GROUPED)
    first = fill(pool, 10)
    pool.sync()
    fill(pool, 10)
    with killed(pool) as again:
        assert list(again.objects) == first


def test_transactions_made_while_a_group_is_on_its_way_wait_for_the_next(directory: Path) -> None:
    pool = make_pool(directory / "pool", 8 * MIB, GROUPED)
    first = fill(pool, 10)
    commit = pool.begin_commit()
    fill(pool, 10)
    commit.run()
    commit.finish()
    with killed(pool) as again:
        assert list(again.objects) == first


@MEDIA
def test_a_transaction_that_has_no_memory_to_be_stored_changes_nothing(
    directory: Path, medium: Medium
) -> None:
    pool = make_pool(directory / "pool", 8 * MIB, medium)
    first = fill(pool, 10)
    pool.sync()
    free = pool.space.free_bytes
    with (
        mock.patch.object(pool.journal, "_make_room", side_effect=MemoryError),
        pytest.raises(MemoryError),
        pool.transaction() as tx,
    ):
        tx.allocate("1M")
    assert pool.failed is None
    assert pool.space.free_bytes == free
    first += fill(pool, 10)
    pool.sync()
    with killed(pool) as again:
        assert list(again.objects) == first


def test_a_transaction_that_is_stored_but_not_noted_for_want_of_memory_turns_the_pool_read_only(
    directory: Path,
) -> None:
    pool = make_pool(directory / "pool", 8 * MIB, STORED)
    with (
        mock.patch.object(pool.journal, "_free", side_effect=MemoryError),
        pytest.raises(MemoryError),
    ):
        fill(pool, 1)
    with pytest.raises(ReadOnly, match="no memory"):
        fill(pool, 1)


def test_a_checkpoint_that_has_no_memory_for_a_slice_is_given_up(directory: Path) -> None:
    pool = make_pool(directory / "pool", 8 * MIB, STORED)
    oids = fill(pool, 2000, size=100)
    pool.journal._start_checkpoint()
    with mock.patch.object(LogHalf, "append", side_effect=MemoryError), suppress(MemoryError):
        pool.journal.compact()
    assert pool.journal._checkpoint is None
    pool.journal.compact()
    with killed(pool) as again:
        assert list(again.objects) == oids


def test_a_group_that_was_begun_and_never_run_is_written_when_it_is_finished(
    directory: Path,
) -> None:
    pool = make_pool(directory / "pool", 8 * MIB, GROUPED)
    first = fill(pool, 10)
    pool.begin_commit().finish()  # whoever was to run it was cancelled
    with killed(pool) as again:
        assert list(again.objects) == first


def test_a_group_whose_writing_is_broken_off_is_no_success_to_anybody(directory: Path) -> None:
    pool = make_pool(directory / "pool", 8 * MIB, GROUPED)
    fill(pool, 10)
    commit = pool.begin_commit()
    with mock.patch.object(pool.pmem, "sync", side_effect=MemoryError):
        for _ in range(2):
            with pytest.raises(MediumError, match="broken off"):
                commit.run()
    commit.finish()
    with pytest.raises(ReadOnly):
        fill(pool, 1)


def test_a_group_on_its_way_counts_when_the_log_gets_full(directory: Path) -> None:
    pool = make_pool(directory / "pool", 4 * MIB, GROUPED)
    half = pool.journal.log.place
    oid = fill(pool, 1)[0]

    def rewrite(share: float, content: bytes) -> None:
        for _ in range(int(half.length * share) // 4096):
            with pool.transaction() as tx:
                tx.put(oid, TAG, content)

    rewrite(0.6, b"old" * 1360)
    commit = pool.begin_commit()
    rewrite(0.6, b"new" * 1360)
    commit.run()
    commit.finish()
    pool.sync()
    with killed(pool) as again:
        assert again.failed is None
        assert again.objects[oid][16:] == b"new" * 1360


def test_a_log_that_is_on_its_way_to_larger_halves_is_not_grown_meanwhile(directory: Path) -> None:
    pool = make_pool(directory / "pool", 8 * MIB, GROUPED)
    oids = fill(pool, 100, size=1000)
    pool.sync()
    first = pool.journal.halves
    checkpoint = pool.journal._start_checkpoint()
    assert checkpoint.half.place not in first
    checkpoint.copy_all(pool.next_oid)
    with pool.transaction() as tx:
        oids.append(tx.allocate(4 * KIB))  # behind them, so that still larger ones lie elsewhere
    commit = pool.begin_commit()
    run, copy = commit.run, directory / "copy"

    def watched_run() -> None:
        run()
        if not copy.exists():
            copy.write_bytes(pool.path.read_bytes())

    commit.run = watched_run  # type: ignore[method-assign]  # it stands in for the real one
    fill(pool, pool.journal.capacity // 1000, size=1000)
    commit.run()
    commit.finish()
    with Pool(open_pmem(copy, GROUPED)) as killed_behind_the_commit:
        assert killed_behind_the_commit.failed is None
        assert set(killed_behind_the_commit.objects) == set(oids)


def test_what_is_freed_is_not_given_out_before_that_is_durable(directory: Path) -> None:
    pool = make_pool(directory / "pool", 8 * MIB, GROUPED)
    with pool.transaction() as tx:
        arena = tx.allocate("1M")
    pool.sync()
    lay = pool.arena(arena)
    free = pool.space.free_bytes
    with pool.transaction() as tx:
        tx.delete(arena)
    assert pool.space.free_bytes == free
    assert pool.space.withhold(lay.start, lay.length) == []
    pool.sync()
    assert pool.space.free_bytes == free + lay.length


def test_a_full_pool_commits_rather_than_refuse_what_was_just_freed(directory: Path) -> None:
    pool = make_pool(directory / "pool", 8 * MIB, GROUPED)
    with pool.transaction() as tx:
        arena = tx.allocate(pool.space.largest(pool.level), level=pool.level)
    pool.sync()
    for _ in range(3):
        with pool.transaction() as tx:
            tx.delete(arena)
        with pool.transaction() as tx:
            arena = tx.allocate("4M", level=pool.level)


# a medium that refuses


class Refusing(Pmem):
    """A medium that does as it is told until it breaks."""

    broken = False

    def _require_whole(self) -> None:
        if self.broken:
            raise MediumError("can't write back: Input/output error")

    def persist(self, offset: int, length: int) -> None:
        self._require_whole()
        super().persist(offset, length)

    def sync(self) -> None:
        self._require_whole()
        super().sync()


def breaking(pool: Pool) -> Refusing:
    """Open a pool again on a medium that can be broken."""
    path, medium = pool.path, pool.pmem.medium
    pool.close()
    return Refusing(os.open(path, os.O_RDWR), path, writable=True, medium=medium)


@MEDIA
def test_a_pool_turns_read_only_when_the_medium_refuses(directory: Path, medium: Medium) -> None:
    pool = make_pool(directory / "pool", 8 * MIB, medium)
    fill(pool, 10)
    before = dict(pool.objects)
    pmem = breaking(pool)
    pool = Pool(pmem)
    pmem.broken = True
    with pytest.raises(MediumError):  # noqa: PT012  # one or the other, as the medium commits
        fill(pool, 1)
        pool.sync()
    assert not pool.writable
    with pytest.raises(ReadOnly, match="turned read-only: can't write back"):
        fill(pool, 1)
    with killed(pool) as again:
        assert {oid: again.objects[oid] for oid in before} == before
        fill(again, 1)


def test_a_commit_that_failed_in_a_thread_fails_for_all_who_wait(directory: Path) -> None:
    pmem = breaking(make_pool(directory / "pool", 8 * MIB, GROUPED))
    pool = Pool(pmem)
    with pool.transaction() as tx:
        arena = tx.allocate("1M")
    pool.sync()
    free = pool.space.free_bytes
    with pool.transaction() as tx:
        tx.delete(arena)
    commit = pool.begin_commit()
    pmem.broken = True
    for _ in range(2):
        with pytest.raises(MediumError):
            commit.run()
    commit.finish()
    assert pool.space.free_bytes == free, "what may still be in use is free"
    with pytest.raises(ReadOnly):
        pool.sync()
    pool.close()


def test_a_switch_that_fails_behind_the_commit_point_keeps_the_commit(directory: Path) -> None:
    pmem = breaking(make_pool(directory / "pool", 8 * MIB, FLUSHED))
    pool = Pool(pmem)
    oids = fill(pool, 10)
    pool.journal._start_checkpoint()
    commits = pmem.persist

    def persist(offset: int, length: int) -> None:
        commits(offset, length)
        pmem.broken = True  # right behind the commit point

    pmem.persist = persist  # type: ignore[method-assign]  # it stands in for the real one
    end(pool, oids[:5])
    assert not pool.writable
    assert set(oids[5:]) == set(pool.objects)
    with killed(pool) as again:
        assert set(again.objects) == set(oids[5:])
