"""Sizes, alignment and the levels of a page table.

A level is a value: there is no function for one level beside another for the next, there is one
that is handed a :class:`Level`.
"""

import re
from typing import Final, NamedTuple

from vfsmap.errors import Invalid, NotAligned

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
TIB: Final = 1 << 40


class Level(NamedTuple):
    """A level of the page table; one of its entries maps ``1 << shift`` bytes."""

    name: str
    shift: int

    @property
    def size(self) -> int:
        """Bytes that one entry of this level maps."""
        return 1 << self.shift

    def __str__(self) -> str:
        return self.name


PTE: Final = Level("PTE", 12)
PMD: Final = Level("PMD", 21)
PUD: Final = Level("PUD", 30)
LEVELS: Final = (PTE, PMD, PUD)
"""The levels that can hold a leaf on x86-64, smallest first."""


class Extent(NamedTuple):
    """A run of pool bytes owned by one file."""

    offset: int
    """Where it starts in the file, bytes."""
    start: int
    """Where it starts in the pool, bytes."""
    length: int
    """Bytes; a multiple of 4 KiB."""


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
_FACTOR: Final[dict[str, int]] = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": TIB}


def parse_size(text: str | int) -> int:
    """Return the bytes that ``text`` names: ``4096``, ``"64K"``, ``"1.5G"``, ``"2MiB"``.

    Raises:
        Invalid: it is not a size, or not a whole number of bytes.
    """
    if isinstance(text, int):
        if text < 0:
            raise Invalid(f"a size can't be negative: {text}")
        return text
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise Invalid(f"{text!r} is not a size; write it like 4096, 64K, 512M or 8G")
    number, unit = match.groups()
    whole, _, fraction = number.partition(".")
    scale: int = 10 ** len(fraction)
    size, rest = divmod(int(whole + fraction) * _FACTOR[unit.upper()], scale)
    if rest:
        raise Invalid(f"{text!r} is not a whole number of bytes")
    return size


def format_size(size: int) -> str:
    """Return ``size`` as people write it; exact where a unit divides it, else one decimal."""
    for unit in "TGMK":
        factor = _FACTOR[unit]
        if size >= factor:
            return f"{size // factor}{unit}" if size % factor == 0 else f"{size / factor:.1f}{unit}"
    return str(size)


def parse_level(text: str) -> Level:
    """Return the level named ``PTE``, ``PMD`` or ``PUD``, or by its size: ``4K``, ``2M``, ``1G``.

    Raises:
        Invalid: there is no such level.
    """
    for level in LEVELS:
        if text.upper() in (level.name, format_size(level.size)):
            return level
    raise Invalid(f"{text!r} is not a level; use 4K, 2M or 1G (PTE, PMD, PUD)")


def align_down(value: int, align: int) -> int:
    """Return the largest multiple of ``align``, a power of two, that is at most ``value``."""
    return value & -align


def align_up(value: int, align: int) -> int:
    """Return the smallest multiple of ``align``, a power of two, that is at least ``value``."""
    return (value + align - 1) & -align


def require_aligned(what: str, value: int, align: int) -> int:
    """Return ``value`` when it is a multiple of ``align``.

    Raises:
        NotAligned: it is not.
    """
    if value % align:
        raise NotAligned(what, value, align)
    return value


def largest_level(offset: int, size: int, levels: tuple[Level, ...] = LEVELS) -> Level | None:
    """Return the largest level whose entry starts at ``offset`` and fits in ``size`` bytes."""
    for level in reversed(levels):
        if offset % level.size == 0 and level.size <= size:
            return level
    return None
