"""Every crash in a row of events: for what is neither a workload nor judged like one.

Making a pool and repairing one are such; :mod:`vfsmap.testing.hunt` does the rest.
"""

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from vfsmap.pmem import Commit, Medium
from vfsmap.testing.power import WORD, Digest, Piece, PowerModel, Ranges, pieces_of, tear
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
    marks: frozenset[str] = frozenset()
    seen: set[tuple[int, int, frozenset[str]]] = set()
    for number, event in enumerate([*events, Mark("end", 0)]):
        states = [(process, choice, pieces, size) for choice, pieces in _deaths(event)]
        if medium.commit is not Commit.STORE and isinstance(
            event, Fence | Msync | Fdatasync | Mark
        ):
            states += [(media, *state) for state in _cuts(model, number, len(content), samples)]
        for digest, choice, pieces, length in states:
            with digest.kept():
                digest.write(pieces)
                key = digest.value, length, marks
                if key not in seen:
                    seen.add(key)
                    yield Left(f"@{number}:{choice}", digest.memory, length, marks)
        if isinstance(event, Mark):
            marks |= {event.what}
        size = event.size if isinstance(event, Resize) else size
        process.write(pieces_of(event))
        model.feed(event)


def _deaths(event: Event) -> Iterator[tuple[str, list[Piece]]]:
    """Yield the deaths of a process in front of an event, and in the middle of a store."""
    if isinstance(event, Store | Punch | Mark):
        yield "k", []
    if isinstance(event, Store):
        for choice in ("t1", "t2"):
            yield choice, list(tear(event, WORD, random.Random(choice)))


def _cuts(
    model: PowerModel, number: int, length: int, samples: int
) -> Iterator[tuple[str, list[Piece], int]]:
    """Yield the power cuts that are possible right now."""
    parts = model.parts(Ranges([(0, length)]))
    for choice in model.choices(parts, samples, random.Random(number)):
        yield choice, *model.state(parts, choice)
