"""Plans: the places in text that loading may write, and the pokes that lead from one to another."""

from collections.abc import Iterable, Iterator

from vfsmap.errors import Damaged, NotFound
from vfsmap.guard import Poke
from vfsmap.kmod.bind import Bound, Placed
from vfsmap.kmod.branches import CALL, branch
from vfsmap.kmod.host import Host
from vfsmap.kmod.image import ALTERNATIVES, CALLS, FTRACE, TABLES, Image
from vfsmap.kmod.keys import jump_code
from vfsmap.kmod.layout import Area
from vfsmap.kmod.nops import NOPS
from vfsmap.kmod.relocate import NONE, PC64, R_64
from vfsmap.kmod.tables import Site, addresses, jumps, sites

_PAD: bytes = b"\x90" * 9


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
    if CALLS in placed.image.tables or ALTERNATIVES in placed.image.tables:
        found += list(_pads(placed))
    return found


def _pads(placed: Placed) -> Iterator[Site]:
    """Yield the padding in front of symbols."""
    image = placed.image
    for row, value in zip(placed.module.elf.symbol_rows, placed.values, strict=True):
        pad = value - len(_PAD)
        inside = row[3] and value in image.text and pad in image.text
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


def pokes_between(old: memoryview, bound: Bound, planned: list[Site]) -> list[Poke]:
    """Return the pokes that turn the text ``old`` into that of ``bound``.

    Raises:
        Damaged: they differ where no plan writes.
    """
    text = bound.placed.image.text
    new = bound.placed.area(Area.TEXT)
    if old == new:
        return []
    rest = bytearray(old)
    found = []
    for start, end in merged(planned):
        low, high = start - text.start, end - text.start
        before, after = bytes(old[low:high]), new[low:high]
        if before != after:
            found.append(Poke(start, after, before))
            rest[low:high] = after
    if rest != new:
        at = next(at for at, (a, b) in enumerate(zip(rest, new, strict=True)) if a != b)
        raise Damaged(
            f"{bound.placed.module.name}: the stored text differs at {text.start + at:#x}, where "
            f"nothing is ever patched; verify the store"
        )
    return found


def toggle_pokes(placed: Placed, key: int, enabled: bool) -> list[Poke]:
    """Return the pokes that follow a change of a key, one for each of its jump labels.

    Raises:
        NotFound: no jump label of the module follows that key.
    """
    image = placed.image
    found = [
        Poke(jump.address, jump_code(image, jump, enabled))
        for jump in jumps(image)
        if jump.key == key
    ]
    if not found:
        raise NotFound(f"no jump label of {placed.module.name} follows the key at {key:#x}")
    return found


def keys_of(placed: Placed) -> dict[str, int]:
    """Return the keys that a module's jump labels follow, by name, or by address if they have none.

    A key inside a larger variable is named by that variable and its offset.
    """
    module = placed.module
    rows = list(zip(module.elf.symbol_rows, placed.values, strict=True))
    named = sorted(
        (value, row[5], module.elf.symbol_name(row)) for row, value in rows if row[0] and value
    )
    found = {}
    for key in sorted({jump.key for jump in jumps(placed.image)}):
        name = f"{key:#x}"
        for value, size, text in named:
            if value == key:
                name = text
                break
            if value < key < value + size:
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
