"""The command that hunts for crashes that lose something, for as long as one likes.

``python -m vfsmap.testing.crash --seed 1 --minutes 60`` runs a row of workloads that depends on the
seed alone: every operation, every pair of operations and endless rows of drawn ones, on every
medium.  With ``--state FILE`` it goes on where it was stopped.  ``--replay NAME`` tries one crash
again, by the name that a failure was reported with.
"""

import itertools
import json
import multiprocessing
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Final

import click

from vfsmap.testing.hunt import Hunter, Tally, parse_crash
from vfsmap.testing.workload import Workload, file_operations

MEDIA: Final = ("store", "flush", "sync", "store-tiny", "flush-tiny", "sync-tiny", "hugetlb")
"""Those that the command tries; the others differ from them in nothing that matters here."""
_REPORT_SECONDS: Final = 5.0
_DRAWN_BETWEEN: Final = 4


def workloads(seed: int) -> Iterator[Workload]:
    """Yield workloads for ever: the single operations, then pairs and triples among drawn rows."""
    rng = random.Random(seed)
    names = file_operations()
    for name in names:
        for medium in MEDIA:
            yield Workload(medium, (name,))
    pairs = list(itertools.product(names, names))
    rng.shuffle(pairs)
    for pair in pairs:
        yield Workload(rng.choice(MEDIA), pair, first=1)
        yield from _drawn(rng, names)
    while True:
        yield from _drawn(rng, names)


def _drawn(rng: random.Random, names: list[str]) -> Iterator[Workload]:
    yield Workload(rng.choice(MEDIA), tuple(rng.choices(names, k=3)), first=2)
    if rng.randrange(_DRAWN_BETWEEN) == 0:
        count = rng.randrange(4, 40)
        yield Workload(rng.choice(MEDIA), (f"random:{rng.getrandbits(32)}:{count}",))


def _work(seed: int, skip: int, worker: int, workers: int, until: float, pipe: Connection) -> None:
    """Run every ``workers``-th workload, and send the tally after each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who sums up hears it, and ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    hunters: dict[str, tuple[Hunter, Tally]] = {}
    mine = itertools.islice(workloads(seed), skip + worker, None, workers)
    for done, workload in enumerate(mine, 1):
        medium = workload.medium
        if medium not in hunters:
            tally = Tally()
            hunters[medium] = Hunter(medium, tally), tally
        hunter, tally = hunters[medium]
        hunter.run(workload)
        pipe.send(("done", done, medium, tally))
        tally.failures = []
        if time.monotonic() >= until:
            break
    pipe.send(("seen", 0, "", {medium: hunter.seen for medium, (hunter, _) in hunters.items()}))


class Summary:
    """What all workers have tried, this time and before."""

    def __init__(self, seed: int, before: dict[str, Any]) -> None:
        self.seed = seed
        self._before = before
        self._tallies: dict[tuple[int, str], Tally] = {}
        self._done: dict[int, int] = {}
        self._seen: dict[str, set[tuple[int, int]]] = {}
        self.failures: list[str] = list(before.get("failures", []))
        self._started = time.monotonic()

    def take(self, worker: int, message: tuple[str, int, str, Any]) -> list[str]:
        """Take a worker's message in, and return the failures that it tells of."""
        kind, done, medium, content = message
        if kind == "seen":
            for name, seen in content.items():
                self._seen.setdefault(name, set()).update(seen)
            return []
        self._done[worker] = done
        self._tallies[worker, medium] = content
        failures = list(map(str, content.failures))
        self.failures += failures
        return failures

    def position(self, workers: int) -> int:
        """Return how many workloads from the start are surely done."""
        least = min((self._done.get(worker, 0) for worker in range(workers)), default=0)
        return int(self._before.get("position", 0)) + least * workers

    @property
    def images(self) -> int:
        """Distinct images judged; while workers run, those that two have found count twice."""
        now = sum(map(len, self._seen.values())) or sum(t.images for t in self._tallies.values())
        return int(self._before.get("images", 0)) + now

    def line(self) -> str:
        """Return one line about how it goes."""
        seconds = time.monotonic() - self._started
        now = self.images - int(self._before.get("images", 0))
        count = sum(tally.workloads for tally in self._tallies.values())
        return (
            f"{seconds:6.0f} s  {count:6} workloads  {self.images:8} images  "
            f"{now / max(seconds, 1):5.0f}/s  {len(self.failures)} failures"
        )

    def table(self) -> Iterator[str]:
        """Yield lines that sum it up by medium."""
        yield f"{'medium':<12}{'workloads':>10}{'images':>10}{'in recovery':>13}"
        for medium in sorted({medium for _, medium in self._tallies}):
            mine = [tally for (_, name), tally in self._tallies.items() if name == medium]
            workloads_run = sum(tally.workloads for tally in mine)
            images = len(self._seen.get(medium, ())) or sum(tally.images for tally in mine)
            second = sum(tally.second for tally in mine)
            yield f"{medium:<12}{workloads_run:>10}{images:>10}{second:>13}"

    def state(self, workers: int) -> dict[str, Any]:
        """Return what to go on from."""
        return {
            "seed": self.seed,
            "position": self.position(workers),
            "images": self.images,
            "failures": self.failures,
        }


