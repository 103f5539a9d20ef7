"""Sorting the tables of a relocated module, as the kernel does in place when it loads one.

A self-relative field changes by the distance that its entry moves.
"""

import struct
from collections.abc import Callable
from typing import Final, NamedTuple

from vfsmap.kmod.image import Image
from vfsmap.kmod.layout import Area, Layout
from vfsmap.kmod.memory import MASK
from vfsmap.kmod.module import Module


class _Order(NamedTuple):
    entry: struct.Struct
    relative: tuple[tuple[int, int], ...]
    """Field number and byte offset of each self-relative field."""
    key: Callable[[tuple[int, ...]], tuple[int, ...]]
    """Sort key, of fields that are absolute by then."""


_TABLES: Final[dict[str, _Order]] = {
    "__ex_table": _Order(struct.Struct("<iii"), ((0, 0), (1, 4)), lambda f: f[:1]),
    "__jump_table": _Order(
        struct.Struct("<iiq"), ((0, 0), (1, 4), (2, 8)), lambda f: (f[2] & ~3, f[0])
    ),
    ".static_call_sites": _Order(struct.Struct("<ii"), ((0, 0), (1, 4)), lambda f: (f[1] & ~3,)),
    "__mcount_loc": _Order(struct.Struct("<Q"), (), lambda f: f),
}
_ORC_ADDRESS: Final = struct.Struct("<i")
_ORC_ENTRY: Final = 6


def sort_tables(module: Module, layout: Layout, bases: dict[Area, int], image: Image) -> None:
    """Sort all tables that the kernel would sort."""
    for name, order in _TABLES.items():
        span = _span(module, layout, bases, name)
        if span is not None and span[1] % order.entry.size == 0:
            _sort(image, *span, order)
    addresses = _span(module, layout, bases, ".orc_unwind_ip")
    entries = _span(module, layout, bases, ".orc_unwind")
    if addresses and entries and addresses[1] // 4 == entries[1] // _ORC_ENTRY:
        _sort_orc(image, addresses[0], entries[0], addresses[1] // 4)


def _span(
    module: Module, layout: Layout, bases: dict[Area, int], name: str
) -> tuple[int, int] | None:
    section = module.elf.by_name.get(name)
    if section is None or section.number not in layout.places or not section.size:
        return None
    spot = layout.places[section.number]
    return bases[spot.area] + spot.offset, section.size


def _sort(image: Image, start: int, size: int, order: _Order) -> None:
    raw = image.memory.read(start, size)
    step = order.entry.size
    rows = []
    for at, fields in zip(
        range(start, start + size, step), order.entry.iter_unpack(raw), strict=True
    ):
        row = list(fields)
        for field, offset in order.relative:
            row[field] += at + offset
        rows.append(tuple(row))
    rows.sort(key=order.key)
    packed = bytearray()
    for at, fields in zip(range(start, start + size, step), rows, strict=True):
        row = list(fields)
        for field, offset in order.relative:
            row[field] -= at + offset
        packed += _pack(order.entry, row)
    image.memory.write(start, bytes(packed))


def _pack(entry: struct.Struct, row: list[int]) -> bytes:
    """Pack a row; distances wrap as they do in the kernel."""
    wrapped = []
    for code, value in zip(entry.format[1:], row, strict=True):
        bits = 32 if code == "i" else 64
        value &= (1 << bits) - 1
        if code != "Q" and value >> (bits - 1):
            value -= 1 << bits
        wrapped.append(value)
    return entry.pack(*wrapped)


def _sort_orc(image: Image, addresses: int, entries: int, count: int) -> None:
    """Sort the unwind tables: addresses in one section, what holds there in another."""
    raw = image.memory.read(addresses, 4 * count)
    orc = image.memory.read(entries, _ORC_ENTRY * count)
    places = [
        (addresses + 4 * i + value) & MASK
        for i, (value,) in enumerate(_ORC_ADDRESS.iter_unpack(raw))
    ]
    order = sorted(range(count), key=places.__getitem__)
    packed = b"".join(
        _pack(_ORC_ADDRESS, [places[old] - addresses - 4 * new]) for new, old in enumerate(order)
    )
    image.memory.write(addresses, packed)
    image.memory.write(
        entries, b"".join(orc[_ORC_ENTRY * old : _ORC_ENTRY * (old + 1)] for old in order)
    )
