"""The command that hunts for crashes that lose something, for as long as one likes.

``python -m vfsmap.testing.crash --seed 1 --minutes 60`` runs a row of workloads that depends on the
seed alone: every operation on every medium, every ordered pair of those that do something by
themselves on each kind of promise, and among the pairs triples and longer rows, of all operations,
that are drawn without end.  ``--only`` keeps to one of these; ``--only pairs`` comes to an end.
With ``--state FILE`` it goes on where it was stopped.  ``--replay NAME`` tries one crash again, by
the name that a failure was reported with.
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
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, Final, NamedTuple

import click

from vfsmap.testing.hunt import Hunter, Tally, parse_crash
from vfsmap.testing.workload import Workload, all_operations, file_operations

MEDIA: Final = ("store", "flush", "sync", "store-tiny", "flush-tiny", "sync-tiny", "hugetlb")
"""Those that the command tries; the others differ from them in nothing that matters here."""
PROMISES: Final = ("store", "sync", "flush")
"""The media that every pair is tried on: one that survives processes, two that survive power."""
ROWS: Final = ("all", "singles", "pairs", "triples")
ENDING: Final = ("singles", "pairs")
_REPORT_SECONDS: Final = 5.0
_DRAWN_BETWEEN: Final = 4
_EVERY: Final = {"pairs": 16}
"""Recovery is crashed for one in so many images; of pairs there are many."""


def workloads(seed: int, rows: str = "all") -> Iterator[Workload]:
    """Yield workloads, for ever unless ``rows`` are singles or pairs."""
    rng = random.Random(seed)
    if rows == "singles":
        return singles()
    if rows == "pairs":
        return pairs(rng)
    if rows == "triples":
        return _drawn(rng)
    return itertools.chain(singles(), _mixed(rng))


def singles() -> Iterator[Workload]:
    """Yield every operation by itself, on every medium."""
    for name in file_operations():
        for medium in MEDIA:
            yield Workload(medium, (name,))


def pairs(rng: random.Random) -> Iterator[Workload]:
    """Yield every operation behind every other and itself, one promise after the other."""
    names = all_operations()
    for medium in PROMISES:
        rows = list(itertools.product(names, names))
        rng.shuffle(rows)
        for row in rows:
            yield Workload(medium, row, first=1)


def _mixed(rng: random.Random) -> Iterator[Workload]:
    """Yield pairs, and a drawn row behind each, and then only those."""
    rows = list(pairs(rng))
    rng.shuffle(rows)
    drawn = _drawn(rng)
    for row in rows:
        yield row
        yield next(drawn)
    yield from drawn


def _drawn(rng: random.Random) -> Iterator[Workload]:
    """Yield triples for ever, and among them longer rows."""
    names = all_operations()
    while True:
        yield Workload(rng.choice(MEDIA), tuple(rng.choices(names, k=3)), first=2)
        if rng.randrange(_DRAWN_BETWEEN) == 0:
            count = rng.randrange(4, 40)
            yield Workload(rng.choice(MEDIA), (f"random:{rng.getrandbits(32)}:{count}",))


class Task(NamedTuple):
    """What all workers do together."""

    seed: int
    rows: str
    skip: int
    """How many workloads have been done before."""
    workers: int
    until: float


def _work(task: Task, worker: int, stop: Event, pipe: Connection) -> None:
    """Run every ``workers``-th workload, and send the tally after each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who sums up hears it, and stops us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    hunters: dict[str, tuple[Hunter, Tally]] = {}
    rows = workloads(task.seed, task.rows)
    mine = itertools.islice(rows, task.skip + worker, None, task.workers)
    for done, workload in enumerate(mine, 1):
        medium = workload.medium
        if medium not in hunters:
            tally = Tally()
            hunters[medium] = Hunter(medium, tally, every=_EVERY.get(task.rows, 4)), tally
        hunter, tally = hunters[medium]
        hunter.run(workload)
        pipe.send(("done", done, medium, tally))
        tally.failures = []
        if stop.is_set() or time.monotonic() >= task.until:
            break
    pipe.send(("seen", 0, "", {medium: hunter.seen for medium, (hunter, _) in hunters.items()}))


