"""The hunt for a crash that loses something: run a workload, build what crashes leave, judge that.

A crash is named by its workload, the number of the event it comes in front of, and a choice:
``flush/rename@17:m5``.  ``k`` is the death of the process right there, ``t9`` its death in the
middle of a store, drawn with seed 9; the other choices are those of
:mod:`vfsmap.testing.power`.  ``+4:a`` behind it names a crash during the recovery from the first.
"""

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, NamedTuple
from unittest import mock

from vfsmap.errors import Invalid
from vfsmap.fs import FileSystem
from vfsmap.pmem import Commit as CommitKind
from vfsmap.pool import Commit as Group
from vfsmap.pool import Pool
from vfsmap.pool.layout import BLOCK
from vfsmap.testing.oracle import Expectation, Judge, Snapshot, snapshot, used_runs
from vfsmap.testing.power import WORD, Digest, Piece, PowerModel, Ranges, pieces_of, tear
from vfsmap.testing.recording import (
    MEDIA,
    PAGE,
    Event,
    Fdatasync,
    Fence,
    Flush,
    Mark,
    Memory,
    Msync,
    Punch,
    RecordingPmem,
    Resize,
    Store,
)
from vfsmap.testing.workload import (
    POOL_SIZE,
    TINY,
    Context,
    Workload,
    base,
    deterministic,
    parse,
    perform,
    steps,
)

_BARRIERS: Final = (Fence, Msync, Fdatasync)
_STEPS: Final = (Store, Flush, Fence, Msync, Fdatasync, Punch, Resize)
OPERATION, DONE, BEGUN, COMMITTED = "operation", "done", "begun", "committed"
SYNCED = "synced"
"""All that was done is durable: an operation that promises this has returned."""


class Crash(NamedTuple):
    """One crash, and perhaps another one during the recovery from it."""

    workload: Workload
    event: int
    choice: str
    second_event: int = 0
    second_choice: str = ""

    def __str__(self) -> str:
        """Return its name."""
        second = f"+{self.second_event}:{self.second_choice}" if self.second_choice else ""
        return f"{self.workload}@{self.event}:{self.choice}{second}"


def parse_crash(name: str) -> Crash:
    """Return the crash of a name.

    Raises:
        Invalid: it is not the name of a crash.
        NotFound: there is no such workload.
    """
    workload, _, place = name.partition("@")
    first, _, second = place.partition("+")
    try:
        event, choice = first.split(":")
        second_event, second_choice = second.split(":") if second else ("0", "")
        return Crash(parse(workload), int(event), choice, int(second_event), second_choice)
    except ValueError as exc:
        raise Invalid(f"{name!r} does not name a crash; one is flush/rename@17:m5") from exc


class Failure(NamedTuple):
    """A crash that lost something."""

    crash: Crash
    problems: list[str]

    def __str__(self) -> str:
        """Return it for people."""
        return "\n    ".join((str(self.crash), *self.problems[:5]))


@dataclass
class Tally:
    """What was tried so far."""

    workloads: int = 0
    images: int = 0
    """Distinct images that were judged."""
    second: int = 0
    """Those of them that a crash during recovery left."""
    failures: list[Failure] = field(default_factory=list)


class Recording(NamedTuple):
    """A workload's events, and the states it went through."""

    events: list[Event]
    snapshots: list[Snapshot]
    relevant: list[Ranges]
    """For each operation, the pool bytes that somebody may read before or after it."""


def record(workload: Workload, memory: Memory) -> Recording:
    """Run a workload once; the memory is as before when it returns."""
    mark = memory.mark()
    _, backed = base(workload.medium)
    pmem = RecordingPmem(memory, POOL_SIZE, MEDIA[workload.kind], backed=set(backed))
    fs = FileSystem(Pool(pmem))
    context = Context(fs, random.Random())
    snapshots, used = [snapshot(fs)], [_used(fs)]
    relevant = [Ranges(used[0])]
    with _watched(fs.pool, pmem):
        for number, name in enumerate(steps(workload), 1):
            context.rng = random.Random(f"{workload}:{number}")
            pmem.note(OPERATION, number)
            perform(context, name)
            pmem.note(DONE, number)
            closed = name == "close"
            if closed or name == "sync":
                pmem.note(SYNCED, number)
            snapshots.append(snapshots[-1] if closed else snapshot(fs))
            used.append(used[-1] if closed else _used(fs))
            relevant.append(Ranges(used[-2] + used[-1]))
    memory.rollback(mark)
    return Recording(pmem.events, snapshots, relevant)


def _used(fs: FileSystem) -> list[tuple[int, int]]:
    halves = [(place.start, place.length) for place in fs.pool.journal.halves]
    return [(0, 2 * BLOCK), *halves, *used_runs(fs.pool.objects)]


