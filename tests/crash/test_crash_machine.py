"""A file system beside dictionaries, crashed in and behind any of its steps, and opened again."""

import random
from collections.abc import Callable
from contextlib import ExitStack
from typing import Final, TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vfsmap.errors import NoSpace, VfsmapError
from vfsmap.fs import FileSystem
from vfsmap.fs.check import check
from vfsmap.pmem import Commit, Medium
from vfsmap.pool import Pool
from vfsmap.pool.scan import scan
from vfsmap.testing.plain import Files, Node, is_left_of, read_files
from vfsmap.testing.power import WORD, Digest, PowerModel, Ranges, pieces_of, tear
from vfsmap.testing.recording import MEDIA, Event, Memory, RecordingPmem, Resize, Store
from vfsmap.testing.workload import (
    POOL_SIZE,
    TINY,
    Context,
    base,
    deterministic,
    perform,
    seal_file,
)
from vfsmap.units import PMD

T = TypeVar("T")
LEASED: Final = 4096
SAMPLES: Final = 4

PATHS = st.sampled_from(
    ("a", "b", "e", "s", "x", "z", "l", "n", "d1", "d1/f", "d1/n", "d2/n", "d2/sub", "d2/sub/g")
) | st.sampled_from(("d2/sub/n", "h/u", "h/n", "empty", "empty/n", "missing/n", "a/n"))
OFFSETS = st.sampled_from((0, 1, 100, 4000, 4096, 8000, 20_000))
KINDS = st.sampled_from(("create", "mkdir", "symlink", "mkfifo"))
HOUSE = ("compact", "checkpoint", "trim", "resize", "arena", "arena-delete", "object", "object-set")
GROUPS = ("begin", "run", "finish")


