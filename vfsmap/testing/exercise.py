"""Random file operations by several processes, on a mounted pool and on a kernel's file system.

``python -m vfsmap.testing.exercise --medium tmpfs --minutes 10 --seed 1``

Groups of processes work side by side, each group in a directory of its own.  Within a group one
operation follows the other, so that the answer to each is certain, but any process does it, with
files that any of them has open, mapped through the mount or mapped by the daemon.  What a file
system of the kernel can't know, leases and seals, is worked out here.
"""

import errno
import itertools
import multiprocessing
import os
import random
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Final, NamedTuple

import click

from vfsmap.testing.commands import served_pool, vfsmap
from vfsmap.testing.killing import MEDIA
from vfsmap.testing.media import tmpfs
from vfsmap.testing.twins import Order, serve
from vfsmap.units import KIB, MIB
from vfsmap_fuse.operations import DROPS_WRITTEN_PAGES

_NAMES: Final = tuple(
    f"{folder}{name}" for folder in ("", "p/", "q/", "p/r/") for name in ("a", "b", "c", "d")
)
_FOLDERS: Final = ("p", "q", "p/r")
_KEYS: Final = ("user.a", "user.b")
_OPEN_MOST: Final = 12
_WINDOWS_MOST: Final = 4
_LARGEST: Final = 5 * MIB
_COMPARED: Final = 250
"""Operations between two comparisons of everything."""
_TOLD: Final = 500
_REPORT_SECONDS: Final = 10


class Open(NamedTuple):
    """A descriptor that some process has."""

    worker: int
    ino: int
    writable: bool
    cached: bool


class Mapped(NamedTuple):
    """A window that some process has."""

    worker: int
    ino: int
    length: int
    writable: bool


class Draw(NamedTuple):
    """Something to do, who does it, and what to note when it has worked."""

    worker: int
    order: Order
    then: Callable[[Any], None] = lambda result: None


