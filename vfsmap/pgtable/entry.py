"""One virtual entry for every level, and the hardware's word for it.

There is no function for one level beside another for the next: the level is a field.
"""

from typing import NamedTuple

from vfsmap.errors import Invalid
from vfsmap.pgtable.architecture import Architecture, Bits, shift
from vfsmap.units import Level, require_aligned


class Entry(NamedTuple):
    """An entry of a page table."""

    level: Level
    address: int
    """Of what it maps, or of the table it points to."""
    bits: Bits = Bits.NONE
    leaf: bool = True


def encode(architecture: Architecture, entry: Entry) -> int:
    """Return the word that the processor reads.

    Raises:
        Invalid: the level can't hold a leaf, the address does not fit, or the architecture has no
            such bit there.
        NotAligned: the address is not a multiple of what the entry maps.
    """
    page = architecture.page_size
    require_aligned("address", entry.address, entry.level.size if entry.leaf else page)
    if entry.address >> architecture.physical_bits:
        raise Invalid(f"address {entry.address:#x} needs over {architecture.physical_bits} bits")
    place = shift(entry.address, architecture.address_shift)
    if not entry.leaf:
        return place | architecture.table
    require_leaf(architecture, entry.level)
    require_bits(architecture, entry.level, entry.bits)
    smallest = entry.level == architecture.levels[0]
    word = place | architecture.common | (architecture.page if smallest else architecture.block)
    for bit, mask in architecture.on.items():
        word |= mask if bit in entry.bits else 0
    for bit, mask in architecture.unless.items():
        word |= 0 if bit in entry.bits else mask
    return word


def decode(architecture: Architecture, word: int, level: Level) -> Entry | None:
    """Return the entry that the word means at this level; None: not present.

    Raises:
        Invalid: a reserved bit is set, or a leaf stands where none may.
    """
    if not word & 1:
        return None
    smallest = level == architecture.levels[0]
    kind = word & (architecture.page_mask if smallest else architecture.kind_mask)
    leaf = kind == (architecture.page if smallest else architecture.block)
    if smallest and not leaf:
        raise Invalid(f"{word:#x} is no entry of level {level}: {kind:#b} is reserved there")
    if leaf:
        require_leaf(architecture, level)
    zero = architecture.reserved
    zero |= architecture.zero_bits(level) if leaf else architecture.table_reserved
    if word & zero:
        raise Invalid(f"{word:#x} at level {level}: reserved bits {word & zero:#x} are set")
    place = word & architecture.address_mask
    if leaf and not smallest:
        place &= ~architecture.block_used
    address = shift(place, -architecture.address_shift)
    return Entry(level, address, _bits_of(architecture, word) if leaf else Bits.NONE, leaf)


def require_leaf(architecture: Architecture, level: Level) -> None:
    """Check that the level may hold a leaf.

    Raises:
        Invalid: it may not.
    """
    if level not in architecture.leaves:
        raise Invalid(f"{architecture.name} has no leaf of level {level}")


def require_bits(architecture: Architecture, level: Level, bits: Bits) -> None:
    """Check that a leaf of the level can say all of ``bits``.

    Raises:
        Invalid: it can't.
    """
    known = Bits.NONE
    for bit in (*architecture.on, *architecture.unless):
        known |= bit
    if level not in architecture.special_levels:
        known &= ~Bits.SPECIAL
    if bits & ~known:
        raise Invalid(f"{architecture.name} has no bit for {bits & ~known} at level {level}")


def _bits_of(architecture: Architecture, word: int) -> Bits:
    bits = Bits.NONE
    for bit, mask in architecture.on.items():
        if word & mask:
            bits |= bit
    for bit, mask in architecture.unless.items():
        if not word & mask:
            bits |= bit
    return bits
