"""Workloads for crash tests: a tree to start from, operations on it, and names for rows of them.

A workload is named by its medium and its operations: ``flush/rename-over,unlink``.  The medium is
one of :data:`~vfsmap.testing.recording.MEDIA`; with ``-tiny`` behind it the log is so small that it
is compacted and grown all the time.  ``random:7:40`` stands for forty operations drawn with seed 7.
"""

import itertools
import random
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from ctypes import c_uint64
from functools import cache
from typing import ClassVar, Final, NamedTuple
from unittest import mock

from vfsmap.errors import NotFound, VfsmapError
from vfsmap.fs import FileSystem
from vfsmap.fs.inode import ROOT
from vfsmap.fs.names import RENAME_EXCHANGE
from vfsmap.pool import Commit, Oid, Pool, Structure
from vfsmap.pool.pool import format_pmem
from vfsmap.testing.oracle import OLD_BYTES
from vfsmap.testing.recording import MEDIA, Memory, RecordingPmem
from vfsmap.units import KIB, MIB, PMD, PTE, Level
from vfsmap.verity import Hasher

POOL_SIZE: Final = 8 * MIB
MEMORY_SIZE: Final = 12 * MIB
TINY: Final = "-tiny"
_TINY_HALF: Final = 8 * KIB
_START_NS: Final = 1_700_000_000 * 10**9
_PLANTED: Final = 1000


class Workload(NamedTuple):
    """A row of operations on a kind of medium."""

    medium: str
    operations: tuple[str, ...]
    first: int = 0
    """The first operation that crashes are tried in; the ones before lead up to it."""

    def __str__(self) -> str:
        """Return its name."""
        return f"{self.medium}/{','.join(self.operations)}"

    @property
    def tiny(self) -> bool:
        """Tell whether the log is a tiny one."""
        return self.medium.endswith(TINY)

    @property
    def kind(self) -> str:
        """The medium without the size of the log."""
        return self.medium.removesuffix(TINY)


class Number(Structure):
    """An object of a program's own."""

    _fields_: ClassVar = [("value", c_uint64 * 5)]


class Context:
    """A file system that operations are done on."""

    def __init__(self, fs: FileSystem, rng: random.Random) -> None:
        self.fs = fs
        self.pool = fs.pool
        self.rng = rng
        self.held: list[int] = []
        self.pins: list[int] = []
        self.arenas: list[Oid] = []
        self.numbers: list[Oid] = []
        self.commit: Commit | None = None

    def home(self, path: str) -> tuple[int, bytes]:
        """Return a path's directory and its last name."""
        *parents, name = path.encode().split(b"/")
        at = ROOT
        for parent in parents:
            at = self.fs.lookup(at, parent).ino
        return at, name

    def ino(self, path: str) -> int:
        """Return the number of the inode at a path."""
        return self.fs.lookup(*self.home(path)).ino

    def write(self, path: str, offset: int, length: int) -> None:
        """Write bytes that no other write writes."""
        self.fs.write(self.ino(path), offset, self.rng.randbytes(length))

    def rename(self, old: str, new: str, flags: int = 0) -> None:
        """Rename by paths."""
        self.fs.rename(*self.home(old), *self.home(new), flags)


Operation = Callable[[Context], object]


def _hold_and_unlink(c: Context, path: str) -> None:
    ino = c.ino(path)
    c.fs.hold(ino)
    c.held.append(ino)
    c.fs.unlink(*c.home(path))


def _drop(c: Context) -> None:
    c.fs.drop(c.held.pop() if c.held else -1)


def _pin_and_unlink(c: Context, path: str) -> None:
    ino = c.ino(path)
    c.pins.append(c.fs.pin(ino, 0, 4096, writable=True))
    c.fs.unlink(*c.home(path))


def _unpin(c: Context) -> None:
    if c.pins:
        c.fs.unpin(c.pins.pop())


def _make_mappable(c: Context, path: str) -> None:
    ino = c.ino(path)
    for unit in c.fs.unmappable_units(ino):
        c.fs.make_mappable(ino, unit)