class Group:
    """Draws operations, and knows who has what open."""

    def __init__(
        self, pool: Path, other: Path, seed: int, processes: int, *, past_cache: bool
    ) -> None:
        self._chance = random.Random(seed)
        self._other = other
        self._past_cache = past_cache
        self._files: dict[int, Open] = {}
        self._windows: dict[int, Mapped] = {}
        self._sealed: set[int] = set()
        self._slots = itertools.count()
        self._pipes: list[Connection] = []
        self.done = 0
        fork = multiprocessing.get_context("fork")
        for _ in range(processes):
            ours, theirs = fork.Pipe()
            fork.Process(target=serve, args=(pool, other, theirs), daemon=True).start()
            theirs.close()
            self._pipes.append(ours)

    def step(self) -> str | None:
        """Do something; return what differs."""
        comparing = self.done % _COMPARED == _COMPARED - 1
        draw = Draw(0, Order("compare", ())) if comparing else self._draw()
        self.done += 1
        pipe = self._pipes[draw.worker]
        pipe.send(draw.order)
        differs, result = pipe.recv()
        if differs:
            return f"operation {self.done}, process {draw.worker}: {differs}"
        if not isinstance(result, OSError):
            draw.then(result)
        return None

    def _draw(self) -> Draw:
        makers: tuple[tuple[int, Callable[[], Draw | None]], ...] = (
            (12, self._open),
            (9, self._close),
            (34, self._use_file),
            (6, self._map),
            (5, self._unmap),
            (14, self._use_window),
            (5, self._truncate),
            (16, self._use_names),
            (1, self._seal),
        )
        weights, choices = zip(*makers, strict=True)
        while True:
            draw: Draw | None = self._chance.choices(choices, weights)[0]()
            if draw is not None:
                return draw

    # what is where

    def _worker(self) -> int:
        return self._chance.randrange(len(self._pipes))

    def _file(self, name: str) -> tuple[int, int]:
        """Return number and size of a regular file on the other side; no number is 0."""
        try:
            status = os.stat(self._other / name)
        except OSError:
            return 0, 0
        return (status.st_ino, status.st_size) if stat.S_ISREG(status.st_mode) else (0, 0)

    def _leases(self, ino: int, *, writable: bool = False) -> list[Mapped]:
        return [w for w in self._windows.values() if w.ino == ino and w.writable >= writable]

    def _has_writer(self, ino: int, *, cached: bool = False) -> bool:
        files = self._files.values()
        return any(f.ino == ino and f.writable and f.cached >= cached for f in files)

    def _cutting(self, ino: int, old: int, new: int) -> int | None:
        """Return the errno that setting a file's size ends with on the pool alone; 0: none.

        None: whether a cut right behind what is mapped touches the lease depends on units.
        """
        if ino in self._sealed:
            return errno.EPERM
        leases = self._leases(ino)
        if new >= old or not leases:
            return 0
        return errno.EBUSY if any(new < lease.length for lease in leases) else None

    def _bytes(self) -> bytes:
        size = self._chance.choice((1, 10, 512, 4096, 5000, 70_000))
        if self._chance.random() < 0.03:
            size = self._chance.choice((MIB, 2 * MIB + 100))
        return self._chance.randbytes(size)

    def _offset(self) -> int:
        most = self._chance.choice((100, 10_000, 300 * KIB, _LARGEST))
        at = self._chance.randrange(most)
        return at & ~0xFFF if self._chance.random() < 0.3 else at

    # descriptors

    def _open(self) -> Draw | None:
        if len(self._files) >= _OPEN_MOST:
            return None
        name, chance = self._chance.choice(_NAMES), self._chance.random
        access = self._chance.choice((os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_RDWR))
        writable = access != os.O_RDONLY
        flags = access | os.O_CREAT * (chance() < 0.6) | os.O_APPEND * (chance() < 0.1)
        flags |= os.O_EXCL * (chance() < 0.05) | os.O_TRUNC * (writable and chance() < 0.15)
        ino, size = self._file(name)
        error: int | None = 0
        if ino and flags & (os.O_CREAT | os.O_EXCL) != os.O_CREAT | os.O_EXCL:
            if writable and ino in self._sealed:
                error = errno.EPERM
            elif flags & os.O_TRUNC:
                error = self._cutting(ino, size, 0)
        if error is None:
            return None
        slot, worker = next(self._slots), self._worker()
        past_cache = (
            self._past_cache
            and flags & (os.O_ACCMODE | os.O_APPEND) == os.O_WRONLY
            and not self._has_writer(ino, cached=True)
        )
        cached = not (past_cache or self._leases(ino, writable=True))

        def then(opened: int) -> None:
            self._files[slot] = Open(worker, opened, writable, cached)

        return Draw(worker, Order("open", (slot, name, flags), error or None), then)

    def _close(self) -> Draw | None:
        if not self._files:
            return None
        slot = self._chance.choice(list(self._files))
        worker = self._files[slot].worker
        return Draw(worker, Order("close", (slot,)), lambda _: self._forget(self._files, slot))

    def _forget(self, table: dict[int, Any], slot: int) -> None:
        del table[slot]

    def _use_file(self) -> Draw | None:
        if not self._files:
            return None
        slot = self._chance.choice(list(self._files))
        file = self._files[slot]
        kind = self._chance.choice(
            ("pread", "pread", "read", "fstat", "fsync", "map_read")
            + ("pwrite", "pwrite", "pwrite", "write", "map_write", "ftruncate") * file.writable
        )
        changes = kind in ("pwrite", "write", "map_write", "ftruncate")
        error = errno.EPERM if changes and file.ino in self._sealed else 0
        arguments: tuple[Any, ...] = ()
        match kind:
            case "pread":
                arguments = self._chance.choice((10, 5000, 200_000)), self._offset()
            case "read":
                arguments = (self._chance.choice((10, 5000)),)
            case "pwrite":
                arguments = self._bytes(), self._offset()
            case "write":
                arguments = (self._bytes(),)
            case "map_write":
                arguments = self._bytes(), self._offset()
            case "ftruncate":
                return self._set_size(slot, file)
        if kind.startswith("map_") and not file.cached:
            return None  # the kernel refuses it, with an errno that has changed over the years
        return Draw(file.worker, Order(kind, (slot, *arguments), error or None))

    def _set_size(self, slot: int, file: Open) -> Draw | None:
        new = self._offset()
        # whatever the size is now: a cut to less than a lease is refused, more than it may not be
        if file.ino not in self._sealed and self._leases(file.ino):
            return None
        error = errno.EPERM if file.ino in self._sealed else None
        return Draw(file.worker, Order("ftruncate", (slot, new), error))

    # windows

    def _map(self) -> Draw | None:
        if len(self._windows) >= _WINDOWS_MOST:
            return None
        name, writable = self._chance.choice(_NAMES), self._chance.random() < 0.5
        ino, size = self._file(name)
        if not size or (self._other / name).is_symlink():
            return None
        error = 0
        if writable and ino in self._sealed:
            error = errno.EPERM
        elif writable and self._has_writer(ino, cached=True):
            error = errno.EBUSY
        slot, worker = next(self._slots), self._worker()

        def then(length: int) -> None:
            self._windows[slot] = Mapped(worker, ino, length, writable)

        return Draw(worker, Order("map", (slot, name, writable), error or None), then)

    def _unmap(self) -> Draw | None:
        if not self._windows:
            return None
        slot = self._chance.choice(list(self._windows))
        worker = self._windows[slot].worker
        return Draw(worker, Order("unmap", (slot,)), lambda _: self._forget(self._windows, slot))

    def _use_window(self) -> Draw | None:
        if not self._windows:
            return None
        slot = self._chance.choice(list(self._windows))
        window = self._windows[slot]
        if window.writable and self._chance.random() < 0.6:
            return Draw(window.worker, Order("store", (slot, self._bytes(), self._offset())))
        return Draw(window.worker, Order("load", (slot,)))

    # names

    def _truncate(self) -> Draw | None:
        name, new = self._chance.choice(_NAMES), self._offset()
        ino, size = self._file(name)
        error = self._cutting(ino, size, new) if ino else 0
        return (
            None
            if error is None
            else Draw(self._worker(), Order("truncate", (name, new), error or None))
        )

    def _seal(self) -> Draw | None:
        name = self._chance.choice(_NAMES)
        ino, _ = self._file(name)
        if not ino or (self._other / name).is_symlink() or self._chance.random() < 0.5:
            return None
        error = 0
        if ino in self._sealed:
            error = errno.EEXIST
        elif self._has_writer(ino) or self._leases(ino, writable=True):
            error = errno.EBUSY
        then = lambda _: self._sealed.add(ino)  # noqa: E731  # as short as it is used
        return Draw(self._worker(), Order("seal", (name,), error or None), then)

    def _use_names(self) -> Draw:
        chance = self._chance
        name, other, folder = chance.choice(_NAMES), chance.choice(_NAMES), chance.choice(_FOLDERS)
        key, value = chance.choice(_KEYS), chance.randbytes(chance.choice((0, 5, 1000)))
        flags = chance.choice((0, 0, os.XATTR_CREATE, os.XATTR_REPLACE))
        any_name = chance.choice((name, folder))
        order = chance.choice(
            (
                Order("rename", (name, other)),
                Order("rename", (name, other)),
                Order("rename", (folder, chance.choice(_FOLDERS))),
                Order("link", (name, other)),
                Order("unlink", (name,)),
                Order("unlink", (any_name,)),
                Order("symlink", (chance.choice(("a", "b", "nowhere", "p/../c")), name)),
                Order("mkdir", (folder,)),
                Order("mkdir", (folder,)),
                Order("rmdir", (any_name,)),
                Order("chmod", (name, chance.choice((0o600, 0o644, 0o755)))),
                Order("utime", (name, chance.randrange(1 << 60))),
                Order("setxattr", (name, key, value, flags)),
                Order("removexattr", (name, key)),
                Order("describe", (any_name,)),
                Order("describe", (any_name,)),
            )
        )
        return Draw(self._worker(), order)


