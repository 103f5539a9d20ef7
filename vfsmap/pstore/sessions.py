"""Programs that record here, so that one which could not say goodbye gets its record anyway.

A program enters itself into a free session slot of some margin and leaves when it ends.  Whoever
opens the region next finds those who never left, and writes the record that they could not.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from vfsmap.errors import NoSpace
from vfsmap.pstore.margin import Margin, Session


class Slot(NamedTuple):
    """Where a session is entered."""

    margin: Margin
    number: int


def this_session() -> Session:
    """Return the session of this process."""
    pid = os.getpid()
    name = Path(sys.argv[0] if sys.argv and sys.argv[0] else sys.executable or "python").name
    return Session(pid, _start_of(pid) or 0, _namespace(), _boot(), name)


def enter(margins: Sequence[Margin], session: Session) -> Slot:
    """Enter a session into the first free slot.

    Raises:
        NoSpace: there is none: too many programs, dmesg zones of less than 4 KiB, or none at all.

    Crash: entered or not.
    """
    for margin in margins:
        for number, there in margin.read_sessions():
            if there is None:
                margin.write_session(number, session)
                return Slot(margin, number)
    raise NoSpace("no free session slot: the region needs more dmesg zones, of 4 KiB or more each")


def leave(slot: Slot, session: Session) -> None:
    """Take a session out, if it is still there.

    Crash: still there or not.
    """
    if session in (there for _, there in slot.margin.read_sessions()):
        slot.margin.write_session(slot.number, None)


def find_dead(margins: Sequence[Margin]) -> Iterator[tuple[Slot, Session]]:
    """Yield the sessions whose process has ended without leaving."""
    for margin in margins:
        for number, session in margin.read_sessions():
            if session and _is_dead(session):
                yield Slot(margin, number), session


def _is_dead(session: Session) -> bool:
    if session.boot != _boot():
        return True
    if session.namespace != _namespace():
        return False  # its pid says nothing here
    return _start_of(session.pid) != session.start


def _start_of(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot; None: it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _namespace() -> int:
    return Path("/proc/self/ns/pid").stat().st_ino


def _boot() -> bytes:
    text = Path("/proc/sys/kernel/random/boot_id").read_text()
    return bytes.fromhex(text.strip().replace("-", ""))