def seal_file(c: Context, path: str) -> None:
    """Seal a file."""
    ino = c.ino(path)
    hasher = Hasher(block_size=1024)
    for extent in c.fs.extents(ino, 0, c.fs.get(ino).size):  # a read would be another change
        hasher.feed(c.pool.pmem.view[extent.start : extent.start + extent.length])
    descriptor, tree = hasher.finish()
    c.fs.seal(ino, descriptor.encode(), [tree])


def _begin(c: Context) -> None:
    if c.commit is None:
        c.commit = c.pool.begin_commit()


def _run(c: Context) -> None:
    if c.commit is not None:
        c.commit.run()


def _finish(c: Context) -> None:
    if c.commit is not None:
        c.commit.run()
        c.commit.finish()
        c.commit = None


def _fill(c: Context) -> None:
    c.fs.allocate(c.ino("e"), 0, c.pool.space.free_bytes)


def _arena(c: Context, size: int, level: Level) -> None:
    with c.pool.transaction() as tx:
        c.arenas.append(tx.allocate(size, level=level))


def _write_arena(c: Context) -> None:
    if c.arenas:
        c.pool.pmem.store(c.pool.arena(c.arenas[-1]).start + 4000, c.rng.randbytes(300))
        c.pool.persist(c.arenas[-1], 4000, 300)


def _delete_arena(c: Context) -> None:
    if c.arenas:
        with c.pool.transaction() as tx:
            tx.delete(c.arenas.pop())


def _new_number(c: Context) -> None:
    with c.pool.transaction() as tx:
        c.numbers.append(tx.new(Number()))


def _set_number(c: Context) -> None:
    if c.numbers:
        with c.pool.transaction() as tx:
            tx.set(c.numbers[-1], Number.from_buffer_copy(c.rng.randbytes(40)))


def _delete_number(c: Context) -> None:
    if c.numbers:
        with c.pool.transaction() as tx:
            tx.delete(c.numbers.pop())


def _checkpoint(c: Context) -> None:
    if c.pool.journal._checkpoint is None:
        c.pool.journal._start_checkpoint()


def _make(c: Context, path: str) -> None:
    c.fs.create(*c.home(path), 0o644, 5, 6)


