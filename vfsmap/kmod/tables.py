"""The tables of patch sites, decoded from an image in memory.

"Self-relative" fields hold the distance from themselves to what they name.  Source: the structures
of those names in the kernel's headers (asm/alternative.h, asm/paravirt_types.h, linux/jump_label.h,
linux/static_call_types.h); entry sizes measured on Debian's 6.1 and 6.12 kernels.
"""

import struct
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from vfsmap.errors import Damaged
from vfsmap.kmod.image import (
    ALTERNATIVES,
    CALLS,
    ENDBR,
    FTRACE,
    JUMPS,
    LOCKS,
    PARAVIRT,
    RETPOLINES,
    RETURNS,
    STATIC_CALLS,
    Image,
    Span,
)
from vfsmap.kmod.memory import MASK

_OLD_ALTERNATIVE: Final = struct.Struct("<iiHBB")
_NEW_ALTERNATIVE: Final = struct.Struct("<iiHHBB")
_PARAVIRT: Final = struct.Struct("<QBB6x")
_OFFSET: Final = struct.Struct("<i")
_ADDRESS: Final = struct.Struct("<Q")
_JUMP: Final = struct.Struct("<iiq")
_STATIC_CALL: Final = struct.Struct("<ii")
_INVERTED: Final = 0x8000
_CONDITIONAL: Final = range(0x80, 0x90)


class Alternative(NamedTuple):
    """Instructions and what replaces them on CPUs with (or without) a feature."""

    address: int
    replacement: int
    feature: int
    inverted: bool
    direct_call: bool
    length: int
    replacement_length: int


class ParavirtSite(NamedTuple):
    """An indirect call through a slot of ``pv_ops``."""

    address: int
    slot: int
    length: int


class Jump(NamedTuple):
    """A jump label: a jump or a nop, as a key says."""

    address: int
    target: int
    key: int
    branch: bool
    """Whether it jumps while the key is off."""
    entry: int
    """Where its entry is, for the messages."""


class StaticCall(NamedTuple):
    """A direct call of the function that a key names."""

    address: int
    key: int
    tail: bool


def _rows(image: Image, name: str, entry: struct.Struct) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Yield the address and the fields of each entry of a table."""
    span = image.tables.get(name)
    if span is None:
        return
    if span.size % entry.size:
        raise Damaged(f"{image.name}: {name} has {span.size} bytes, not a multiple of {entry.size}")
    region = image.memory.find(span.address, span.size, name)
    at = span.address - region.start
    rows = entry.iter_unpack(bytes(region.data[at : at + span.size]))
    yield from zip(range(span.address, span.address + span.size, entry.size), rows, strict=True)


def offsets(image: Image, name: str) -> list[int]:
    """Return what each self-relative word of a table points to; zero words are padding."""
    return [(at + row[0]) & MASK for at, row in _rows(image, name, _OFFSET) if row[0]]


def constants(image: Image, span: Span) -> list[int]:
    """Return the places that a table of runtime constants names."""
    step = _OFFSET.size
    return [
        (at + image.memory.s32(at, "a runtime constant")) & MASK
        for at in range(span.address, span.address + span.size - step + 1, step)
    ]


def addresses(image: Image, name: str) -> list[int]:
    """Return the absolute addresses that a table holds.

    A kernel's may hold padding: zeros when it was linked, which move with it.
    """
    found = [row[0] for _, row in _rows(image, name, _ADDRESS)]
    return [at for at in found if at in image.memory] if image.is_kernel else found


def alternatives(image: Image) -> list[Alternative]:
    """Return the alternatives in the order in which they are applied."""
    if image.dialect.alternative_size == _OLD_ALTERNATIVE.size:
        return [
            Alternative(
                (at + row[0]) & MASK,
                (at + 4 + row[1]) & MASK,
                row[2] & ~_INVERTED,
                bool(row[2] & _INVERTED),
                False,
                row[3],
                row[4],
            )
            for at, row in _rows(image, ALTERNATIVES, _OLD_ALTERNATIVE)
        ]
    return [
        Alternative(
            (at + row[0]) & MASK,
            (at + 4 + row[1]) & MASK,
            row[2],
            bool(row[3] & 1),
            bool(row[3] & 2),
            row[4],
            row[5],
        )
        for at, row in _rows(image, ALTERNATIVES, _NEW_ALTERNATIVE)
    ]


def paravirt_sites(image: Image) -> list[ParavirtSite]:
    """Return the calls through ``pv_ops``."""
    return [ParavirtSite(*row) for _, row in _rows(image, PARAVIRT, _PARAVIRT)]


def jumps(image: Image) -> list[Jump]:
    """Return the jump labels."""
    return [
        Jump(
            (at + code) & MASK,
            (at + 4 + target) & MASK,
            (at + 8 + key) & MASK & ~3,
            bool((at + 8 + key) & 1),
            at,
        )
        for at, (code, target, key) in _rows(image, JUMPS, _JUMP)
    ]


def static_calls(image: Image) -> list[StaticCall]:
    """Return the sites of static calls."""
    return [
        StaticCall((at + site) & MASK, (at + 4 + key) & MASK & ~3, bool((at + 4 + key) & 1))
        for at, (site, key) in _rows(image, STATIC_CALLS, _STATIC_CALL)
    ]


class Site(NamedTuple):
    """A place in text that the kernel may patch."""

    address: int
    length: int


def _of_length(length: int) -> Callable[[Image, str], list[Site]]:
    return lambda image, name: [Site(address, length) for address in offsets(image, name)]


def _branches(image: Image, name: str) -> list[Site]:
    """Return sites of calls and jumps: longer by a byte with a prefix, or when conditional."""
    found = []
    for address in offsets(image, name):
        first = image.memory.read(address, 1, name)[0]
        found.append(Site(address, 6 if first in (0x2E, 0x0F) else 5))
    return found


def jump_length(image: Image, address: int) -> int:
    """Return how long the instruction of a jump label is.

    Raises:
        Damaged: it is neither a jump nor one of the two nops that stand for one.
    """
    first = image.memory.read(address, 2, JUMPS)
    if first in (b"\x0f\x1f",) or first[0] == 0xE9:
        return 5
    if first == b"\x66\x90" or first[0] == 0xEB:
        return 2
    raise Damaged(f"{image.name}: no jump label at {address:#x}: it has {first.hex()}")


_READERS: Final[dict[str, Callable[[Image, str], list[Site]]]] = {
    ALTERNATIVES: lambda image, _: [Site(a.address, a.length) for a in alternatives(image)],
    PARAVIRT: lambda image, _: [Site(p.address, p.length) for p in paravirt_sites(image)],
    RETPOLINES: _branches,
    RETURNS: _of_length(5),
    CALLS: _of_length(5),
    ENDBR: _of_length(4),
    LOCKS: _of_length(1),
    JUMPS: lambda image, _: [Site(j.address, jump_length(image, j.address)) for j in jumps(image)],
    STATIC_CALLS: lambda image, _: [
        Site(c.address, 6 if image.memory.read(c.address, 1, STATIC_CALLS) == b"\x0f" else 5)
        for c in static_calls(image)
    ],
    FTRACE: lambda image, name: [Site(address, 5) for address in addresses(image, name)],
}


def sites(image: Image, name: str) -> list[Site]:
    """Return all sites of one table.

    Raises:
        Damaged: the table is not made of whole entries, or a site lies outside the image.
    """
    return _READERS[name](image, name)
