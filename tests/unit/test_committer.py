"""Group commits that are cancelled, or get no thread, lose nothing."""

from collections.abc import Iterator

import pytest
import trio
import trio.testing

from vfsmap.pool import Pool
from vfsmap.pool.layout import USER_TAG
from vfsmap.testing.pools import GROUPED, killed, make_pool, scratch
from vfsmap.units import MIB
from vfsmap_tools.committer import Committer


@pytest.fixture
def pool() -> Iterator[Pool]:
    with scratch() as path:
        yield make_pool(path / "pool", 8 * MIB, GROUPED)


def change(pool: Pool) -> None:
    with pool.transaction() as tx:
        tx.put(tx.new_oid(), USER_TAG | 1, b"changed")


async def test_what_a_cancelled_sync_has_begun_is_durable(pool: Pool) -> None:
    change(pool)
    committer = Committer(pool)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(committer.sync)
        await trio.lowlevel.checkpoint()  # now it has the lock, and waits for nothing
        nursery.cancel_scope.cancel()
    change(pool)
    await committer.sync()
    with killed(pool) as again:
        assert list(again.objects) == [1, 2]


async def test_without_memory_for_a_thread_a_sync_does_its_work_in_this_one(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def no_thread(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("trio.to_thread.run_sync", no_thread)
    change(pool)
    await Committer(pool).sync()
    with killed(pool) as again:
        assert list(again.objects) == [1]
