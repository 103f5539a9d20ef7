"""How many lines of 100 bytes a second: the recorder beside what else keeps a program's last words.

A :class:`Recorder` on a file, without and with ECC, and through :mod:`logging`; beside
``logging.FileHandler``, which flushes each line, beside write(2) with fdatasync(2) in the same
directory, and beside libpmemlog, which is given what it likes best: shared memory that it may take
for persistent.  The directory is the current one, to be on a disk.
"""

import ctypes
import itertools
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from vfsmap.errors import Unsupported
from vfsmap.pstore import Geometry, Recorder, RecorderHandler, format_region
from vfsmap.units import MIB
from vfsmap_tools.bench.results import Plot, Result
from vfsmap_tools.bench.runner import Goal, Measure, alternate, distribution, judge, timed

LINE: Final = b"x" * 99 + b"\n"
LEAST: Final = {"FileHandler": 3.0, "write, fdatasync": 50.0, "libpmemlog": 0.3}
"""How many times as many lines as each of these the recorder has to store."""
ECC_LIMIT: Final = 40.0
"""How many times slower it may be with ECC 16."""

_MEMORY: Final = Path("/dev/shm")
_LINES: Final = {"write, fdatasync": 40, "Recorder, ECC 16": 1000}
Append = Callable[[], object]


@contextmanager
def _recorder(directory: Path, ecc: int) -> Iterator[Recorder]:
    path = directory / f"region-{ecc}"
    format_region(path, Geometry(MIB, ecc=ecc))
    with Recorder(path, watch=False) as recorder:
        yield recorder


@contextmanager
def _handler(handler: logging.Handler, formatted: str) -> Iterator[Append]:
    handler.setFormatter(logging.Formatter(formatted))
    logger = logging.Logger("bench")
    logger.addHandler(handler)
    text = LINE[:-1].decode()
    try:
        yield lambda: logger.info(text)
    finally:
        handler.close()


@contextmanager
def _synced(path: Path) -> Iterator[Append]:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def append() -> None:
        os.write(fd, LINE)
        os.fdatasync(fd)

    try:
        yield append
    finally:
        os.close(fd)


@contextmanager
def _pmemlog(path: Path) -> Iterator[Append]:
    os.environ["PMEM_IS_PMEM_FORCE"] = "1"  # else it calls msync for each line
    library = ctypes.CDLL("libpmemlog.so.1")
    library.pmemlog_create.restype = ctypes.c_void_p
    library.pmemlog_create.argtypes = (ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int)
    library.pmemlog_append.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t)
    library.pmemlog_close.argtypes = (ctypes.c_void_p,)
    library.pmemlog_rewind.argtypes = (ctypes.c_void_p,)
    log = library.pmemlog_create(os.fsencode(path), 256 * MIB, 0o600)
    if not log:
        raise Unsupported(f"libpmemlog can't make {path}")
    try:
        yield lambda: library.pmemlog_append(log, LINE, len(LINE))
    finally:
        library.pmemlog_close(log)


def _rate(append: Append, count: int) -> float:
    began = time.perf_counter()
    for _ in itertools.repeat(None, count):
        append()
    return count / (time.perf_counter() - began)


def run(quick: bool) -> Result:
    """Measure lines a second."""
    rounds, lines = (5, 5000) if quick else (21, 10000)
    result = Result(
        "pstore",
        "A line of the crash log",
        f"Console lines of {len(LINE)} bytes, stored by a Recorder without a system call, beside "
        "what else keeps a program's last words.",
    )
    with ExitStack() as stack:
        # on a disk, if there is one: what is compared with has to get there
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=Path.cwd())))
        memory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=_MEMORY)))
        plain, coded, logged = (
            stack.enter_context(_recorder(home, ecc))
            for home, ecc in ((place, 0), (place, 16), (memory, 0))
        )
        message = "%(message)s"
        peers: dict[str, Append] = {
            # mypy gives a lambda's default no type
            "Recorder": lambda console=plain.console: console(LINE),  # type: ignore[misc]
            # mypy gives a lambda's default no type
            "Recorder, ECC 16": lambda console=coded.console: console(LINE),  # type: ignore[misc]
            "RecorderHandler": stack.enter_context(_handler(RecorderHandler(logged), message)),
            "FileHandler": stack.enter_context(
                _handler(logging.FileHandler(place / "file.log"), message)
            ),
            "write, fdatasync": stack.enter_context(_synced(place / "synced.log")),
            "libpmemlog": stack.enter_context(_pmemlog(memory / "pmemlog")),
        }

        def rate(name: str) -> float:
            return _rate(peers[name], _LINES.get(name, lines))

        measures = [Measure("recording", "lines/s", rate)]
        result.rates = alternate(measures, {name: name for name in peers}, rounds)
        judge(result, [Goal("recording", name, least) for name, least in LEAST.items()])
        slower = result.rates[0].ratio("Recorder, ECC 16")
        result.promise("recording: times slower with ECC 16", slower, ECC_LIMIT, at_most=True)
        samples = {name: timed(append, _LINES.get(name, lines)) for name, append in peers.items()}
    curves = [distribution(name, found) for name, found in samples.items()]
    title = "One line: share of calls that were faster"
    result.plots.append(Plot("latency", title, "microseconds", "%", curves, log_x=True))
    return result
