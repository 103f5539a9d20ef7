"""Group commits for both doors: one at a time, shared by all who wait."""

import logging

import trio

from vfsmap.errors import VfsmapError
from vfsmap.pool import Pool
from vfsmap.pool.journal import Commit

log = logging.getLogger("vfsmap")
INTERVAL = 5.0
"""Seconds after which a change is durable on a page-cache medium even if nobody asks."""


class Committer:
    """Makes a pool durable without keeping the loop waiting."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._lock = trio.Lock()
        self._asked = 0
        self._done = 0

    async def sync(self) -> None:
        """Return when everything done before the call is as durable as the medium promises.

        Raises:
            MediumError: the medium refused; the pool is read-only from now on.
        """
        self._asked += 1
        ticket = self._asked
        async with self._lock:
            if self._done >= ticket:  # a commit that began after we asked has done it
                return
            covered = self._asked
            commit = self._pool.begin_commit()
            try:
                if self._pool.grouped:
                    await _run_elsewhere(commit)
                else:
                    commit.run()
            finally:
                commit.finish()
            self._done = covered

    async def run(self) -> None:
        """Commit every few seconds what has changed, on media that commit in groups."""
        while self._pool.grouped and self._pool.failed is None:
            await trio.sleep(INTERVAL)
            if self._pool.journal.pending:
                try:
                    await self.sync()
                except VfsmapError as exc:
                    log.error("the pool is read-only from now on: %s", exc)


async def _run_elsewhere(commit: Commit) -> None:
    try:
        await trio.to_thread.run_sync(commit.run)
    except RuntimeError:  # there is no memory for another thread
        commit.run()
