"""Kill the server of a real mount while eight writers are at work, round after round.

``python -m vfsmap.testing.killing --medium tmpfs --rounds 200 --seed 1``

A round starts the server, checks that what the round before has finished (on ext4: has fsynced) is
there, lets the writers write, kills the server at a random moment (now and then while it starts),
and checks that neither a mount nor a process is left and that ``vfsmap check`` finds nothing.
A failing round is named by its seed: ``--rounds 1 --seed N`` draws the same operations again.
"""

import logging
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import click

from vfsmap.fs.check import check
from vfsmap.pmem import Pmem
from vfsmap.pool.scan import scan
from vfsmap.testing import media
from vfsmap.testing.commands import vfsmap
from vfsmap.testing.trees import Record, observe
from vfsmap.testing.writing import Writer, write_until_gone
from vfsmap_tools.mounts import find_mount
from vfsmap_tools.server import ServerOptions, run_server

WRITERS: Final = 8
_FORK: Final = multiprocessing.get_context("fork")
MEDIA: Final[dict[str, Callable[[], AbstractContextManager[Path]]]] = {
    "tmpfs": partial(media.tmpfs, size="300M"),
    "hugetlbfs": partial(media.hugetlbfs, pages=128),
    "ext4": partial(media.ext4_loop, size="400M"),
}
_POOL_SIZE: Final = "256M"
_LONGEST: Final = 1.2
"""Seconds that the writers have at most."""
_PATIENCE: Final = 20
"""Seconds that what a server leaves behind may take to go away."""
_HANG: Final = 300
"""Seconds after which a round has failed."""
_STARTING: Final = 8
"""One round in so many kills the server while it starts."""


class Lost(Exception):
    """Something is not as it has to be after a crash."""


@dataclass
class Tally:
    """What has been tried."""

    rounds: int = 0
    starting: int = 0
    """Kills before the server was ready."""
    operations: int = 0
    under_way: int = 0
    """Operations that a kill has interrupted."""
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Return it in one line."""
        return (
            f"{self.rounds} rounds, {self.starting} kills while starting, "
            f"{self.operations} operations, {self.under_way} of them interrupted, "
            f"{len(self.failures)} failures"
        )


class Arena:
    """A pool on some medium, where it is mounted, and the server."""

    def __init__(self, medium: Path, home: Path, *, by_fsync: bool) -> None:
        self.pool = medium / "killed.pmem"
        self.directory = home / "mount"
        self.socket = home / "socket"
        self.log = home / "log"
        self.by_fsync = by_fsync
        self.server: ForkProcess | None = None
        self.records: list[Record] = []
        self.directory.mkdir()
        vfsmap("format", self.pool, "--size", _POOL_SIZE)

    def start(self, server: "Callable[[Arena, Connection], None] | None" = None) -> Connection:
        """Start the server; return a pipe on which it tells that it is ready.

        It is a fork, so a round costs no interpreter and no imports; all else is what ``vfsmap
        mount`` runs; ``server`` stands in for it.
        """
        ours, theirs = _FORK.Pipe(duplex=False)
        self.server = _FORK.Process(target=server or be_server, args=(self, theirs))
        self.server.start()
        theirs.close()
        return ours

    def start_and_wait(self) -> None:
        """Start the server, and return when it is ready.

        Raises:
            Lost: it does not start.
        """
        try:
            with self.start() as ready:
                ready.recv()
        except EOFError:
            raise Lost(f"the server does not start; its log is {self.log}") from None

    def kill(self) -> None:
        """Kill the server, if there is one.

        Raises:
            Lost: it does not die.
        """
        if self.server is not None:
            server, self.server = self.server, None
            server.kill()
            server.join(_PATIENCE)
            if server.exitcode is None:
                raise Lost(f"{_PATIENCE} seconds after the kill, the server has not died")

    def stop(self) -> None:
        """Have the server end by itself.

        Raises:
            Lost: it does not, or leaves its socket behind.
        """
        assert self.server is not None
        self.server.terminate()
        self.server.join()
        status, self.server = self.server.exitcode, None
        if status:
            raise Lost(f"told to end, the server ended with {status}")
        if self.socket.exists():
            raise Lost("the server has left its socket behind")

    def require_nothing_left(self) -> None:
        """Return when the killed server's mount, socket and processes are gone.

        Raises:
            Lost: they stay.
        """
        until = time.monotonic() + _PATIENCE
        while left := [*self._names(), *self._processes()]:
            if time.monotonic() > until:
                raise Lost(f"{_PATIENCE} seconds after the kill, there is still: {left}")
            time.sleep(0.005)

    def _names(self) -> Iterator[str]:
        if found := find_mount(self.directory):
            yield f"mount {found}"
        if self.socket.exists():
            yield f"socket {self.socket}"

    def _processes(self) -> list[str]:
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                command = (process / "cmdline").read_bytes().decode(errors="replace")
                if str(self.directory) in command:
                    found.append(f"process {process.name}: {command.replace(chr(0), ' ')}")
        return found

    def require_clean(self) -> None:
        """Do nothing when a check of the pool finds nothing.

        Raises:
            Lost: it does.
        """
        pmem = Pmem.open(self.pool, writable=False)
        try:
            damage = check(scan(pmem)).damage
        finally:
            pmem.close()
        if damage:
            raise Lost(f"check: {'; '.join(map(str, damage))}")

    def place(self, number: int) -> Path:
        """Return a writer's directory."""
        return self.directory / f"writer-{number}"

    def make_places(self) -> None:
        """Make the writers' directories."""
        for number in range(WRITERS):
            self.place(number).mkdir()
        with opened(self.directory) as fd:
            os.fsync(fd)

    def require_nothing_lost(self) -> None:
        """Hold what is there against what the writers know.

        Raises:
            Lost: something else is there.
        """
        for number, record in enumerate(self.records):
            with opened(self.place(number)) as fd:
                complaint = record.complaint(observe(fd), by_fsync=self.by_fsync)
            if complaint:
                raise Lost(f"writer {number}, {record.total} operations: {complaint}")
        self.records = []


