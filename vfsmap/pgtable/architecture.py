"""What a page-table entry looks like: architectures as data.

Everything that differs from one processor to the next is a number here; the code that reads the
numbers is in :mod:`vfsmap.pgtable.entry` and :mod:`vfsmap.pgtable.table`, and is the same for all
of them and for all levels.  User mappings of normal, cached memory are described, no others.

Sources, by section, and the kernel's headers they were compared with:

x86-64      Intel SDM volume 3A, "4-Level Paging and 5-Level Paging", the figure and the tables of
            entry formats; arch/x86/include/asm/pgtable_types.h
arm64       Arm ARM D8.3, "Translation table descriptor formats" (VMSAv8-64, stage 1), without
            FEAT_LPA, LPA2 and D128; arch/arm64/include/asm/pgtable-hwdef.h, pgtable-prot.h
riscv64     RISC-V Privileged Architecture, "Sv39", "Sv48" and "Sv57";
            arch/riscv/include/asm/pgtable-bits.h, pgtable-64.h
special     a software bit of pte_special(); at larger levels since Linux 6.12 where the
            architecture selects ARCH_SUPPORTS_HUGE_PFNMAP (x86-64, arm64)
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Flag, auto
from types import MappingProxyType
from typing import Final

from vfsmap.units import PMD, PTE, PUD, Level


class Bits(Flag):
    """What an entry says about the bytes it maps, besides where they are."""

    NONE = 0
    WRITE = auto()
    USER = auto()
    EXECUTE = auto()
    ACCESSED = auto()
    DIRTY = auto()
    SPECIAL = auto()
    """No page structure stands behind it: normal_page() answers none."""
    SOFT_DIRTY = auto()
    """Stored to since the tracker last looked; only where the architecture has the bit."""


@dataclass(frozen=True)
class Architecture:
    """One page-table format."""

    name: str
    levels: tuple[Level, ...]
    """All levels of the tree, smallest first."""
    leaves: tuple[Level, ...]
    """Those that may hold a leaf, smallest first."""
    special_levels: tuple[Level, ...]
    """Those where a leaf can say itself that it is special."""
    virtual_bits: int
    physical_bits: int
    address_mask: int
    """The bits of a word that hold the address of the smallest leaf."""
    address_shift: int
    """How far those bits lie left of where they are in an address; negative: right."""
    page_mask: int
    """The bits that make a word of the smallest level an entry; the lowest is "present"."""
    page: int
    """Their value in one."""
    kind_mask: int
    """The bits that tell, at any other level, whether an entry is a leaf or points to a table."""
    block: int
    """Their value in a leaf."""
    table: int
    """Their value in an entry that points to a table."""
    common: int
    """Bits set in each leaf that the model has no name for."""
    on: Mapping[Bits, int]
    """Bits that are set when the model's bit is on."""
    unless: Mapping[Bits, int]
    """Bits that are set unless all of these are on (no-execute; read-only until dirty)."""
    reserved: int
    """Bits that are zero in each entry."""
    table_reserved: int
    """Bits that are zero in an entry that points to a table."""
    block_used: int
    """Bits below a block's address, inside ``address_mask``, that mean something else there."""
    entry_bytes: int = 8

    @property
    def page_size(self) -> int:
        """Bytes that the smallest entry maps."""
        return self.levels[0].size

    def entries_per_table(self, level: Level) -> int:
        """Return how many entries a table of this level has."""
        above = self.levels.index(level) + 1
        top = self.virtual_bits if above == len(self.levels) else self.levels[above].shift
        return 1 << (top - level.shift)

    def zero_bits(self, level: Level) -> int:
        """Return the bits of a leaf of this level that must be zero."""
        below = shift(level.size - self.page_size, self.address_shift)
        unused = 0 if level == self.levels[0] else self.block_used
        return self.reserved | (below & self.address_mask & ~unused)


def shift(value: int, by: int) -> int:
    """Return ``value`` shifted left, or right when ``by`` is negative."""
    return value << by if by >= 0 else value >> -by


def _bits(high: int, low: int) -> int:
    """Return the mask of bits ``high`` down to ``low``, as manuals write [high:low]."""
    return (1 << (high + 1)) - (1 << low)


def _levels(page_shift: int, names: str) -> tuple[Level, ...]:
    """Return levels whose tables are one page each: 8 bytes an entry."""
    step = page_shift - 3
    return tuple(
        PTE._replace(name=name, shift=page_shift + n * step) for n, name in enumerate(names.split())
    )


X86_64: Final = Architecture(
    name="x86-64, 4 levels",
    levels=(PTE, PMD, PUD, Level("PGD", 39)),
    leaves=(PTE, PMD, PUD),
    special_levels=(PTE, PMD, PUD),
    virtual_bits=48,
    physical_bits=52,
    address_mask=_bits(51, 12),
    address_shift=0,
    page_mask=1 << 0,
    page=1 << 0,  # bit 7 is PAT there
    kind_mask=1 << 0 | 1 << 7,
    block=1 << 0 | 1 << 7,
    table=1 << 0,
    common=0,
    on=MappingProxyType(
        {
            Bits.WRITE: 1 << 1,
            Bits.USER: 1 << 2,
            Bits.ACCESSED: 1 << 5,
            Bits.DIRTY: 1 << 6,
            Bits.SPECIAL: 1 << 9,
            Bits.SOFT_DIRTY: 1 << 11,
        }
    ),
    unless=MappingProxyType({Bits.EXECUTE: 1 << 63}),
    reserved=0,
    table_reserved=0,
    block_used=1 << 12,  # PAT of a 2 MiB and of a 1 GiB leaf
)

