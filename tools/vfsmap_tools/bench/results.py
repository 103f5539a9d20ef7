"""What a scenario has found: rates of peers, figures, curves, and promises kept or broken.

A result is one JSON document; the page is made from such documents and from nothing else.
"""

import os
import platform
import statistics
import time
from pathlib import Path
from typing import Final

import msgspec

KIND: Final = "vfsmap benchmark"


class Rates(msgspec.Struct):
    """One measure of all peers, which took turns: larger is better."""

    measure: str
    unit: str
    rounds: dict[str, list[float]]
    """For each peer the rate of each round; the first peer is the one to be judged."""

    def median(self, peer: str) -> float:
        """Return the middle rate of a peer's rounds."""
        return statistics.median(self.rounds[peer])

    def spread(self, peer: str) -> tuple[float, float]:
        """Return the quartiles of a peer's rounds."""
        rounds = self.rounds[peer]
        if len(rounds) < 2:
            return rounds[0], rounds[0]
        low, _, high = statistics.quantiles(rounds, n=4, method="inclusive")
        return low, high

    def ratio(self, peer: str) -> float:
        """Return the first peer's median over that of ``peer``."""
        return self.median(next(iter(self.rounds))) / self.median(peer)


class Verdict(msgspec.Struct):
    """A promise, and what was measured."""

    what: str
    measured: float
    bound: float
    at_most: bool = False
    """Whether the bound is the most that is allowed, and not the least."""

    @property
    def met(self) -> bool:
        """Tell whether the promise is kept."""
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound


class Grid(msgspec.Struct):
    """Figures in rows and columns."""

    title: str
    columns: list[str]
    rows: list[list[str | int | float]]


class Curve(msgspec.Struct):
    """Points to be joined by a line."""

    label: str
    x: list[float]
    y: list[float]


class Plot(msgspec.Struct):
    """Curves over one pair of axes."""

    name: str
    """Part of a file's name."""
    title: str
    x: str
    y: str
    curves: list[Curve]
    log_x: bool = False
    log_y: bool = False
    bytes_x: bool = False
    """Whether the marks of the axis are sizes, as 1M and 1G."""


class Result(msgspec.Struct):
    """Everything that one scenario has found."""

    scenario: str
    title: str
    about: str
    """What was done, for the page's readers."""
    rates: list[Rates] = []
    grids: list[Grid] = []
    plots: list[Plot] = []
    verdicts: list[Verdict] = []
    left_out: list[str] = []
    """What could not be measured here, and why."""
    quick: bool = False
    seconds: float = 0.0
    when: str = ""
    machine: dict[str, str] = {}

    @property
    def met(self) -> bool:
        """Tell whether all promises are kept."""
        return all(verdict.met for verdict in self.verdicts)

    def promise(self, what: str, measured: float, bound: float, *, at_most: bool = False) -> None:
        """Hold a figure against what is promised."""
        self.verdicts.append(Verdict(what, round(measured, 4), bound, at_most))

    def pictures(self) -> list[tuple[str, str]]:
        """Return title and file name of each picture of it; the bars of the rates come first."""
        bars = (f"{self.title}: medians, and quartiles as whiskers", f"{self.scenario}.svg")
        curves = [(plot.title, f"{self.scenario}-{plot.name}.svg") for plot in self.plots]
        return [bars, *curves] if self.rates else curves

    def save(self, directory: Path) -> Path:
        """Write the document and return where it is."""
        path = directory / f"{self.scenario}.json"
        plain = {"kind": KIND, **msgspec.to_builtins(self)}
        for verdict, document in zip(self.verdicts, plain["verdicts"], strict=True):
            document["met"] = verdict.met
        path.write_bytes(msgspec.json.format(msgspec.json.encode(plain), indent=1) + b"\n")
        return path


def load(path: Path) -> Result | None:
    """Return the result that a document holds; None: it holds something else.

    Raises:
        msgspec.MsgspecError: it is not JSON.
    """
    plain = msgspec.json.decode(path.read_bytes())
    if not isinstance(plain, dict) or plain.get("kind") != KIND:
        return None
    return msgspec.convert(plain, Result)


def machine() -> dict[str, str]:
    """Return what there is to know of the machine."""
    facts = {"kernel": platform.release(), "python": platform.python_version()}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            facts["processor"] = line.partition(":")[2].strip()
            break
    facts["cores"] = str(len(os.sched_getaffinity(0)))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    facts["memory"] = f"{memory / (1 << 30):.0f} GiB"
    return facts


def now() -> str:
    """Return the time, as documents have it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
