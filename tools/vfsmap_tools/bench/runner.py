"""Measure peers in turn.

A machine's speed changes from minute to minute, so peers are never measured one after the other:
every round measures each of them once, and each round starts with another one.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Final, Generic, NamedTuple, TypeVar

from vfsmap_fuse.poll import LINGER
from vfsmap_tools.bench.results import Curve, Rates, Result

P = TypeVar("P")
_QUANTILES: Final = (0.5, 0.9, 0.99, 0.999)
_POINTS: Final = 60


class Measure(NamedTuple, Generic[P]):
    """Something to measure: ``run`` is handed a peer and returns a rate, larger is better."""

    name: str
    unit: str
    run: Callable[[P], float]


class Goal(NamedTuple):
    """What is promised: the first peer's rate is at least ``ratio`` times that of ``peer``."""

    measure: str
    peer: str
    ratio: float


_PAUSE: Final = 2 * LINGER
"""Seconds before each measurement, so that no peer has a part in how a mount before it keeps
processors awake."""


def alternate(measures: Sequence[Measure[P]], peers: dict[str, P], rounds: int) -> list[Rates]:
    """Return the rates of ``rounds`` rounds, each peer measured once in each."""
    found = [Rates(each.name, each.unit, {name: [] for name in peers}) for each in measures]
    order = list(peers.items())
    for number in range(rounds):
        turn = number % len(order)
        for measure, rates in zip(measures, found, strict=True):
            for name, peer in order[turn:] + order[:turn]:
                time.sleep(_PAUSE)
                rates.rounds[name].append(round(measure.run(peer), 4))
    return found


def judge(result: Result, goals: Sequence[Goal]) -> None:
    """Hold the rates of a result against goals whose measure and peer took part."""
    rates = {each.measure: each for each in result.rates}
    for measure, peer, ratio in goals:
        if measure in rates and peer in rates[measure].rounds:
            what = f"{measure}: times as fast as {peer}"
            result.promise(what, rates[measure].ratio(peer), ratio)


def timed(action: Callable[[], object], count: int) -> list[float]:
    """Return the microseconds that each of ``count`` calls took."""
    clock = time.perf_counter_ns
    spent = []
    for _ in range(count):
        began = clock()
        action()
        spent.append((clock() - began) / 1e3)
    return spent


def distribution(label: str, samples: Sequence[float]) -> Curve:
    """Return a curve that tells for each duration what share of the samples was shorter."""
    ordered = sorted(samples)
    # finer towards the slow end, where it matters
    shares = [1 - 10 ** (-3 * n / _POINTS) for n in range(_POINTS + 1)]
    values = [ordered[min(int(share * len(ordered)), len(ordered) - 1)] for share in shares]
    return Curve(label, [round(v, 2) for v in values], [round(100 * s, 3) for s in shares])


def quantiles(samples: Sequence[float]) -> list[float]:
    """Return median, 90th, 99th and 99.9th percentile."""
    ordered = sorted(samples)
    return [round(ordered[min(int(q * len(ordered)), len(ordered) - 1)], 1) for q in _QUANTILES]


def median_of(action: Callable[[], float], rounds: int) -> float:
    """Return the middle one of what ``rounds`` calls return."""
    return statistics.median(action() for _ in range(rounds))