X86_64_5: Final = replace(
    X86_64,
    name="x86-64, 5 levels",
    levels=(PTE, PMD, PUD, Level("P4D", 39), Level("PGD", 48)),
    virtual_bits=57,
)

ARM64_4K: Final = Architecture(
    name="arm64, 4 KiB granule",
    levels=_levels(12, "PTE PMD PUD PGD"),
    leaves=_levels(12, "PTE PMD PUD"),
    special_levels=_levels(12, "PTE PMD PUD"),
    virtual_bits=48,
    physical_bits=48,
    address_mask=_bits(47, 12),
    address_shift=0,
    page_mask=0b11,
    page=0b11,
    kind_mask=0b11,
    block=0b01,
    table=0b11,
    common=0b11 << 8 | 1 << 11 | 1 << 53,  # inner shareable, not global, privileged no-execute
    on=MappingProxyType(
        {
            Bits.WRITE: 1 << 51,  # DBM: the processor may clear read-only at the first store
            Bits.USER: 1 << 6,
            Bits.ACCESSED: 1 << 10,
            Bits.DIRTY: 1 << 55,  # software's; the hardware's is "writable and not read-only"
            Bits.SPECIAL: 1 << 56,
        }
    ),
    unless=MappingProxyType({Bits.EXECUTE: 1 << 54, Bits.WRITE | Bits.DIRTY: 1 << 7}),
    reserved=_bits(49, 48),
    table_reserved=0,
    block_used=1 << 16,  # nT of FEAT_BBM
)

ARM64_16K: Final = replace(
    ARM64_4K,
    name="arm64, 16 KiB granule",
    levels=_levels(14, "PTE PMD PUD PGD"),
    leaves=_levels(14, "PTE PMD"),
    special_levels=_levels(14, "PTE PMD"),
    address_mask=_bits(47, 14),
    reserved=_bits(49, 48) | _bits(13, 12),
)

ARM64_64K: Final = replace(
    ARM64_4K,
    name="arm64, 64 KiB granule",
    levels=_levels(16, "PTE PMD PGD"),
    leaves=_levels(16, "PTE PMD"),
    special_levels=_levels(16, "PTE PMD"),
    address_mask=_bits(47, 16),
    reserved=_bits(49, 48) | _bits(15, 12),
)

RISCV64_SV39: Final = Architecture(
    name="riscv64, sv39",
    levels=_levels(12, "PTE PMD PGD"),
    leaves=_levels(12, "PTE PMD PGD"),  # the manual allows a leaf at each level
    special_levels=_levels(12, "PTE"),
    virtual_bits=39,
    physical_bits=56,
    address_mask=_bits(53, 10),
    address_shift=-2,
    page_mask=0b11,  # valid and readable: execute-only memory is not modelled
    page=0b11,
    kind_mask=0b11,
    block=0b11,
    table=0b01,
    common=0,
    on=MappingProxyType(
        {
            Bits.WRITE: 1 << 2,
            Bits.EXECUTE: 1 << 3,
            Bits.USER: 1 << 4,
            Bits.ACCESSED: 1 << 6,
            Bits.DIRTY: 1 << 7,
            Bits.SPECIAL: 1 << 8,
        }
    ),
    unless=MappingProxyType({}),
    reserved=_bits(60, 54),
    table_reserved=_bits(63, 61) | 1 << 7 | 1 << 6 | 1 << 4 | 1 << 3 | 1 << 2,
    block_used=0,
)

RISCV64_SV48: Final = replace(
    RISCV64_SV39,
    name="riscv64, sv48",
    levels=_levels(12, "PTE PMD PUD PGD"),
    leaves=_levels(12, "PTE PMD PUD PGD"),
    virtual_bits=48,
)

RISCV64_SV57: Final = replace(
    RISCV64_SV39,
    name="riscv64, sv57",
    levels=_levels(12, "PTE PMD PUD P4D PGD"),
    leaves=_levels(12, "PTE PMD PUD P4D PGD"),
    virtual_bits=57,
)

NO_SPECIAL_BIT: Final = replace(
    X86_64,
    name="without a special bit",
    special_levels=(),
    on=MappingProxyType({bit: word for bit, word in X86_64.on.items() if bit != Bits.SPECIAL}),
)
"""Stands for the architectures whose entries have no room for the bit: the window is asked."""

ARCHITECTURES: Final = (
    X86_64,
    X86_64_5,
    ARM64_4K,
    ARM64_16K,
    ARM64_64K,
    RISCV64_SV39,
    RISCV64_SV48,
    RISCV64_SV57,
    NO_SPECIAL_BIT,
)