class Summary:
    """What all workers have tried, this time and before."""

    def __init__(self, task: Task, before: dict[str, Any]) -> None:
        self._task = task
        self._before = before
        self._total = ""
        if task.rows in ENDING:
            self._total = f" of {sum(1 for _ in workloads(task.seed, task.rows))}"
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

    @property
    def position(self) -> int:
        """How many workloads from the start are surely done."""
        least = min(self._done.get(worker, 0) for worker in range(self._task.workers))
        return self._task.skip + least * self._task.workers

    @property
    def images(self) -> int:
        """Distinct images judged; while workers run, those that two have found count twice."""
        now = sum(map(len, self._seen.values())) or sum(t.images for t in self._tallies.values())
        return int(self._before.get("images", 0)) + now

    def line(self) -> str:
        """Return one line about how it goes."""
        seconds = time.monotonic() - self._started
        now = self.images - int(self._before.get("images", 0))
        count = self._task.skip + sum(tally.workloads for tally in self._tallies.values())
        return (
            f"{seconds:6.0f} s  {count:6}{self._total} workloads  {self.images:8} images  "
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

    def state(self) -> dict[str, Any]:
        """Return what to go on from."""
        return {
            "seed": self._task.seed,
            "rows": self._task.rows,
            "position": self.position,
            "images": self.images,
            "failures": self.failures,
        }


def _run(task: Task, summary: Summary, state: Path | None) -> None:
    pipes: dict[Connection, int] = {}
    workers = []
    stop = multiprocessing.Event()
    for worker in range(task.workers):
        ours, theirs = multiprocessing.Pipe(duplex=False)
        arguments = (task, worker, stop, theirs)
        workers.append(multiprocessing.Process(target=_work, args=arguments, daemon=True))
        workers[-1].start()
        theirs.close()
        pipes[ours] = worker
    for _ in range(2):  # once interrupted, it waits for what is under way
        with suppress(KeyboardInterrupt):
            _listen(pipes, summary, lambda: _save(state, summary))
        stop.set()
    _save(state, summary)
    for process in workers:
        process.join()
    if died := [process.exitcode for process in workers if process.exitcode]:
        raise click.ClickException(
            f"{len(died)} of {len(workers)} workers died; their tracebacks stand above, and what "
            "was left for them was not tried"
        )


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


def _save(state: Path | None, summary: Summary) -> None:
    if state:
        state.write_text(json.dumps(summary.state()))


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
@click.option("--only", "rows", type=click.Choice(ROWS), default="all", help="Which workloads.")
@click.option(
    "--state",
    type=click.Path(path_type=Path),
    help="Go on from this file, and keep it.",
)
@click.option("--replay", metavar="NAME", help="Try one crash again.")
def main(
    seed: int, minutes: float, jobs: int, rows: str, state: Path | None, replay: str | None
) -> None:
    """Hunt for crashes that lose something."""
    if replay:
        sys.exit(_replay(replay))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # either ends it with a summary
    before: dict[str, Any] = {}
    if state and state.exists():
        before = json.loads(state.read_text())
        if (before["seed"], before.get("rows")) != (seed, rows):
            known = f"--seed {before['seed']} --only {before.get('rows')}"
            raise click.UsageError(f"{state} belongs to {known}")
    until = time.monotonic() + 60 * minutes
    task = Task(seed, rows, int(before.get("position", 0)), jobs, until)
    summary = Summary(task, before)
    _run(task, summary, state)
    for line in summary.table():
        click.echo(line)
    click.echo(summary.line())
    sys.exit(1 if summary.failures else 0)


if __name__ == "__main__":
    main()
