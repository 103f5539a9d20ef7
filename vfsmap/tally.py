"""Counting what a server does: how often, how long, how often in vain.

A handler is counted by adding to two plain integers and one element of a list, so that counting
costs next to nothing beside the handler itself; whoever wants to know adds up and divides.
"""

import time
from typing import Final

clock: Final = time.perf_counter_ns
_BUCKETS: Final = 64


class Tally:
    """How often something was done, and how long it took."""

    __slots__ = ("errors", "latency", "moved", "time_ns")

    def __init__(self) -> None:
        self.errors = 0
        self.moved = 0
        """Bytes read or written by it."""
        self.time_ns = 0
        """All durations together."""
        self.latency = [0] * _BUCKETS
        """Counts by duration: element n has those of less than 2**n ns that n - 1 has not."""

    @property
    def count(self) -> int:
        """How often it was done, errors included."""
        return sum(self.latency)

    def note(self, spent_ns: int) -> None:
        """Count one that took so long."""
        self.time_ns += spent_ns
        self.latency[spent_ns.bit_length()] += 1

    def plain(self, name: str) -> dict[str, object]:
        """Return it as the wire has it, without the empty end of the counts by duration."""
        latency = self.latency
        last = max((n for n in range(_BUCKETS) if latency[n]), default=-1)
        return {
            "name": name,
            "count": self.count,
            "errors": self.errors,
            "bytes": self.moved,
            "time_ns": self.time_ns,
            "latency": latency[: last + 1],
        }


class Tallies(dict[str, Tally]):
    """A tally for each name, made when it is first asked for."""

    def __missing__(self, name: str) -> Tally:
        """Make a tally."""
        made = self[name] = Tally()
        return made

    def plain(self) -> list[dict[str, object]]:
        """Return them as the wire has them, by name."""
        return [self[name].plain(name) for name in sorted(self)]


def quantile(latency: list[int], share: float) -> float:
    """Return the duration, in ns, that so large a share of counted ones stays below.

    Inside a bucket durations are taken to be spread evenly, so the error is less than its width.
    """
    left = share * sum(latency)
    if not left:
        return 0.0
    for n, count in enumerate(latency):
        if count and left <= count:
            low = 1 << n >> 1
            return low + ((1 << n) - low) * left / count
        left -= count
    return float(1 << len(latency))