OPERATIONS: Final[dict[str, Operation]] = {
    "create": lambda c: _make(c, "n"),
    "create-deep": lambda c: _make(c, "d2/sub/n"),
    "create-aligned": lambda c: _make(c, "h/n"),
    "mkdir": lambda c: c.fs.mkdir(*c.home("dn"), 0o755, 1, 2),
    "mkfifo": lambda c: c.fs.mknod(*c.home("d1/p"), 0o010644, 0, 1, 2),
    "mknod": lambda c: c.fs.mknod(*c.home("v"), 0o060600, 0x801, 0, 0),
    "symlink": lambda c: c.fs.symlink(*c.home("sl"), b"d1/" * 25, 1, 2),
    "symlink-long": lambda c: c.fs.symlink(*c.home("d1/sl"), b"/" * 3000, 1, 2),
    "link": lambda c: c.fs.link(c.ino("b"), *c.home("d1/lb")),
    "unlink": lambda c: c.fs.unlink(*c.home("e")),
    "unlink-link": lambda c: c.fs.unlink(*c.home("a")),
    "unlink-data": lambda c: c.fs.unlink(*c.home("b")),
    "unlink-unit": lambda c: c.fs.unlink(*c.home("h/u")),
    "unlink-sealed": lambda c: c.fs.unlink(*c.home("z")),
    "unlink-attributes": lambda c: c.fs.unlink(*c.home("x")),
    "unlink-symlink": lambda c: c.fs.unlink(*c.home("l")),
    "unlink-held": lambda c: _hold_and_unlink(c, "b"),
    "drop": _drop,
    "unlink-pinned": lambda c: _pin_and_unlink(c, "h/u"),
    "unpin": _unpin,
    "rmdir": lambda c: c.fs.rmdir(*c.home("empty")),
    "rename": lambda c: c.rename("b", "r"),
    "rename-over-link": lambda c: c.rename("b", "a"),
    "rename-over-last": lambda c: c.rename("a", "b"),
    "rename-across": lambda c: c.rename("a", "d2/a"),
    "rename-directory": lambda c: c.rename("d1", "d2/d1"),
    "rename-over-directory": lambda c: c.rename("d1", "empty"),
    "exchange": lambda c: c.rename("a", "b", RENAME_EXCHANGE),
    "exchange-across": lambda c: c.rename("b", "d1/f", RENAME_EXCHANGE),
    "exchange-directories": lambda c: c.rename("d1", "d2/sub", RENAME_EXCHANGE),
    "exchange-kinds": lambda c: c.rename("a", "d2/sub", RENAME_EXCHANGE),
    "chmod": lambda c: c.fs.setattr(c.ino("a"), mode=0o400),
    "chown": lambda c: c.fs.setattr(c.ino("d1"), uid=7, gid=8),
    "utimens": lambda c: c.fs.setattr(c.ino("b"), atime_ns=1, mtime_ns=2),
    "cut": lambda c: c.fs.setattr(c.ino("b"), size=4100),
    "cut-in-block": lambda c: c.fs.setattr(c.ino("a"), size=50),
    "cut-to-nothing": lambda c: c.fs.setattr(c.ino("b"), size=0),
    "cut-unit": lambda c: c.fs.setattr(c.ino("h/u"), size=100),
    "grow": lambda c: c.fs.setattr(c.ino("a"), size=9000),
    "grow-in-block": lambda c: c.fs.setattr(c.ino("a"), size=3000),
    "grow-unit": lambda c: c.fs.setattr(c.ino("h/u"), size=7000),
    "write-first": lambda c: c.write("e", 0, 300),
    "write-new": lambda c: c.write("n", 0, 20),
    "write-new-aligned": lambda c: c.write("h/n", 0, 20),
    "append": lambda c: c.write("a", 100, 33),
    "append-block": lambda c: c.write("b", 6000, 5000),
    "overwrite": lambda c: c.write("b", 100, 200),
    "overwrite-edge": lambda c: c.write("b", 4090, 15),
    "overwrite-and-grow": lambda c: c.write("b", 5990, 400),
    "write-behind-gap": lambda c: c.write("a", 5000, 100),
    "write-in-block-gap": lambda c: c.write("a", 333, 10),
    "write-in-hole": lambda c: c.write("s", 4200, 100),
    "write-in-unit": lambda c: c.write("h/u", 2990, 500),
    "write-far-in-unit": lambda c: c.write("h/u", MIB, 64),
    "write-across": lambda c: c.write("s", 8000, 600),
    "allocate": lambda c: c.fs.allocate(c.ino("b"), 0, 20_000),
    "allocate-large": lambda c: c.fs.allocate(c.ino("s"), 0, 3 * MIB),
    "allocate-hole": lambda c: c.fs.allocate(c.ino("s"), 0, 20_000),
    "allocate-unit": lambda c: c.fs.allocate(c.ino("b"), 0, 100, level=PMD),
    "make-mappable": lambda c: _make_mappable(c, "b"),
    "allocate-aligned": lambda c: c.fs.allocate(c.ino("h/e"), 0, 5000),
    "fill": _fill,
    "set-attribute": lambda c: c.fs.setxattr(c.ino("a"), b"user.new", b"value"),
    "replace-attribute": lambda c: c.fs.setxattr(c.ino("x"), b"user.one", b"v" * 70),
    "large-attribute": lambda c: c.fs.setxattr(c.ino("d1"), b"user.large", b"w" * 3000),
    "remove-attribute": lambda c: c.fs.removexattr(c.ino("x"), b"user.one"),
    "align": lambda c: c.fs.set_align(c.ino("b"), PMD.shift),
    "align-small": lambda c: c.fs.set_align(c.ino("s"), PTE.shift),
    "align-sparse": lambda c: c.fs.set_align(c.ino("s"), PMD.shift),
    "zero-tail": lambda c: c.fs.zero_tail(c.ino("b")),
    "seal": lambda c: seal_file(c, "b"),
    "read": lambda c: c.fs.read(c.ino("a"), 0, 100),
    "arena": lambda c: _arena(c, 20_000, PTE),
    "arena-unit": lambda c: _arena(c, PMD.size, PMD),
    "arena-write": _write_arena,
    "arena-delete": _delete_arena,
    "object": _new_number,
    "object-set": _set_number,
    "object-delete": _delete_number,
    "trim": lambda c: c.pool.space.trim(),
    "resize": lambda c: c.pool.resize(c.pool.size + 2 * MIB),
    "checkpoint": _checkpoint,
    "compact": lambda c: c.pool.journal.compact(),
    "sync": lambda c: c.pool.sync(),
    "begin": _begin,
    "run": _run,
    "finish": _finish,
    "close": lambda c: c.fs.close(),
}
"""Each operation is one call that a crash leaves wholly done or not done at all."""