class Crashing(RuleBasedStateMachine):
    """A step is an operation, or the recovery from a crash; the next crash may hit either."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.steps = 0

    @initialize(
        kind=st.sampled_from(("store", "flush", "sync")), tiny=st.booleans(), seed=st.integers(0)
    )
    def plant(self, kind: str, tiny: bool, seed: int) -> None:
        self.stack.enter_context(deterministic(tiny=tiny))
        content, _ = base(kind + TINY * tiny)
        self.rng = random.Random(seed)
        self.medium = MEDIA[kind]
        self.memory = Memory(content)
        self.durable = Digest(Memory(content))
        self.power = PowerModel(self.durable, POOL_SIZE, self.medium.commit)
        self.size = POOL_SIZE
        """Bytes of the medium in front of the last step."""
        pmem = RecordingPmem(self.memory, POOL_SIZE, self.medium)
        self.open(pmem, FileSystem(Pool(pmem)))
        self.files = read_files(self.fs)
        self.inside = [self.files]
        """What a crash inside the last step may leave, the newest last."""
        self.behind = [self.files]
        """What a crash behind it may leave."""

    def open(self, pmem: RecordingPmem, fs: FileSystem) -> None:
        self.pmem, self.fs = pmem, fs
        self.size = pmem.size
        self.context = Context(fs, random.Random(1))
        self.leased: dict[int, int] = {}

    def teardown(self) -> None:
        with self.stack:
            if hasattr(self, "fs"):
                self.fs.close()
                pmem = RecordingPmem(self.memory, self.pmem.size, self.medium)
                assert not check(scan(pmem)).damage
                assert read_files(FileSystem(Pool(pmem))).nodes == self.files.nodes

    # steps

    def begin_step(self) -> None:
        """Let what has happened so far be the past, which no crash can change."""
        for event in self.pmem.events:
            self.power.feed(event)
        self.pmem.events.clear()
        self.size = self.pmem.size
        self.mark = self.memory.mark()
        self.steps += 1

    def end_step(self, files: Files, *, durable: bool = False) -> None:
        self.files = files
        grouped = self.medium.commit is Commit.SYNC
        self.inside = [*self.behind, files]
        self.behind = self.inside if grouped and not durable else [files]

    def step(self, real: Callable[[], object], plain: Callable[[Files], object]) -> None:
        """Do the same to the file system and to the model, which must refuse the same."""
        self.begin_step()
        files = self.files.copy()
        refusal = refused(lambda: plain(files))
        found = refused(real)
        if found is not NoSpace:
            assert found is refusal
        self.end_step(self.files if found else files)
        assert read_files(self.fs).nodes == self.files.nodes

    def leases_of(self, path: str) -> int:
        """Return how many bytes of the file at a path are leased."""
        if refused(lambda: self.files.ino(path)):
            return 0
        return LEASED * bool(self.leased.get(self.files.ino(path)))

    # operations

    @rule(kind=KINDS, path=PATHS)
    def make(self, kind: str, path: str) -> None:
        fs, c, ino = self.fs, self.context, self.fs.pool.next_oid
        node, real = {
            "create": (Node(0o100640), lambda: fs.create(*c.home(path), 0o640, 1, 2)),
            "mkdir": (Node(0o040750), lambda: fs.mkdir(*c.home(path), 0o750, 1, 2)),
            "mkfifo": (Node(0o010600), lambda: fs.mknod(*c.home(path), 0o010600, 0, 1, 2)),
            "symlink": (
                Node(0o120777, target=b"to"),
                lambda: fs.symlink(*c.home(path), b"to", 1, 2),
            ),
        }[kind]
        self.step(real, lambda files: files.make(path, node, ino))

    @rule(old=PATHS, new=PATHS)
    def link(self, old: str, new: str) -> None:
        c = self.context
        self.step(lambda: self.fs.link(c.ino(old), *c.home(new)), lambda f: f.link(old, new))

    @rule(path=PATHS, held=st.booleans())
    def unlink(self, path: str, held: bool) -> None:
        """Remove a name, also of a file that somebody has open."""
        if held and not refused(lambda: self.files.file(path)):
            self.fs.hold(self.files.ino(path))
            self.context.held.append(self.files.ino(path))
        self.step(lambda: self.fs.unlink(*self.context.home(path)), lambda f: f.unlink(path))

    @rule(path=PATHS)
    def rmdir(self, path: str) -> None:
        self.step(lambda: self.fs.rmdir(*self.context.home(path)), lambda f: f.rmdir(path))

    @rule(old=PATHS, new=PATHS, exchange=st.booleans())
    def rename(self, old: str, new: str, exchange: bool) -> None:
        self.step(
            lambda: self.context.rename(old, new, 2 * exchange),
            lambda files: files.rename(old, new, exchange=exchange),
        )

    @rule(path=PATHS, offset=OFFSETS, length=st.sampled_from((1, 8, 50, 300, 6000)), seed=OFFSETS)
    def write(self, path: str, offset: int, length: int, seed: int) -> None:
        data = random.Random(f"{seed}:{self.fs.pool.next_oid}").randbytes(length)
        self.step(
            lambda: self.fs.write(self.context.ino(path), offset, data),
            lambda files: files.write(path, offset, data),
        )

    @rule(path=PATHS, size=OFFSETS)
    def cut(self, path: str, size: int) -> None:
        leased = self.leases_of(path)
        self.step(
            lambda: self.fs.setattr(self.context.ino(path), size=size),
            lambda files: files.cut(path, size, leased=leased),
        )

    @rule(path=PATHS, offset=OFFSETS, level=st.sampled_from((None, PMD)))
    def allocate(self, path: str, offset: int, level: object) -> None:
        leased = self.leases_of(path)
        if level is None or not leased:
            self.step(
                lambda: self.fs.allocate(
                    self.context.ino(path), offset, 5000, level=PMD if level else None
                ),
                lambda files: files.grow(path, offset + 5000),
            )

    @rule(path=PATHS, name=st.sampled_from((b"user.one", b"user.p")), size=st.integers(-1, 200))
    def attribute(self, path: str, name: bytes, size: int) -> None:
        fs, c = self.fs, self.context
        value = None if size < 0 else bytes([size]) * (20 * size)
        self.step(
            lambda: (
                fs.removexattr(c.ino(path), name)
                if value is None
                else fs.setxattr(c.ino(path), name, value)
            ),
            lambda files: files.set_attribute(path, name, value),
        )

    @rule(path=PATHS, mode=st.integers(0, 0o7777))
    def chmod(self, path: str, mode: int) -> None:
        self.step(
            lambda: self.fs.setattr(self.context.ino(path), mode=mode),
            lambda files: files.chmod(path, mode),
        )

    @rule(path=PATHS)
    def seal(self, path: str) -> None:
        leased = self.leases_of(path)
        self.step(
            lambda: seal_file(self.context, path),
            lambda files: files.seal(path, leased=leased),
        )

    @rule(path=PATHS)
    def lease(self, path: str) -> None:
        if not refused(lambda: self.files.file(path)):
            ino = self.files.ino(path)
            self.context.pins.append(self.fs.pin(ino, 0, LEASED, writable=True))
            self.leased[ino] = self.leased.get(ino, 0) + 1

    @precondition(lambda self: self.context.pins)
    @rule()
    def release(self) -> None:
        ino = self.fs._pins[self.context.pins[-1]].ino
        self.step(lambda: perform(self.context, "unpin"), lambda files: None)
        self.leased[ino] -= 1

    @precondition(lambda self: self.context.held)
    @rule()
    def close_file(self) -> None:
        self.step(lambda: perform(self.context, "drop"), lambda files: None)

    @rule(name=st.sampled_from(HOUSE))
    def keep_house(self, name: str) -> None:
        self.step(lambda: perform(self.context, name), lambda files: None)

    @precondition(lambda self: self.medium.commit is Commit.SYNC)
    @rule(name=st.sampled_from(GROUPS))
    def commit(self, name: str) -> None:
        self.step(lambda: perform(self.context, name), lambda files: None)

    @rule()
    def sync(self) -> None:
        self.begin_step()
        self.fs.pool.sync()
        self.end_step(self.files, durable=True)

    # crashes

    @precondition(lambda self: self.steps)
    @invariant()
    def any_crash_is_survived(self) -> None:
        """Look at one image of each kind that the last step may leave, and go on as if nothing."""
        number, seed = self.draw()
        self.replay(self.until_death(number, seed))
        judged(self.memory, self.size_at(number), self.medium, self.states_at(number))
        self.replay(self.pmem.events)
        if self.medium.commit is not Commit.STORE:
            number, seed = self.draw()
            with self.durable.kept():
                size = self.lose_power(self.power.copy(), number, seed)
                judged(self.durable.memory, size, self.medium, self.states_at(number))

    @precondition(lambda self: self.steps)
    @rule()
    def kill(self) -> None:
        """Kill the process in front of one of the last step's events, in it, or behind them."""
        number, seed = self.draw()
        events = self.until_death(number, seed)
        self.replay(events)
        for event in events:
            self.power.feed(event)
        self.recover(self.size_at(number), self.states_at(number))

    @precondition(lambda self: self.steps and self.medium.commit is not Commit.STORE)
    @rule()
    def cut_power(self) -> None:
        """Let the power go; what was not durable is there, or not, or in parts."""
        number, seed = self.draw()
        states = self.states_at(number)
        size = self.lose_power(self.power, number, seed)
        self.power = PowerModel(self.durable, size, self.medium.commit)
        self.memory = Memory(bytes(self.durable.memory.view))
        self.recover(size, states)

    def draw(self) -> tuple[int, int]:
        """Draw one of the last step's events, or the end of them, and a seed."""
        return self.rng.randrange(len(self.pmem.events) + 1), self.rng.getrandbits(16)

    def states_at(self, number: int) -> list[Files]:
        return self.inside if number < len(self.pmem.events) else self.behind

    def size_at(self, number: int) -> int:
        events = self.pmem.events[:number]
        return [self.size, *(event.size for event in events if isinstance(event, Resize))][-1]

    def until_death(self, number: int, seed: int) -> list[Event]:
        """Return the events until a death, the last of them perhaps in parts."""
        whole, rest = self.pmem.events[:number], self.pmem.events[number:]
        if not (rest and isinstance(rest[0], Store) and seed % 2):
            return whole
        return [*whole, *(Store(*piece) for piece in tear(rest[0], WORD, random.Random(seed)))]

    def replay(self, events: list[Event]) -> None:
        """Let processes see what they saw in front of the last step, and then these events."""
        self.memory.rollback(self.mark)
        for event in events:
            for offset, data in pieces_of(event):
                self.memory.write(offset, data)

    def lose_power(self, power: PowerModel, number: int, seed: int) -> int:
        """Leave on the durable medium what a power cut may; return its size."""
        for event in self.pmem.events[:number]:
            power.feed(event)
        parts = power.parts(Ranges([(0, len(self.memory))]))
        rng = random.Random(seed)
        pieces, size = power.state(parts, rng.choice(power.choices(parts, SAMPLES, rng)))
        self.durable.write(pieces)
        return size

    def recover(self, size: int, states: list[Files]) -> None:
        """Go on with what a crash left; opening it is a step, which the next crash may hit."""
        self.mark = self.memory.mark()
        self.open(*judged(self.memory, size, self.medium, states))
        found = read_files(self.fs)
        self.fs.pool.sync()
        assert check(scan(self.pmem)).findings == []
        self.files, self.inside, self.behind = found, states, [found]


def judged(
    memory: Memory, size: int, medium: Medium, states: list[Files]
) -> tuple[RecordingPmem, FileSystem]:
    """Open what a crash left, and hold it against what it may be."""
    pmem = RecordingPmem(memory, size, medium)
    assert not check(scan(pmem)).damage
    fs = FileSystem(Pool(pmem))
    assert fs.pool.failed is None
    fs.end_orphans()
    assert is_left_of(read_files(fs), states)
    return pmem, fs


def refused(action: Callable[[], object]) -> type[VfsmapError] | None:
    """Return with which error an action is refused, if it is."""
    try:
        action()
    except VfsmapError as exc:
        return type(exc)
    return None


TestCrashing = Crashing.TestCase
TestCrashing.settings = settings(
    max_examples=50, stateful_step_count=40, deadline=None, derandomize=True
)
