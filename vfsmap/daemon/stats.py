"""What the server has done so far: requests, calls, events; and how huge the files are."""

import time
from collections.abc import Callable
from typing import Any, Final

import trio

from vfsmap.fs import FileSystem
from vfsmap.fs.coverage import Coverage, counting
from vfsmap.tally import Tallies

_REST: Final = 20
"""Counting the files again and again takes at most one part in so many of the time."""
_REST_NS_MIN: Final = 500_000_000


class Statistics:
    """Counters, for those who ask; whoever counts adds to them in the loop's thread."""

    def __init__(self, fs: FileSystem, requests: Tallies | None = None) -> None:
        """Start counting; ``requests`` is what the mount counts in."""
        self.started_ns = time.time_ns()
        self.requests = Tallies() if requests is None else requests
        """By the name of what the kernel asked for."""
        self.calls = Tallies()
        """By the name of the daemon's method."""
        self.events: dict[str, int] = {}
        """How many of each kind."""
        self.leases: Callable[[], tuple[int, int]] = lambda: (0, 0)
        """Returns how many leases there are, and how many of them may write."""
        self.coverage: Coverage | None = None
        self.coverage_ns = 0
        """When files were counted last, nanoseconds since 1970."""
        self._fs = fs
        self._counted_ns = 0
        self._took_ns = 0

    def sample(self) -> dict[str, Any]:
        """Return everything as the wire has it; what is counted over all files as it was last."""
        pool = self._fs.pool
        leases, writable = self.leases()
        answer: dict[str, Any] = {
            "time_ns": time.time_ns(),
            "started_ns": self.started_ns,
            "size": pool.size,
            "free": pool.space.free_bytes,
            "inodes": self._fs.inode_count,
            "requests": self.requests.plain(),
            "calls": self.calls.plain(),
            "events": self.events,
            "leases": leases,
            "writable_leases": writable,
        }
        if self.coverage is not None:
            answer["coverage"] = {**self.coverage._asdict(), "time_ns": self.coverage_ns}
        return answer

    async def count(self) -> None:
        """Count all files anew, in slices, unless that was done a moment ago."""
        now = time.monotonic_ns()
        if now < self._counted_ns + max(_REST * self._took_ns, _REST_NS_MIN) and self._counted_ns:
            return
        self._counted_ns = now  # others who ask meanwhile get the last result
        steps = counting(self._fs)
        spent = 0
        while True:
            began = time.monotonic_ns()
            try:
                next(steps)
            except StopIteration as done:
                self.coverage, self.coverage_ns = done.value, time.time_ns()
                return
            finally:
                spent += time.monotonic_ns() - began
                self._took_ns = spent
            await trio.lowlevel.checkpoint()
