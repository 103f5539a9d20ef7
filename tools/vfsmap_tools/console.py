"""How commands speak: sizes as arguments, tables or JSON as output, errors as one line."""

import contextlib
import errno
import functools
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from logging import ERROR
from typing import IO, Any, ParamSpec, TypeVar

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from vfsmap.errors import Invalid, VfsmapError
from vfsmap.units import Level, format_size, parse_level, parse_size
from vfsmap_tools.escaping import json_text, printable
from vfsmap_tools.logs import for_journal, is_journal

P = ParamSpec("P")
R = TypeVar("R")


class SizeType(click.ParamType[int]):
    """A size such as ``8G``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the bytes that a text names."""
        try:
            return parse_size(value)
        except Invalid as exc:
            self.fail(str(exc), param, ctx)


class LevelType(click.ParamType[Level]):
    """A level of the page table, by its size: ``4K``, ``2M``, ``1G``."""

    name = "level"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Level:
        """Return the level that a text names."""
        if isinstance(value, Level):
            return value
        try:
            return parse_level(value)
        except Invalid as exc:
            self.fail(str(exc), param, ctx)


_WIDEST = 1000  # columns of a table
_HINTS = {
    errno.ENOSPC: "make room there; a pool is made larger by vfsmap resize",
    errno.EROFS: "it is mounted read-only, or vfsmap check tells why the pool can't be written",
    errno.ENOTCONN: "the mount's server has gone; mount again",
    errno.EACCES: "ask its owner, or root",
    errno.EPERM: "it is sealed, or only its owner and root may",
}
"""What can be done about what a file system says."""

SIZE = SizeType()
LEVEL = LevelType()


def json_option(command: Callable[P, R]) -> Callable[P, R]:
    """Give a command the option ``--json``, as its argument ``as_json``."""
    option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
    return option(command)


def complain(error: VfsmapError | OSError | str) -> None:
    """Print what was wrong, in one line, where errors go."""
    text = printable(f"vfsmap: {error}")
    print(for_journal(text, ERROR) if is_journal(sys.stderr) else text, file=sys.stderr)


def errors_exit(command: Callable[P, R]) -> Callable[P, R]:
    """Turn errors into one line and an exit code; the one place where they become that."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except VfsmapError as exc:
            complain(exc)
            sys.exit(exc.exit_code)
        except BrokenPipeError:
            sys.exit(1)
        except OSError as exc:
            where = f"{exc.filename}: " if exc.filename else ""
            hint = f"; {_HINTS[exc.errno]}" if exc.filename and exc.errno in _HINTS else ""
            complain(f"{where}{exc.strerror or exc}{hint}")
            sys.exit(1)

    return wrapped


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Have SIGTERM and SIGHUP end the block as SIGINT does, so that it can clean up."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signals = (signal.SIGTERM, signal.SIGHUP)
    before = {one: signal.getsignal(one) for one in signals}
    try:
        for one, handler in before.items():
            if handler is not signal.SIG_IGN:  # as nohup has it
                signal.signal(one, interrupt)
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def print_line(text: str = "", *, file: IO[str] | None = None, flush: bool = False) -> None:
    """Print one line for people, whatever the names in it hold."""
    print(printable(text), file=file, flush=flush)


def print_json(value: object, *, indent: int | None = 2, file: IO[str] | None = None) -> None:
    """Print one JSON document; without ``indent`` on one line, as one of many."""
    print(json_text(value, indent), file=file, flush=True)


def print_facts(facts: Mapping[str, object], *, as_json: bool) -> None:
    """Print names and values, as two columns or as JSON."""
    if as_json:
        print_json(facts)
        return
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        print_line(f"{name.replace('_', ' '):<{width}}  {value}")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; numbers to the right, and nothing cut off for want of room."""
    table = Table(box=None, pad_edge=False)
    rows = [list(row) for row in rows]
    for at, column in enumerate(columns):
        numbers = all(isinstance(row[at], int) for row in rows)
        table.add_column(column, justify="right" if numbers else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(printable(str(cell))) for cell in row))  # Text: [b] is no markup
    Console(highlight=False, width=_WIDEST).print(table)


def page_sizes_text(page_sizes: Mapping[int, int]) -> str:
    """Return page sizes and the bytes mapped by each as people read them."""
    parts = [
        f"{format_size(total)} in {format_size(size)}"
        for size, total in page_sizes.items()
        if total
    ]
    return ", ".join(parts) or "nothing"


def progress(*, hidden: bool = False) -> Progress:
    """Return a progress bar in bytes, on the terminal's error stream."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=hidden or not console.is_terminal,
        transient=True,
    )