def _run(
    seed: int, minutes: float, workers: int, before: dict[str, Any], state: Path | None
) -> Summary:
    until = time.monotonic() + 60 * minutes
    summary = Summary(seed, before)
    skip = int(before.get("position", 0))
    pipes: dict[Connection, int] = {}
    for worker in range(workers):
        ours, theirs = multiprocessing.Pipe(duplex=False)
        arguments = (seed, skip, worker, workers, until, theirs)
        multiprocessing.Process(target=_work, args=arguments, daemon=True).start()
        theirs.close()
        pipes[ours] = worker
    with suppress(KeyboardInterrupt):
        _listen(pipes, summary, lambda: _save(state, summary, workers))
    _save(state, summary, workers)
    return summary


def _listen(pipes: dict[Connection, int], summary: Summary, save: Callable[[], None]) -> None:
    """Take in what workers tell, until all have ended."""
    reported = time.monotonic()
    while pipes:
        for ready in wait(list(pipes), timeout=_REPORT_SECONDS):
            assert isinstance(ready, Connection)
            try:
                for failure in summary.take(pipes[ready], ready.recv()):
                    click.echo(failure)
            except EOFError:
                del pipes[ready]
        if time.monotonic() - reported >= _REPORT_SECONDS:
            reported = time.monotonic()
            click.echo(summary.line())
            save()


def _save(state: Path | None, summary: Summary, workers: int) -> None:
    if state:
        state.write_text(json.dumps(summary.state(workers)))


def _replay(name: str) -> int:
    crash = parse_crash(name)
    tally = Tally()
    Hunter(crash.workload.medium, tally, every=1).run(crash.workload, only=crash)
    for failure in tally.failures:
        click.echo(str(failure))
    if not tally.images:
        click.echo(f"{name}: the workload has no such crash", err=True)
        return 2
    if not tally.failures:
        click.echo(f"{name}: nothing is lost")
    return 1 if tally.failures else 0


@click.command()
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--minutes", type=float, default=10.0, show_default=True)
@click.option("--jobs", type=int, default=2, show_default=True, help="Processes to run.")
@click.option(
    "--state",
    type=click.Path(path_type=Path),
    help="Go on from this file, and keep it.",
)
@click.option("--replay", metavar="NAME", help="Try one crash again.")
def main(seed: int, minutes: float, jobs: int, state: Path | None, replay: str | None) -> None:
    """Hunt for crashes that lose something."""
    if replay:
        sys.exit(_replay(replay))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # either ends it with a summary
    before: dict[str, Any] = {}
    if state and state.exists():
        before = json.loads(state.read_text())
        if before["seed"] != seed:
            raise click.UsageError(f"{state} belongs to --seed {before['seed']}")
    summary = _run(seed, minutes, jobs, before, state)
    for line in summary.table():
        click.echo(line)
    click.echo(summary.line())
    sys.exit(1 if summary.failures else 0)


if __name__ == "__main__":
    main()
