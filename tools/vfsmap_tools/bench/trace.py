"""A seeded life of a file system: files are made, grow, and are deleted, for a long time.

The trace is worked out before anything is done, so that each file system lives the same life.
"""

import math
import random
from collections.abc import Iterator
from typing import Final, Literal, NamedTuple

from vfsmap.units import KIB, MIB

FULL: Final = 0.75
"""How full the file system is kept."""
_LARGE: Final = 0.03
"""The part of the files that is of 2 MiB and more from the start."""
_GROWS: Final = 0.3
"""How often a file grows instead of another being made."""
_SMALL_SIZES: Final = (KIB, 2 * MIB)
_LARGE_SIZES: Final = (2 * MIB, 64 * MIB)


class Step(NamedTuple):
    """What happens to one file."""

    kind: Literal["create", "grow", "delete"]
    file: int
    length: int
    """Bytes that are appended."""
    turnover: float
    """How often the file system's bytes have been written over by then; 0 is when it is full."""


def trace(capacity: int, turnovers: int, seed: int = 1) -> Iterator[Step]:
    """Yield the steps that fill ``capacity`` bytes to 75 %, then turn them over so often."""
    chance = random.Random(seed)
    full = int(capacity * FULL)
    files: dict[int, int] = {}
    order: list[int] = []
    live = written = number = 0
    filled = False
    while written < full * turnovers:
        grows = bool(order) and chance.random() < _GROWS
        file = chance.choice(order) if grows else (number := number + 1)
        old = files.get(file, 0)
        length = min(_size(chance, old), full // 8)
        while live + length > full:
            filled = True
            at = chance.randrange(len(order))
            gone = order[at]
            if gone == file:
                if len(order) == 1:
                    break
                continue
            order[at] = order[-1]
            order.pop()
            live -= files.pop(gone)
            yield Step("delete", gone, 0, written / full)
        if file not in files:
            order.append(file)
        files[file] = old + length
        live += length
        if filled:
            written += length
        yield Step("grow" if old else "create", file, length, written / full)


def _size(chance: random.Random, old: int) -> int:
    """Return how many bytes a new file gets, or one of ``old`` bytes gets more."""
    if old:
        low, high = max(KIB, old // 16), max(2 * KIB, old // 2)
    else:
        low, high = _LARGE_SIZES if chance.random() < _LARGE else _SMALL_SIZES
    return int(math.exp(chance.uniform(math.log(low), math.log(high))))
