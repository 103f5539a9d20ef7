"""Plans: the places in text that loading may write, and the pokes that lead from one to another."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Final

from vfsmap.errors import Damaged, NotFound
from vfsmap.guard import Poke
from vfsmap.kmod.bind import Placed
from vfsmap.kmod.branches import CALL, branch
from vfsmap.kmod.host import Host
from vfsmap.kmod.image import FTRACE, TABLES, Image
from vfsmap.kmod.keys import jump_code
from vfsmap.kmod.layout import Area
from vfsmap.kmod.nops import NOPS
from vfsmap.kmod.relocate import NONE, PC64, R_64
from vfsmap.kmod.tables import Site, addresses, constants, jumps, sites

_PAD: Final = b"\x90" * 9
TRAMPOLINE: Final = "__SCT__"


def write_set(placed: Placed) -> list[Site]:
    """Return every place in core text that loading the module may write, anywhere.

    These are the fields of relocations, the sites of all tables, and, where calls can be counted,
    the padding in front of functions.
    """
    text = placed.image.text
    found = [
        Site(text.start + spot.offset + offset, 8 if info & 0xFFFF_FFFF in (R_64, PC64) else 4)
        for number, spot in placed.layout.places.items()
        if spot.area is Area.TEXT
        for offset, info, _ in placed.module.elf.relocations(placed.module.elf.sections[number])
        if info & 0xFFFF_FFFF != NONE
    ]
    for name in TABLES:
        found += [site for site in sites(placed.image, name) if site.address in text]
    return [*found, *_pads(placed.image, placed.values)]


def kernel_write_set(image: Image, names: Iterable[tuple[int, int, str]]) -> list[Site]:
    """Return every place in a kernel's text that booting it may write.

    ``names`` are its symbols: value, size and name.
    """
    names = list(names)
    found = [site for name in TABLES for site in sites(image, name) if site.address in image.text]
    for name, span in image.runtime_constants.items():
        size = 8 if name.startswith("runtime_ptr_") else 1
        found += [Site(place, size) for place in constants(image, span)]
    found += [
        Site(value, 5)
        for value, _, name in names
        if name.startswith(TRAMPOLINE) and value in image.text
    ]
    return [*found, *_pads(image, (value for value, _, _ in names))]


def _pads(image: Image, symbols: Iterable[int]) -> Iterator[Site]:
    """Yield the padding in front of symbols, where calls can be counted."""
    for value in symbols:
        pad = value - len(_PAD)
        inside = value in image.text and pad in image.text
        if inside and image.memory.upto(pad, len(_PAD)) == _PAD:
            yield Site(pad, len(_PAD))


def merged(found: Iterable[Site]) -> Iterator[tuple[int, int]]:
    """Yield the ranges that sites cover, in order, neighbours as one."""
    start = end = -1
    for address, length in sorted(found):
        if address > end:
            if start >= 0:
                yield start, end
            start, end = address, address + length
        end = max(end, address + length)
    if start >= 0:
        yield start, end


def pokes_between(
    name: str, start: int, old: memoryview, new: bytes, planned: list[Site]
) -> list[Poke]:
    """Return the pokes that turn the text ``old`` of an image, at ``start``, into ``new``.

    Raises:
        Damaged: they differ where no plan writes.
    """
    if old == new:
        return []
    rest = bytearray(old)
    found = []
    for first, last in merged(planned):
        low, high = first - start, last - start
        before, after = bytes(old[low:high]), new[low:high]
        if before != after:
            found.append(Poke(first, after, before))
            rest[low:high] = after
    if rest != new:
        at = next(at for at, (a, b) in enumerate(zip(rest, new, strict=True)) if a != b)
        raise Damaged(
            f"{name}: the stored text differs at {start + at:#x}, where nothing is ever patched; "
            f"verify the store"
        )
    return found


def toggle_pokes(image: Image, key: int, enabled: bool) -> list[Poke]:
    """Return the pokes that follow a change of a key, one for each of its jump labels.

    Raises:
        NotFound: no jump label of the image follows that key.
    """
    found = [
        Poke(jump.address, jump_code(image, jump, enabled))
        for jump in jumps(image)
        if jump.key == key and jump.address in image.text
    ]
    if not found:
        raise NotFound(f"no jump label of {image.name} follows a key at {key:#x}")
    return found


def module_names(placed: Placed) -> list[tuple[int, int, str]]:
    """Return a module's symbols: value, size and name, sorted."""
    rows = zip(placed.module.elf.symbol_rows, placed.values, strict=True)
    return sorted(
        (value, row[5], placed.module.elf.symbol_name(row)) for row, value in rows if row[0]
    )


def keys_of(image: Image, names: list[tuple[int, int, str]]) -> dict[str, int]:
    """Return the keys that an image's jump labels follow, by name.

    ``names`` are symbols: value, size and name, sorted.  A key inside a larger variable is named by
    that variable and its offset, one without a name by its address.
    """
    values = [value for value, _, _ in names]
    found = {}
    for key in sorted({jump.key for jump in jumps(image)}):
        at = bisect_right(values, key) - 1
        name = f"{key:#x}"
        if at >= 0:
            value, size, text = names[at]
            if value == key:
                name = text
            elif key < value + size:
                name = f"{text}+{key - value:#x}"
        found[name] = key
    return found


def trace_pokes(image: Image, host: Host, enabled: bool) -> list[Poke]:
    """Return the pokes that let each function call the tracer, or leave it alone again."""
    tracer = host.symbol("ftrace_caller") or host.require_symbol("__fentry__")
    return [
        Poke(address, branch(CALL, address, tracer) if enabled else NOPS[5])
        for address in addresses(image, FTRACE)
        if address in image.text
    ]