def be_server(made: Arena, ready: Connection) -> None:
    """Serve an arena's pool; tell when it is ready."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    logging.basicConfig(filename=made.log, level=logging.INFO, force=True)
    try:
        options = ServerOptions(socket=made.socket)
        run_server(made.pool, made.directory, options, ready=lambda: ready.send(None))
    except BaseException:
        logging.exception("the server has ended")
        raise


@contextmanager
def opened(directory: Path) -> Iterator[int]:
    """Yield a descriptor of a directory."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def arena(medium: str) -> Iterator[Arena]:
    """Yield a formatted pool on a medium of its own; nothing of it is left in the end."""
    with ExitStack() as stack:
        place = stack.enter_context(MEDIA[medium]())
        home = Path(stack.enter_context(TemporaryDirectory(prefix="vfsmap-killing-")))
        made = Arena(place, home, by_fsync=medium == "ext4")
        stack.callback(_clean_up, made)
        yield made


def _clean_up(made: Arena) -> None:
    with suppress(Lost):
        made.kill()
        made.require_nothing_left()
    if find_mount(made.directory):
        subprocess.run(["umount", "--force", "--lazy", made.directory], check=False)


def run_round(made: Arena, seed: int, tally: Tally) -> None:
    """Run one round.

    Raises:
        Lost: something is not as it has to be.
    """
    chance = random.Random(seed)
    if chance.randrange(_STARTING) == 0:
        _kill_while_starting(made, chance)
        tally.starting += 1
    made.start_and_wait()
    if made.place(0).exists():
        made.require_nothing_lost()
    else:
        made.make_places()
    made.records = _write_and_kill(made, seed, chance)
    made.require_nothing_left()
    made.require_clean()
    tally.rounds += 1
    tally.operations += sum(record.total for record in made.records)
    tally.under_way += sum(len(record.trees) > record.finished + 1 for record in made.records)


