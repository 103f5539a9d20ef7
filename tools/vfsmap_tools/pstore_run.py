"""``vfsmap pstore run``: a command whose output is recorded, and whose crash leaves a record."""

import os
import resource
import selectors
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Any, Final, NoReturn

from vfsmap.errors import NoSpace, NotFound
from vfsmap.pstore import Recorder
from vfsmap_tools.console import complain

_CHUNK: Final = 65536
_NOT_FOUND: Final = 127  # what shells say
_NOT_STARTED: Final = 126


class _Stream:
    """One of the command's outputs: passed on at once, recorded by whole lines."""

    def __init__(self, recorder: Recorder, source: IO[bytes], target: int) -> None:
        self.source = source
        self._recorder = recorder
        self._target: int | None = target
        self._rest = b""

    def pump(self) -> bool:
        """Pass on what is there; false: the stream has ended."""
        data = os.read(self.source.fileno(), _CHUNK)
        self._pass_on(data)
        head, newline, self._rest = (self._rest + data).rpartition(b"\n")
        if len(self._rest) > _CHUNK:  # somebody who never ends a line
            head, self._rest = head + newline + self._rest, b""
            newline = b""
        if head or newline:
            self._recorder.console(head + newline)
        return bool(data)

    def finish(self) -> None:
        """Record what came after the last newline."""
        self._recorder.console(self._rest)
        self.source.close()

    def _pass_on(self, data: bytes) -> None:
        while data and self._target is not None:
            try:
                data = data[os.write(self._target, data) :]
            except BrokenPipeError:
                self._target = None  # nobody listens any more; it is recorded all the same


def run_recorded(recorder: Recorder, command: Sequence[str]) -> tuple[int, str | None]:
    """Run a command; return its status (minus the signal) and the name of its crash record."""
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except OSError as exc:
        complain(f"{command[0]}: {exc.strerror}")
        return (_NOT_FOUND if isinstance(exc, FileNotFoundError) else _NOT_STARTED), None
    with _signals_passed_to(process) as signalled:
        _pump_all(recorder, process, signalled)
        status = process.wait()
    recorder.persist()
    if status == 0:
        return 0, None
    what = f"exit status {status}" if status > 0 else _describe(-status)
    text = f"{shlex.join(command)} [{process.pid}]: {what}\n"
    try:
        return status, recorder.dmesg("Oops" if status > 0 else "Panic", text)
    except (NoSpace, NotFound) as exc:
        complain(exc)
        return status, None


def leave_with(status: int) -> NoReturn:
    """End this process as the command did: with its exit status, or by its signal."""
    sys.stdout.flush()
    if status < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the command's own is enough
        with suppress(OSError):
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status if status >= 0 else 128 - status)


def _pump_all(recorder: Recorder, process: "subprocess.Popen[bytes]", signalled: int) -> None:
    """Pass on both streams until the command ends: its children may keep them.

    ``signalled`` becomes readable when a signal has come, which may be while nobody waits yet.
    """
    assert process.stdout
    assert process.stderr
    streams = (
        _Stream(recorder, process.stdout, sys.stdout.fileno()),
        _Stream(recorder, process.stderr, sys.stderr.fileno()),
    )
    ended = os.pidfd_open(process.pid)
    with selectors.DefaultSelector() as selector:
        for stream in streams:
            selector.register(stream.source, selectors.EVENT_READ, stream)
        selector.register(ended, selectors.EVENT_READ)
        selector.register(signalled, selectors.EVENT_READ)
        while True:
            ready = [key for key, _ in selector.select()]
            for key in ready:
                if key.fileobj == signalled:
                    os.read(signalled, _CHUNK)
                elif key.data and not key.data.pump():
                    selector.unregister(key.fileobj)
            if ended in [key.fileobj for key in ready] and not any(key.data for key in ready):
                break  # the command has ended, and what it said is through
    os.close(ended)
    for stream in streams:
        stream.finish()


@contextmanager
def _signals_passed_to(process: "subprocess.Popen[bytes]") -> Iterator[int]:
    """Hand on what would end us; what a terminal sends, the command gets by itself.

    Yields a descriptor that becomes readable when a signal has come: one that comes just before a
    wait begins does not interrupt it, and its handler runs only when the wait is over.
    """

    def pass_on(number: int, frame: Any) -> None:
        with suppress(ProcessLookupError):
            process.send_signal(number)

    def ignore(number: int, frame: Any) -> None:
        pass

    handlers = {signal.SIGTERM: pass_on, signal.SIGHUP: pass_on}
    handlers |= {signal.SIGINT: ignore, signal.SIGQUIT: ignore}
    readable, writable = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    old_wakeup = signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    old = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield readable
    finally:
        signal.set_wakeup_fd(old_wakeup)
        os.close(readable)
        os.close(writable)
        for number, handler in old.items():
            signal.signal(number, handler)


def _describe(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = "a signal without a name"
    return f"killed by signal {number} ({name})"