_GROUPED_ONLY: Final = ("sync", "begin", "run", "finish")
_IN_COMPANY: Final = ("align-small", "allocate-large", "write-across", "zero-tail")
"""What shows something only behind certain others."""
_NOT_DRAWN: Final = ("close", "fill", "resize", *_GROUPED_ONLY, *_IN_COMPANY)


def file_operations() -> list[str]:
    """Return the operations that stand for one call each."""
    left_out = ("close", *_GROUPED_ONLY, *_IN_COMPANY)
    return [name for name in OPERATIONS if name not in left_out]


def all_operations() -> list[str]:
    """Return those as well that need another one in front of them to do anything."""
    return [name for name in OPERATIONS if name not in ("close", *_GROUPED_ONLY)]


def perform(context: Context, name: str) -> None:
    """Do one operation; one that the file system refuses has no effect."""
    operation = OPERATIONS.get(name) or _RANDOM[name]
    try:
        operation(context)
    except VfsmapError:
        if name in _GROUPED_ONLY:
            raise


# drawn operations


def _any_file(c: Context) -> str:
    return c.rng.choice(("a", "b", "e", "s", "x", "d1/f", "d2/sub/g", "h/u", "n0", "d1/n1"))


def _any_name(c: Context) -> str:
    return c.rng.choice(("", "d1/", "d2/", "d2/sub/", "h/", "d3/")) + c.rng.choice(
        ("a", "b", "n0", "n1", "d3", "f")
    )


def _any_offset(c: Context) -> int:
    return c.rng.choice((0, 1, 100, 4000, 4096, 8000, c.rng.randrange(20_000), 2 * MIB - 100))


_RANDOM: Final[dict[str, Operation]] = {
    "?write": lambda c: c.write(_any_file(c), _any_offset(c), c.rng.choice((1, 50, 200, 6000))),
    "?size": lambda c: c.fs.setattr(c.ino(_any_file(c)), size=_any_offset(c)),
    "?create": lambda c: _make(c, _any_name(c)),
    "?mkdir": lambda c: c.fs.mkdir(*c.home(_any_name(c)), 0o700, 0, 0),
    "?rename": lambda c: c.rename(_any_name(c), _any_name(c)),
    "?exchange": lambda c: c.rename(_any_name(c), _any_name(c), RENAME_EXCHANGE),
    "?unlink": lambda c: c.fs.unlink(*c.home(_any_name(c))),
    "?rmdir": lambda c: c.fs.rmdir(*c.home(_any_name(c))),
    "?link": lambda c: c.fs.link(c.ino(_any_file(c)), *c.home(_any_name(c))),
    "?attribute": lambda c: c.fs.setxattr(
        c.ino(_any_file(c)), b"user." + c.rng.choice((b"p", b"q")), c.rng.randbytes(700)
    ),
    "?chmod": lambda c: c.fs.setattr(c.ino(_any_file(c)), mode=c.rng.randrange(0o10000)),
    "?allocate": lambda c: c.fs.allocate(c.ino(_any_file(c)), _any_offset(c), 5000),
}


def drawn(seed: int, count: int, *, grouped: bool) -> list[str]:
    """Return names of operations drawn at random, many of them with random arguments."""
    rng = random.Random(seed)
    fixed = [name for name in OPERATIONS if name not in _NOT_DRAWN]
    names = []
    for _ in range(count):
        kind = rng.randrange(10)
        if grouped and kind < 3:
            names.append(rng.choice(_GROUPED_ONLY))
        else:
            names.append(rng.choice(list(_RANDOM) if kind < 8 else fixed))
    return names


