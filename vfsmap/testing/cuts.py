"""Every crash in a row of events: for what is neither a workload nor judged like one.

Making a pool and repairing one are such; :mod:`vfsmap.testing.hunt` does the rest.
"""

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from vfsmap.pmem import Commit, Medium
from vfsmap.testing.power import WORD, Digest, PowerModel, Ranges, tear
from vfsmap.testing.recording import (
    Event,
    Fdatasync,
    Fence,
    Mark,
    Memory,
    Msync,
    Punch,
    Resize,
    Store,
)


class Left(NamedTuple):
    """What a crash left."""

    name: str
    """``@17:m5``: in front of which event, and which of the states."""
    memory: Memory
    """Whose changes are taken back when the next crash is asked for."""
    size: int
    """Bytes of it that the medium has."""
    marks: frozenset[str]
    """The notes that were made before."""


def crashes(
    events: Sequence[Event], content: bytes, size: int, medium: Medium, *, samples: int = 4
) -> Iterator[Left]:
    """Yield what each crash leaves of a medium that held ``content``; what comes twice, once."""
    process, media = Digest(Memory(content)), Digest(Memory(content))
    model = PowerModel(media, size, medium.commit)
    everything = Ranges([(0, len(content))])
    marks: frozenset[str] = frozenset()
    seen: set[tuple[int, int, frozenset[str]]] = set()

    def new(digest: Digest, length: int) -> bool:
        key = digest.value, length, marks
        known = key in seen
        seen.add(key)
        return not known

    for number, event in enumerate([*events, Mark("end", 0)]):
        if isinstance(event, Store | Punch | Mark):
            for choice in ("k", "t1", "t2") if isinstance(event, Store) else ("k",):
                with process.kept():
                    if choice != "k" and isinstance(event, Store):
                        process.write(tear(event, WORD, random.Random(choice)))
                    if new(process, size):
                        yield Left(f"@{number}:{choice}", process.memory, size, marks)
        powered = medium.commit is not Commit.STORE
        if powered and isinstance(event, Fence | Msync | Fdatasync | Mark):
            parts = model.parts(everything)
            for choice in model.choices(parts, samples, random.Random(number)):
                pieces, length = model.state(parts, choice)
                with media.kept():
                    media.write(pieces)
                    if new(media, length):
                        yield Left(f"@{number}:{choice}", media.memory, length, marks)
        if isinstance(event, Mark):
            marks |= {event.what}
        _do(event, process)
        size = event.size if isinstance(event, Resize) else size
        model.feed(event)


def _do(event: Event, process: Digest) -> None:
    """Have the memory hold what an event stores."""
    if isinstance(event, Store):
        process.write([event])
    elif isinstance(event, Punch):
        process.write([(event.offset, bytes(event.length))])