@contextmanager
def _watched(pool: Pool, pmem: RecordingPmem) -> Iterator[None]:
    """Note when groups are begun and when they are durable."""
    journal = pool.journal
    begin = journal.begin_commit
    numbers = itertools.count(1)

    def begin_commit() -> Group:
        number = next(numbers)
        pmem.note(BEGUN, number)
        commit = begin()
        run = commit.run

        def watched_run() -> None:
            run()
            pmem.note(COMMITTED, number)

        commit.run = watched_run  # type: ignore[method-assign]  # it stands in for the real one
        return commit

    with mock.patch.object(journal, "begin_commit", begin_commit):
        yield


class _Progress:
    """Which states a crash may leave, as the marks go by."""

    def __init__(self, recording: Recording, *, grouped: bool) -> None:
        self._snapshots = recording.snapshots
        self._keys = [snap.key for snap in recording.snapshots]
        self._grouped = grouped
        self._done = 0
        self.operation = 0
        self._groups: dict[int, frozenset[int]] = {}
        self._durable = frozenset({0})

    def feed(self, mark: Mark) -> None:
        if mark.what == OPERATION:
            self.operation = mark.value
        elif mark.what == DONE:
            self._done = mark.value
        elif mark.what == BEGUN:
            self._groups[mark.value] = self._now()
        elif mark.what == SYNCED:
            self._durable = frozenset({mark.value})
            self._groups.clear()
        elif mark.value in self._groups:
            self._durable = self._groups[mark.value]
            self._groups = {n: g for n, g in self._groups.items() if n > mark.value}

    def _now(self) -> frozenset[int]:
        return frozenset({self._done, self.operation})

    def expectation(self) -> Expectation:
        candidates = self._now()
        if self._grouped:
            candidates = self._durable.union(*self._groups.values())
        key = hash((frozenset(self._keys[n] for n in candidates), self._keys[self.operation]))
        return Expectation(self._snapshots, candidates, self.operation, key)


class _Scene(NamedTuple):
    """Where and when a crash happens."""

    crash: Crash
    expected: Expectation
    relevant: Ranges