def parse(name: str) -> Workload:
    """Return the workload of a name.

    Raises:
        NotFound: there is no such medium or operation.
    """
    medium, _, row = name.partition("/")
    workload = Workload(medium, tuple(row.split(",")))
    if workload.kind not in MEDIA:
        raise NotFound(f"there is no medium {medium!r}")
    for operation in workload.operations:
        if operation not in OPERATIONS and not operation.startswith("random:"):
            raise NotFound(f"there is no operation {operation!r}")
    return workload


def steps(workload: Workload) -> list[str]:
    """Return the operations of a workload, with those drawn at random spelt out, and its end."""
    grouped = workload.kind == "sync"
    names: list[str] = []
    for operation in workload.operations:
        if operation.startswith("random:"):
            _, seed, count = operation.split(":")
            names += drawn(int(seed), int(count), grouped=grouped)
        else:
            names.append(operation)
    return [*names, *(["sync"] if grouped else []), "close"]


# the tree to start from


def plant(fs: FileSystem) -> None:
    """Make the tree that every workload starts from."""
    c = Context(fs, random.Random("plant"))
    for path in ("d1", "d2", "d2/sub", "empty", "h"):
        fs.mkdir(*c.home(path), 0o755, 0, 0)
    fs.set_align(c.ino("h"), PMD.shift)
    sizes = {"a": 100, "b": 6000, "e": 0, "x": 10, "z": 5000, "d1/f": 50, "d2/sub/g": 4096}
    for path, size in {**sizes, "h/u": 3000, "h/e": 0}.items():
        _make(c, path)
        if size:
            c.write(path, 0, size)
    _make(c, "s")
    c.write("s", 12_000, 8000)
    fs.link(c.ino("a"), *c.home("d1/c"))
    fs.symlink(*c.home("l"), b"d1/f", 0, 0)
    fs.mknod(*c.home("p"), 0o010644, 0, 0, 0)
    fs.setxattr(c.ino("x"), b"user.one", b"1" * 40)
    fs.setxattr(c.ino("x"), b"user.two", b"")
    seal_file(c, "z")


@contextmanager
def deterministic(*, tiny: bool = False, first: int = _PLANTED) -> Iterator[None]:
    """Let the same workload store the same bytes each time.

    Args:
        tiny: let a tiny log be full soon.
        first: where clock and generations start; behind those of the tree.
    """
    clock = itertools.count(_START_NS + first * 10**9, 1000)
    numbers = itertools.count(first)
    # as short as it is used
    generation = lambda: next(numbers) * 0x9E3779B97F4A7C15 % (1 << 64)  # noqa: E731
    with ExitStack() as stack:
        patch = mock.patch
        stack.enter_context(patch("time.time_ns", lambda: next(clock)))
        for module in ("journal", "pool"):
            stack.enter_context(patch(f"vfsmap.pool.{module}.new_generation", generation))
        if tiny:
            for module in ("data", "names", "state"):
                stack.enter_context(patch(f"vfsmap.fs.{module}.BATCH_PIECES", 2))
            stack.enter_context(patch("vfsmap.pool.journal.RESERVE", KIB))
            stack.enter_context(patch("vfsmap.pool.journal._SLICE", 512))
            stack.enter_context(patch("vfsmap.pool.checkpoint._SLICE", KIB))
        yield


@cache
def base(medium: str) -> tuple[bytes, frozenset[int]]:
    """Return a medium that holds the tree, cleanly closed, and which of its pages are reserved."""
    tiny = medium.endswith(TINY)
    content = OLD_BYTES * (MEMORY_SIZE // len(OLD_BYTES))
    backed: set[int] = set()
    with deterministic(tiny=tiny, first=1), mock.patch("uuid.uuid4", _uuid):
        kind = MEDIA[medium.removesuffix(TINY)]
        pmem = RecordingPmem(Memory(content), POOL_SIZE, kind, backed=backed)
        format_pmem(pmem, log=_TINY_HALF if tiny else 0)
        fs = FileSystem.format(Pool(pmem), uid=0, gid=0)
        plant(fs)
        fs.close()
    return bytes(pmem.memory.view), frozenset(backed)


def _uuid() -> uuid.UUID:
    return uuid.UUID(int=0x5EED)
