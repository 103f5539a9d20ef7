"""Placing a module at addresses: sections copied, symbols resolved, relocations applied.

Source: arch/x86/kernel/module.c and simplify_symbols() in kernel/module/main.c.
"""

import struct
from collections.abc import Callable
from typing import Final

from vfsmap.errors import Damaged, NotFound, Unsupported
from vfsmap.kmod.elf import SHN_ABS, SHN_COMMON, SHN_LORESERVE, SHN_UNDEF, STB_WEAK
from vfsmap.kmod.image import NEW, OLD, TABLES, Dialect, Image, Span
from vfsmap.kmod.layout import Area, Layout
from vfsmap.kmod.memory import MASK, Memory, Region
from vfsmap.kmod.module import Module

NONE, R_64, PC32, PLT32, R_32, R_32S, PC64 = 0, 1, 2, 4, 10, 11, 24
NAMES: Final = {
    NONE: "NONE",
    R_64: "64",
    PC32: "PC32",
    PLT32: "PLT32",
    R_32: "32",
    R_32S: "32S",
    PC64: "PC64",
}
_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")
_ZERO: Final = {4: bytes(4), 8: bytes(8)}

Resolver = Callable[[str], int | None]


def dialect_of(module: Module) -> Dialect:
    """Tell by its contents which kernel's patching a module wants.

    Raises:
        Unsupported: its alternatives have neither of the known sizes.
    """
    dialect = NEW if ".orc_header" in module.elf.by_name else OLD
    section = module.elf.by_name.get(".altinstructions")
    if section is None:
        return dialect
    first = [row[0] for row in module.elf.relocations(section)][:3]
    size = first[2] - first[0] if len(first) == 3 else section.size
    if size != dialect.alternative_size:
        raise Unsupported(
            f"{module.file_name}: alternatives of {size} bytes; {OLD.alternative_size} (6.1) and "
            f"{NEW.alternative_size} (6.12) are known"
        )
    return dialect


def place(module: Module, layout: Layout, bases: dict[Area, int]) -> Image:
    """Copy a module's sections to their places; nothing is relocated yet.

    Raises:
        Damaged: the layout breaks a rule.
    """
    memory = Memory(module.file_name)
    regions = {}
    for area, base in bases.items():
        regions[area] = Region(area.value, base, bytearray(layout.sizes[area]))
        memory.add(regions[area])
    for index, spot in layout.places.items():
        content = module.elf.content(module.elf.sections[index])
        if spot.area in regions:
            regions[spot.area].data[spot.offset : spot.offset + len(content)] = content
    empty = Region("", 0, bytearray())
    image = Image(
        memory,
        dialect_of(module),
        regions.get(Area.TEXT, empty).span,
        regions.get(Area.INIT_TEXT, empty).span,
    )
    _find_tables(module, layout, bases, image)
    return image


def _find_tables(module: Module, layout: Layout, bases: dict[Area, int], image: Image) -> None:
    for name in TABLES:
        section = module.elf.by_name.get(name)
        if section is None or section.number not in layout.places or not section.size:
            continue
        spot = layout.places[section.number]
        image.tables[name] = Span(bases[spot.area] + spot.offset, section.size)
    text = module.elf.by_name.get(".text")
    if image.dialect is OLD and text is not None and text.number in layout.places:
        start = bases[Area.TEXT] + layout.places[text.number].offset
        image.lock_text = range(start, start + text.size)


def symbol_values(
    module: Module, layout: Layout, bases: dict[Area, int], resolve: Resolver
) -> list[int]:
    """Return the value of every symbol, in the file's order.

    Raises:
        NotFound: nobody supplies some of the imports; it names them.
        Unsupported: a common symbol, or one of a live patch.
    """
    elf = module.elf
    starts = [0] * len(elf.sections)
    for index, spot in layout.places.items():
        starts[index] = bases.get(spot.area, 0) + spot.offset
    values, missing = [], []
    for row in elf.symbol_rows:
        index = row[3]
        if index == SHN_UNDEF:
            name = elf.symbol_name(row)
            found = resolve(name) if name else 0
            if found is None and row[1] >> 4 != STB_WEAK:
                missing.append(name)
            values.append(found or 0)
        elif index < SHN_LORESERVE:
            values.append(starts[index] + row[4])
        elif index == SHN_ABS:
            values.append(row[4])
        else:
            what = "common" if index == SHN_COMMON else f"special ({index:#x})"
            raise Unsupported(f"{elf.name}: {elf.symbol_name(row)} is a {what} symbol")
    if missing:
        names = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise NotFound(f"{elf.name}: the host supplies no {names} ({len(missing)} missing)")
    return values


def relocate(
    module: Module, layout: Layout, bases: dict[Area, int], image: Image, values: list[int]
) -> None:
    """Apply all relocations of the sections that were placed.

    Raises:
        Damaged: an unknown type, a place outside its section or not zero, a value too large.
    """
    by_area = {region.name: region for region in image.memory.regions}
    for index, spot in layout.places.items():
        section = module.elf.sections[index]
        region = by_area.get(spot.area.value)
        if region is not None and section.size and spot.area is not Area.PERCPU:
            _relocate_section(
                module,
                index,
                memoryview(region.data)[spot.offset :][: section.size],
                bases[spot.area] + spot.offset,
                values,
            )


def _relocate_section(
    module: Module, index: int, data: memoryview, start: int, values: list[int]
) -> None:
    section = module.elf.sections[index]
    size_of = {R_64: 8, PC64: 8, PC32: 4, PLT32: 4, R_32: 4, R_32S: 4}
    put = {4: _U32.pack_into, 8: _U64.pack_into}
    try:
        for offset, info, addend in module.elf.relocations(section):
            kind = info & 0xFFFF_FFFF
            if kind == NONE:
                continue
            size = size_of[kind]
            value = (values[info >> 32] + addend) & MASK
            if kind in (PC32, PLT32, PC64):
                value -= start + offset
            elif not _fits(kind, value):
                raise _too_large(module, section.name, info, offset)
            if data[offset : offset + size] != _ZERO[size]:
                raise Damaged(
                    f"{module.file_name}: the place of the relocation at {section.name}+"
                    f"{offset:#x} is not zero, or outside the section"
                )
            put[size](data, offset, value & (0xFFFF_FFFF if size == 4 else MASK))
    except KeyError as exc:
        raise Damaged(
            f"{module.file_name}: relocation of the unknown type {exc} in {section.name}"
        ) from exc
    except IndexError as exc:
        raise Damaged(
            f"{module.file_name}: a relocation in {section.name} names a symbol that is none"
        ) from exc


def _fits(kind: int, value: int) -> bool:
    """Tell whether an absolute value survives being cut to the field of a relocation."""
    if kind == R_32S:
        return value < 1 << 31 or value >= MASK - (1 << 31) + 1
    return kind != R_32 or value < 1 << 32


def _too_large(module: Module, section: str, info: int, offset: int) -> Damaged:
    name = module.elf.symbols[info >> 32].name
    return Damaged(
        f"{module.file_name}: the address of {name} does not fit 32 bits at {section}+{offset:#x}"
    )
