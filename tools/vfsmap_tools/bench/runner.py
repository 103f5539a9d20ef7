"""Measure peers in turn, compare their medians, and hold the ratios against goals.

A machine's speed changes from minute to minute, so peers are never measured one after the other:
every round measures each of them once, and each round starts with another one.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

from rich.console import Console
from rich.table import Table

P = TypeVar("P")


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


class Outcome(NamedTuple):
    """What was measured for a goal."""

    goal: Goal
    ratio: float

    @property
    def met(self) -> bool:
        """Tell whether the promise is kept."""
        return self.ratio >= self.goal.ratio


class Rates:
    """The rates of every measure and peer, one for each round."""

    def __init__(self, measures: Sequence[Measure[P]], peers: Sequence[str]) -> None:
        self.units = {measure.name: measure.unit for measure in measures}
        self.peers = list(peers)
        self.rounds: dict[tuple[str, str], list[float]] = {
            (name, peer): [] for name in self.units for peer in peers
        }

    def median(self, measure: str, peer: str) -> float:
        """Return the middle rate of all rounds."""
        return statistics.median(self.rounds[measure, peer])

    def ratio(self, measure: str, peer: str) -> float:
        """Return the first peer's median over that of ``peer``."""
        return self.median(measure, self.peers[0]) / self.median(measure, peer)

    def outcomes(self, goals: Sequence[Goal]) -> list[Outcome]:
        """Return what was measured for each goal whose measure and peer took part."""
        return [
            Outcome(goal, self.ratio(goal.measure, goal.peer))
            for goal in goals
            if (goal.measure, goal.peer) in self.rounds
        ]


def alternate(measures: Sequence[Measure[P]], peers: dict[str, P], rounds: int) -> Rates:
    """Return the rates of ``rounds`` rounds, each peer measured once in each."""
    rates = Rates(measures, list(peers))
    order = list(peers.items())
    for number in range(rounds):
        turn = number % len(order)
        for measure in measures:
            for name, peer in order[turn:] + order[:turn]:
                rates.rounds[measure.name, name].append(measure.run(peer))
    return rates


def report(rates: Rates, goals: Sequence[Goal], *, as_json: bool) -> bool:
    """Print the medians and the ratios; return whether every goal is met."""
    outcomes = rates.outcomes(goals)
    if as_json:
        print(json.dumps(_plain(rates, outcomes), indent=2))
    else:
        Console().print(_table(rates, outcomes))
    return all(outcome.met for outcome in outcomes)


def _plain(rates: Rates, outcomes: Sequence[Outcome]) -> dict[str, object]:
    medians = {
        name: {peer: round(rates.median(name, peer), 1) for peer in rates.peers} | {"unit": unit}
        for name, unit in rates.units.items()
    }
    compared = [
        {**outcome.goal._asdict(), "measured": round(outcome.ratio, 2), "met": outcome.met}
        for outcome in outcomes
    ]
    return {"medians": medians, "goals": compared}


def _table(rates: Rates, outcomes: Sequence[Outcome]) -> Table:
    table = Table("measure", "unit", *rates.peers, "goals")
    for name, unit in rates.units.items():
        cells = [f"{rates.median(name, peer):,.0f}" for peer in rates.peers]
        table.add_row(name, unit, *cells, "\n".join(_verdicts(name, outcomes)))
    return table


def _verdicts(name: str, outcomes: Sequence[Outcome]) -> list[str]:
    return [
        f"[{'green' if outcome.met else 'red'}]{outcome.ratio:.2f}[/] of {outcome.goal.peer}, "
        f"goal {outcome.goal.ratio}"
        for outcome in outcomes
        if outcome.goal.measure == name
    ]