@contextmanager
def _places(medium: str) -> Iterator[tuple[Path, Path]]:
    """Yield a directory on a mounted pool, and one on a tmpfs."""
    with ExitStack() as stack:
        place = stack.enter_context(MEDIA[medium]())
        other = stack.enter_context(tmpfs(huge="never", size="512M"))
        server = stack.enter_context(served_pool(place, "256M"))
        yield server.directory, other
        server.unmount()
        vfsmap("check", server.pool)


def _exercise(group: Group, name: str, operations: int, until: float, pipe: Connection) -> None:
    """Run a group until something differs; tell how it goes, in the end what differs."""
    differs = None
    while differs is None and group.done < operations and time.monotonic() < until:
        differs = group.step()
        if group.done % _TOLD == 0:
            pipe.send((group.done, None))
    pipe.send((group.done, differs and f"{name}: {differs}"))
    pipe.send(None)


def _start(
    places: tuple[Path, Path],
    seed: int,
    processes: int,
    operations: int,
    until: float,
    *,
    past_cache: bool,
) -> Connection:
    pool, other = (root / f"seed-{seed}" for root in places)
    for root in (pool, other):
        root.mkdir()
    ours, theirs = multiprocessing.Pipe()

    def be_group() -> None:
        group = Group(pool, other, seed, processes, past_cache=past_cache)
        _exercise(group, f"seed {seed}", operations, until, theirs)

    multiprocessing.get_context("fork").Process(target=be_group).start()
    theirs.close()
    return ours