def _kill_while_starting(made: Arena, chance: random.Random) -> None:
    ready = made.start()
    ready.poll(chance.uniform(0, 0.3))
    made.kill()
    ready.close()
    made.require_nothing_left()
    made.require_clean()


def _write_and_kill(made: Arena, seed: int, chance: random.Random) -> list[Record]:
    writers = []
    try:
        for number in range(WRITERS):
            ours, theirs = _FORK.Pipe()
            arguments = (made, number, seed * 1000 + number, theirs)
            writer = _FORK.Process(target=_be_writer, args=arguments)
            writer.start()
            theirs.close()
            writers.append((writer, ours))
        for _, pipe in writers:
            pipe.recv()
        for _, pipe in writers:
            pipe.send("go")
        time.sleep(chance.uniform(0, _LONGEST))
        made.kill()
        return [_record_of(pipe.recv()) for _, pipe in writers]
    finally:
        made.kill()
        for writer, pipe in writers:
            pipe.close()
            writer.kill()  # one that still has something to tell would wait for ever
            writer.join()


def _record_of(answer: Record | str) -> Record:
    if isinstance(answer, str):
        raise Lost(f"a writer was refused while the server lived: {answer}")
    return answer


def _be_writer(made: Arena, number: int, seed: int, pipe: Connection) -> None:
    with opened(made.place(number)) as fd:
        writer = Writer(fd, seed)
        pipe.send("ready")
        pipe.recv()
        try:
            pipe.send(write_until_gone(writer, by_fsync=made.by_fsync))
        except Exception as exc:
            pipe.send(f"writer {number}: {exc!r}")


def finish(made: Arena) -> None:
    """Check what the last round has left, and that the server ends as it should.

    Raises:
        Lost: something is not as it has to be.
    """
    made.start_and_wait()
    made.require_nothing_lost()
    made.stop()
    made.require_nothing_left()
    done = vfsmap("check", made.pool, check=False)
    if done.returncode:
        raise Lost(f"vfsmap check: {done.stdout}{done.stderr}")


def run(
    medium: str,
    seed: int,
    rounds: int,
    tell: Callable[[str], None] = lambda line: None,
    keep: Path | None = None,
) -> Tally:
    """Run rounds until one fails; ``tell`` is told how it goes."""
    tally = Tally()
    number = seed
    old = signal.signal(signal.SIGALRM, _give_up)
    try:
        with arena(medium) as made:
            try:
                for number in range(seed, seed + rounds):
                    signal.alarm(_HANG)
                    run_round(made, number, tally)
                    if tally.rounds % 10 == 0:
                        tell(f"{medium}: {tally}")
                signal.alarm(_HANG)
                finish(made)
            except Lost as exc:
                tally.failures.append(f"{medium}, seed {number}: {exc}")
                if keep:
                    shutil.copy(made.pool, keep / f"{medium}-{number}.pmem")
                    shutil.copy(made.log, keep / f"{medium}-{number}.log")
                    (keep / f"{medium}-{number}.pickle").write_bytes(pickle.dumps(made.records))
            finally:
                signal.alarm(0)
    finally:
        signal.signal(signal.SIGALRM, old)
    return tally


def _give_up(*_: object) -> None:
    raise Lost(f"something hangs: the round has taken {_HANG} seconds")


@click.command()
@click.option("--medium", type=click.Choice(list(MEDIA)), default="tmpfs", show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=200, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True, help="Names the first round.")
@click.option(
    "--keep",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Keep a failing round's pool, log and operations (a pickle) there.",
)
def main(medium: str, rounds: int, seed: int, keep: Path | None) -> None:
    """Kill a mount's server under eight writers, and see whether anything is lost."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    tally = run(medium, seed, rounds, click.echo, keep)
    for failure in tally.failures:
        click.echo(f"LOST: {failure}", err=True)
    click.echo(f"{medium}: {tally}")
    sys.exit(1 if tally.failures else 0)


if __name__ == "__main__":
    main()