class Hunter:
    """Runs workloads on one medium, and judges what crashes leave of them."""

    def __init__(
        self,
        medium: str,
        tally: Tally,
        *,
        samples: int = 4,
        second: int = 2,
        every: int = 4,
        most_failures: int = 0,
    ) -> None:
        """Get ready.

        Args:
            medium: one of those of :mod:`vfsmap.testing.workload`.
            tally: where to count.
            samples: how many states to draw where there are too many to try all.
            second: the same for crashes during recovery; 0 for none.
            every: try such crashes for one in so many images.
            most_failures: leave a workload when there are so many; 0 for never.
        """
        content, _ = base(medium)
        self.seen: set[tuple[int, int]] = set()
        """The images that were judged, by digest and size."""
        self._judged: set[tuple[int, int, int]] = set()
        """The same with what was expected of them."""
        self._recoveries: dict[tuple[int, int, int], list[Event]] = {}
        """What recovery does to the images that this workload's deaths leave."""
        self._every = every
        self._tally = tally
        self._samples = samples
        self._most_failures = most_failures
        self._second = second
        self._kind = MEDIA[medium.removesuffix(TINY)]
        self._judges = Judge(self._kind)
        self._powered = self._kind.commit is not CommitKind.STORE
        self._process = Digest(Memory(content))
        """What processes see."""
        self._media = Digest(Memory(content))
        """What is durable."""
        self._only: Crash | None = None

    def run(self, workload: Workload, *, only: Crash | None = None) -> None:
        """Try the crashes of a workload, or one."""
        self._only = only
        self._recoveries.clear()
        with deterministic(tiny=workload.tiny):
            recording = record(workload, self._process.memory)
            with self._process.kept(), self._media.kept():
                self._crashes(workload, recording)
        self._tally.workloads += 1

    def _crashes(self, workload: Workload, recording: Recording) -> None:
        progress = _Progress(recording, grouped=self._kind.commit is CommitKind.SYNC)
        size = POOL_SIZE
        model = PowerModel(self._media, POOL_SIZE, self._kind.commit)
        for number, event in enumerate(recording.events):
            if 0 < self._most_failures <= len(self._tally.failures):
                return
            if isinstance(event, Mark):
                progress.feed(event)
            if progress.operation > workload.first:
                crash = Crash(workload, number, "")
                relevant = recording.relevant[progress.operation]
                scene = _Scene(crash, progress.expectation(), relevant)
                if isinstance(event, _STEPS if self._powered else Store | Punch):
                    self._deaths(scene, event, size, model)
                if self._powered and _is_moment(event):
                    self._cuts(scene, model)
            self._process.write(pieces_of(event))
            size = event.size if isinstance(event, Resize) else size
            model.feed(event)

    # the death of a process

    def _deaths(self, scene: _Scene, event: Event, size: int, model: PowerModel) -> None:
        for choice, pieces in self._deaths_at(scene, event):
            with self._process.kept():
                self._process.write(pieces)
                recovery = self._judge(scene, choice, self._process, size)
                if not self._powered:
                    self._second_deaths(scene, choice, recovery, size)
            if self._powered and recovery:
                with self._media.kept():
                    again = model.copy()
                    for offset, data in pieces:
                        again.feed(Store(offset, data))
                    self._second_cuts(scene, choice, recovery, again)

    def _deaths_at(self, scene: _Scene, event: Event) -> Iterator[tuple[str, list[Piece]]]:
        """Yield the deaths in front of an event, and if it is a store, in the middle of it."""
        names = ["k"]
        pieces = pieces_of(event)
        for offset, data in pieces:
            if not scene.relevant.overlap(offset, len(data)):
                return
            names += [f"t{n}" for n in range(1, 3) if len(data) > WORD]
        for choice in self._wanted(scene, names, "kt"):
            torn: list[Piece] = []
            if choice != "k":
                grain = PAGE if isinstance(event, Punch) else WORD
                torn = list(tear(pieces[0], grain, random.Random(choice)))
            yield choice, torn

    def _second_deaths(self, scene: _Scene, choice: str, recovery: list[Event], size: int) -> None:
        crash = scene.crash._replace(choice=choice)
        for number, event in enumerate(recovery):
            if isinstance(event, Store | Punch) and self._second:
                second = scene._replace(crash=crash._replace(second_event=number))
                for second_choice, pieces in self._deaths_at(second, event):
                    with self._process.kept():
                        self._process.write(pieces)
                        self._judge(second, second_choice, self._process, size)
            self._process.write(pieces_of(event))

    # power cuts

    def _cuts(self, scene: _Scene, model: PowerModel) -> None:
        parts = model.parts(scene.relevant)
        rng = random.Random(f"{scene.crash.event}")
        for choice in self._wanted(scene, model.choices(parts, self._samples, rng), "namr"):
            pieces, size = model.state(parts, choice)
            with self._media.kept():
                self._media.write(pieces)
                recovery = self._judge(scene, choice, self._media, size)
                if recovery:
                    again = PowerModel(self._media, size, self._kind.commit)
                    self._second_cuts(scene, choice, recovery, again)

    def _second_cuts(
        self, scene: _Scene, choice: str, recovery: list[Event], model: PowerModel
    ) -> None:
        crash = scene.crash._replace(choice=choice)
        for number, event in enumerate(recovery):
            if isinstance(event, _BARRIERS) and self._second:
                second = scene._replace(crash=crash._replace(second_event=number))
                parts = model.parts(scene.relevant)
                rng = random.Random(f"{crash.event}:{number}")
                choices = model.choices(parts, self._second, rng)
                for second_choice in self._wanted(second, choices, "namr"):
                    pieces, size = model.state(parts, second_choice)
                    with self._media.kept():
                        self._media.write(pieces)
                        self._judge(second, second_choice, self._media, size)
            model.feed(event)

    # judging

    def _wanted(self, scene: _Scene, choices: list[str], kinds: str) -> list[str]:
        """Return the choices to try here: all, or when one crash is to be replayed, that one."""
        only, crash = self._only, scene.crash
        if only is None:
            return choices
        wanted = only.second_choice if crash.choice else only.choice
        here = (only.second_event if crash.choice else 0) == crash.second_event
        return [wanted] if only.event == crash.event and here and wanted[:1] in kinds else []

    def _judge(self, scene: _Scene, choice: str, image: Digest, size: int) -> list[Event]:
        """Judge an image that is new; return what recovery does to it, if a crash is to hit that.

        An image of a process's death may come again, with other parts of it durable.
        """
        key = image.value, size, scene.expected.key
        second = bool(scene.crash.choice)
        if key in self._judged:  # and nothing else is expected of it now
            return self._recoveries.get(key, []) if choice[0] in "kt" and not second else []
        self._judged.add(key)
        if key[:2] not in self.seen:
            self.seen.add(key[:2])
            self._tally.images += 1
            self._tally.second += second
        with image.kept():
            verdict = self._judges.judge(image.memory, size, scene.expected)
        if verdict.problems:
            first, then = (scene.crash.choice, choice) if second else (choice, "")
            named = scene.crash._replace(choice=first, second_choice=then)
            self._tally.failures.append(Failure(named, verdict.problems))
        elif not second and self._hit(key):
            if self._powered and choice[0] in "kt":
                self._recoveries[key] = verdict.recovery
            return verdict.recovery
        return []

    def _hit(self, key: tuple[int, int, int]) -> bool:
        """Tell whether crashes are to be tried during the recovery of an image."""
        if self._only:
            return bool(self._only.second_choice)
        return self._second > 0 and key[0] % self._every == 0


def _is_moment(event: Event) -> bool:
    """Tell whether power cuts are tried in front of an event: nothing more can be lost later."""
    return isinstance(event, _BARRIERS) or (
        isinstance(event, Mark) and event.what in (DONE, SYNCED)
    )