def run(
    medium: str,
    seed: int,
    *,
    groups: int = 2,
    processes: int = 3,
    operations: int = sys.maxsize,
    minutes: float = 60,
    tell: Callable[[str], None] = lambda line: None,
) -> tuple[int, list[str]]:
    """Run groups side by side; return how many operations were done, and what differed.

    Args:
        medium: what the pool lies on.
        seed: of the first group; the next has the next.
        groups: how many work side by side.
        processes: of each group.
        operations: that each group does at most.
        minutes: that they take at most.
        tell: is told now and then how it goes.
    """
    done: dict[Connection, int] = {}
    failures = []
    past_cache = DROPS_WRITTEN_PAGES and medium != "ext4"  # see Operations of vfsmap_fuse
    with _places(medium) as places:
        until = time.monotonic() + 60 * minutes
        for number in range(seed, seed + groups):
            group = _start(places, number, processes, operations, until, past_cache=past_cache)
            done[group] = 0
        running = set(done)
        told = time.monotonic()
        while running:
            for pipe in wait(running):
                assert isinstance(pipe, Connection)
                try:
                    message = pipe.recv()
                except EOFError:
                    message, failure = None, "a group died; it has said of what"
                    failures.append(f"{medium}, {failure}")
                if message is None:
                    running.discard(pipe)
                    continue
                done[pipe], failure = message
                failures += [f"{medium}, {failure}"] if failure else []
            if time.monotonic() - told > _REPORT_SECONDS:
                told = time.monotonic()
                tell(f"{medium}: {sum(done.values())} operations, {len(failures)} differences")
        while multiprocessing.active_children():
            time.sleep(0.01)
    return sum(done.values()), failures


@click.command()
@click.option("--medium", type=click.Choice(list(MEDIA)), default="tmpfs", show_default=True)
@click.option("--minutes", type=float, default=10.0, show_default=True)
@click.option("--operations", type=int, default=sys.maxsize, help="Of each group, at most.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of the first group.")
@click.option("--groups", type=click.IntRange(1), default=2, show_default=True)
@click.option("--processes", type=click.IntRange(1), default=3, help="Of each group.")
def main(
    medium: str, minutes: float, operations: int, seed: int, groups: int, processes: int
) -> None:
    """Exercise a mounted pool beside a file system of the kernel, and compare every answer.

    What differs is named by the seed of its group: --groups 1 --seed N does the same again.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    done, failures = run(
        medium,
        seed,
        groups=groups,
        processes=processes,
        operations=operations,
        minutes=minutes,
        tell=click.echo,
    )
    for failure in failures:
        click.echo(f"DIFFERS: {failure}", err=True)
    click.echo(f"{medium}: {done} operations, {len(failures)} differences")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
