"""Damage to metadata, drawn with a seed: flipped bits; lost, swapped and foreign sectors."""

import random
from collections.abc import Sequence
from typing import Final, NamedTuple

SECTOR: Final = 512
PAGE: Final = 4096

Area = tuple[int, int]
"""Start and length."""


class Damage(NamedTuple):
    """What was done."""

    kind: str
    ranges: list[Area]
    """Which bytes may have changed."""
    size: int
    """Bytes that are left of the file."""

    def hits(self, start: int, length: int) -> bool:
        """Tell whether a range may have changed, or is gone."""
        return start + length > self.size or any(
            at < start + length and start < at + size for at, size in self.ranges
        )


def inflict(content: bytearray, areas: Sequence[Area], rng: random.Random) -> Damage:
    """Damage ``content`` somewhere in ``areas``, and tell where.

    What a truncation took reads as zeros.
    """
    size = len(content)
    kinds = ("flip", "flip", "flip", "zero", "zero", "noise", "swap", "copy", "truncate")
    kind = rng.choice(kinds)
    if kind == "flip":
        at, length = _place(areas, rng, rng.choice((1, 8, 64)))
        for _ in range(rng.randrange(1, 9)):
            content[at + rng.randrange(length)] ^= 1 << rng.randrange(8)
        return Damage(kind, [(at, length)], size)
    if kind == "truncate":
        left = rng.randrange(size // PAGE) * PAGE
        content[left:] = bytes(size - left)
        return Damage(kind, [], left)
    length = rng.choice((SECTOR, SECTOR, PAGE))
    at = _sector(areas, rng, length)
    if kind == "zero":
        content[at : at + length] = bytes(length)
        return Damage(kind, [(at, length)], size)
    if kind == "noise":
        content[at : at + length] = rng.randbytes(length)
        return Damage(kind, [(at, length)], size)
    other = _sector(areas, rng, length)
    mine, theirs = bytes(content[at : at + length]), bytes(content[other : other + length])
    content[at : at + length] = theirs
    if kind == "copy":
        return Damage(kind, [(at, length)], size)
    content[other : other + length] = mine
    return Damage(kind, [(at, length), (other, length)], size)


def _place(areas: Sequence[Area], rng: random.Random, length: int) -> Area:
    start, size = rng.choice(areas)
    return start + rng.randrange(max(size - length, 1)), length


def _sector(areas: Sequence[Area], rng: random.Random, length: int) -> int:
    start, size = rng.choice(areas)
    return (start + rng.randrange(size)) // length * length
