import ast
import re
from pathlib import Path

import pytest

import vfsmap.pgtable
from vfsmap.errors import Exists, Invalid, NotAligned, NotFound
from vfsmap.pgtable import (
    ARCHITECTURES,
    ARM64_4K,
    ARM64_16K,
    ARM64_64K,
    NO_SPECIAL_BIT,
    RISCV64_SV39,
    X86_64,
    X86_64_5,
    Architecture,
    Bits,
    Entry,
    PageTable,
    decode,
    encode,
)
from vfsmap.units import GIB, KIB, MIB, PMD, PTE, PUD, TIB, Level

PAGE = 4 * KIB


def named(architecture: Architecture) -> str:
    return architecture.name


def test_no_function_is_named_after_a_level() -> None:
    level = re.compile(r"(pte|pmd|pud|p4d|pgd)", re.IGNORECASE)
    package = Path(vfsmap.pgtable.__file__).parent
    names = [
        node.name
        for path in package.glob("**/*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert len(names) > 30
    assert [name for name in names if level.search(name)] == []


RW = Bits.WRITE | Bits.USER


@pytest.mark.parametrize(
    ("architecture", "entry", "word"),
    [
        # each written down by hand from the figure named in vfsmap.pgtable.architecture
        (X86_64, Entry(PTE, 0x1234000, RW), 1 << 63 | 0x1234000 | 0b111),
        (X86_64, Entry(PMD, 0x40200000, RW | Bits.EXECUTE), 0x40200000 | 0x87),
        (X86_64, Entry(PUD, 0x80000000, Bits.DIRTY | Bits.ACCESSED), 1 << 63 | 0x800000E1),
        (X86_64, Entry(PMD, 0, Bits.SPECIAL | Bits.SOFT_DIRTY), 1 << 63 | 0x200 | 0x800 | 0x81),
        (X86_64, Entry(PMD, 0x5000, leaf=False), 0x5001),
        (ARM64_4K, Entry(PTE, 0x5000, Bits.USER), 0b11 | 0x5000 | 0x60000000000BC0 | 1 << 53),
        (ARM64_4K, Entry(PMD, 2 * MIB, RW), 0x200000 | 0x68000000000BC1),
        (ARM64_4K, Entry(PMD, 2 * MIB, RW | Bits.DIRTY), 0x200000 | 0xE8000000000B41),
        (RISCV64_SV39, Entry(PTE, 0x3000, RW | Bits.DIRTY), 0xC00 | 0b10010111),
        (RISCV64_SV39, Entry(PMD, 2 * MIB, Bits.EXECUTE), 0x80000 | 0b1011),
        (RISCV64_SV39, Entry(PMD, 0x3000, leaf=False), 0xC01),
    ],
)
def test_a_word_is_what_the_manual_says(
    architecture: Architecture, entry: Entry, word: int
) -> None:
    assert hex(encode(architecture, entry)) == hex(word)
    assert decode(architecture, word, entry.level) == entry


def test_a_leaf_that_the_processor_made_dirty_is_decoded_as_dirty_on_arm64() -> None:
    clean = encode(ARM64_4K, Entry(PTE, 0x1000, RW))
    entry = decode(ARM64_4K, clean & ~(1 << 7), PTE)  # the hardware clears read-only
    assert entry is not None
    assert Bits.DIRTY in entry.bits


@pytest.mark.parametrize(
    ("architecture", "level", "bits"),
    [
        (X86_64, PMD, range(13, 21)),
        (X86_64, PUD, range(13, 30)),
        (X86_64, PTE, range(0)),
        (ARM64_4K, PMD, [*range(12, 16), *range(17, 21), 48, 49]),
        (ARM64_16K, Level("PTE", 14), [12, 13, 48, 49]),
        (ARM64_64K, Level("PMD", 29), [12, 13, 14, 15, *range(17, 29), 48, 49]),
        (RISCV64_SV39, PMD, [*range(10, 19), *range(54, 61)]),
    ],
    ids=lambda value: str(value) if isinstance(value, Level) else getattr(value, "name", ""),
)
def test_exactly_the_reserved_bits_of_a_leaf_are_refused(
    architecture: Architecture, level: Level, bits: list[int]
) -> None:
    def reserved(word: int) -> bool:
        try:
            decode(architecture, word, level)
        except Invalid:
            return True
        return False

    word = encode(architecture, Entry(level, 0, Bits.NONE))
    free = architecture.kind_mask | architecture.page_mask
    refused = [bit for bit in range(64) if not free >> bit & 1 and reserved(word | 1 << bit)]
    assert refused == list(bits)


def test_a_leaf_where_the_processor_allows_none_is_refused() -> None:
    top = X86_64.levels[-1]
    with pytest.raises(Invalid, match="no leaf of level PGD"):
        decode(X86_64, 0x81, top)
    with pytest.raises(Invalid, match="no leaf of level PGD"):
        encode(X86_64, Entry(top, 0))
    with pytest.raises(Invalid, match="reserved there"):
        decode(ARM64_4K, 0b01, PTE)
    with pytest.raises(Invalid, match="reserved bits 0x4 are set"):
        decode(RISCV64_SV39, 0b101, PMD)


def test_an_absent_entry_is_none() -> None:
    assert all(decode(a, 0, level) is None for a in ARCHITECTURES for level in a.levels)


def test_an_address_that_does_not_fit_is_refused() -> None:
    with pytest.raises(NotAligned):
        encode(X86_64, Entry(PMD, PAGE))
    with pytest.raises(Invalid, match="over 52 bits"):
        encode(X86_64, Entry(PTE, 1 << 52))


@pytest.mark.parametrize(
    ("level", "size"), [(PTE, 2 * GIB), (PMD, 4 * MIB), (PUD, 8 * KIB)], ids=str
)
def test_a_terabyte_costs_the_tables_that_the_architecture_says(level: Level, size: int) -> None:
    table = PageTable(X86_64)
    table.map(0, 0, TIB, limit=level)
    statistics = table.statistics()
    assert statistics.table_bytes[level] == size
    assert statistics.entries[level] == TIB // level.size
    assert len(list(table.runs())) == 1
    smaller = [v for v in X86_64.levels if v.size < level.size]
    assert all(statistics.tables[v] == 0 for v in smaller)


@pytest.mark.parametrize(
    ("architecture", "last"),
    [(ARM64_16K, TIB // (32 * MIB) * 16 * KIB), (ARM64_64K, TIB // (512 * MIB) * 64 * KIB)],
    ids=["16K", "64K"],
)
def test_other_granules_have_other_costs(architecture: Architecture, last: int) -> None:
    table = PageTable(architecture)
    smallest = architecture.levels[0]
    table.map(0, 0, TIB, limit=smallest)
    assert table.statistics().table_bytes[smallest] == last


def test_an_empty_address_space_has_one_table() -> None:
    assert sum(PageTable(X86_64_5).statistics().tables.values()) == 1


def test_map_takes_the_largest_level_that_both_addresses_allow() -> None:
    table = PageTable(X86_64)
    table.map(GIB - 2 * MIB - PAGE, 3 * GIB - 2 * MIB - PAGE, 2 * GIB + 4 * MIB + 2 * PAGE)
    assert [run.level for run in table.runs()] == [PTE, PMD, PUD, PMD, PTE]
    assert [run.length for run in table.runs()] == [PAGE, 2 * MIB, 2 * GIB, 2 * MIB, PAGE]


def test_a_different_colour_leaves_only_smaller_entries() -> None:
    table = PageTable(X86_64)
    table.map(0, 2 * MIB, GIB)
    table.map(GIB, PAGE, 4 * MIB)
    assert [run.level for run in table.runs()] == [PMD, PTE]


def test_a_walk_names_each_table_from_the_top_to_the_leaf() -> None:
    table = PageTable(X86_64_5)
    table.map(5 * GIB, 0, GIB)
    table.map(6 * GIB, GIB, 2 * MIB)
    steps, entry = table.walk(6 * GIB + 123)
    assert [(s.level.name, s.slot) for s in steps] == [
        ("PGD", 0),
        ("P4D", 0),
        ("PUD", 6),
        ("PMD", 0),
    ]
    assert entry == Entry(PMD, GIB)
    assert table.walk(5 * GIB)[1] == Entry(PUD, 0)
    assert table.walk(0)[1] is None
    assert len(table.walk(0)[0]) == 5


def test_unmapping_a_page_of_a_huge_entry_splits_only_what_it_must() -> None:
    table = PageTable(X86_64)
    table.map(0, 0, 2 * GIB)
    table.unmap(GIB + 2 * MIB + PAGE, PAGE)
    entries = table.statistics().entries
    assert (entries[PUD], entries[PMD], entries[PTE]) == (1, 511, 511)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=named)
def test_special_is_known_at_every_level_by_bit_or_by_asking(architecture: Architecture) -> None:
    for level in architecture.leaves:
        table = PageTable(architecture, find_special_page=lambda virtual: True)
        table.map(0, 0, level.size, limit=level)
        if level in architecture.special_levels:
            assert table.normal_page(0) == 0
            table.mark_special(0, level.size)
        else:
            with pytest.raises(Invalid, match=r"no bit for .*SPECIAL"):
                table.mark_special(0, level.size)
        assert table.normal_page(0) is None


def test_without_a_bit_and_without_an_owner_every_page_is_normal() -> None:
    table = PageTable(NO_SPECIAL_BIT)
    table.map(0, 2 * MIB, 2 * MIB)
    assert table.normal_page(PAGE + 5) == 2 * MIB + PAGE


def test_normal_page_of_nothing_is_not_found() -> None:
    with pytest.raises(NotFound):
        PageTable(X86_64).normal_page(0)


def test_mapping_twice_is_refused_and_changes_nothing() -> None:
    table = PageTable(X86_64)
    table.map(0, 0, 4 * MIB)
    with pytest.raises(Exists):
        table.map(2 * MIB, 0, 4 * MIB)
    assert len(list(table.runs())) == 1


@pytest.mark.parametrize(
    ("virtual", "address", "length"),
    [(1, 0, PAGE), (0, 1, PAGE), (0, 0, 100), (0, 0, 0), (1 << 48, 0, PAGE), (0, 1 << 52, PAGE)],
)
def test_a_range_that_is_none_is_refused(virtual: int, address: int, length: int) -> None:
    with pytest.raises(Invalid):
        PageTable(X86_64).map(virtual, address, length)


def test_collapse_says_why_it_cannot() -> None:
    table = PageTable(X86_64)
    table.map(0, 2 * MIB, 2 * MIB - PAGE, limit=PTE)
    with pytest.raises(Invalid, match=r"0x1000 bytes of .* are not mapped"):
        table.collapse(0, 2 * MIB, PMD)
    table.map(2 * MIB - PAGE, 0, PAGE)
    with pytest.raises(Invalid, match="can't be entries of PMD"):
        table.collapse(0, 2 * MIB, PMD)


def test_collapse_adds_accessed_and_dirty_up_in_each_entry_of_its_own() -> None:
    table = PageTable(X86_64)
    table.map(0, 0, 8 * MIB, limit=PTE)
    table.touch(2 * MIB + PAGE, PAGE, store=True)
    table.touch(4 * MIB - PAGE, 2 * PAGE)
    table.collapse(0, 8 * MIB, PMD)
    dirty = Bits.ACCESSED | Bits.DIRTY | Bits.SOFT_DIRTY
    assert [(run.length, run.bits) for run in table.runs()] == [
        (2 * MIB, Bits.NONE),
        (2 * MIB, dirty),
        (2 * MIB, Bits.ACCESSED),
        (2 * MIB, Bits.NONE),
    ]


def test_copy_on_write_copies_a_page_or_the_whole_entry() -> None:
    for granularity, copied, left in ((PTE, PAGE, 1), (PMD, 2 * MIB, 1), (None, GIB, 0)):
        table = PageTable(X86_64)
        table.map(0, 0, GIB, Bits.USER)
        copies = table.copy_on_write(5 * PAGE, 1, lambda length, align: 4 * GIB, granularity)
        assert [copy.length for copy in copies] == [copied]
        assert table.normal_page(5 * PAGE) in (4 * GIB, 4 * GIB + 5 * PAGE)
        assert bool(table.statistics().entries[PMD]) == left
        assert table.copy_on_write(5 * PAGE, 8, lambda length, align: 0, granularity) == []


def test_copy_on_write_of_small_entries_by_a_large_page_joins_them() -> None:
    table = PageTable(X86_64)
    table.map(0, 0, 4 * MIB, Bits.USER, limit=PTE)
    table.copy_on_write(PAGE, PAGE, lambda length, align: GIB, PMD)
    assert [run.level for run in table.runs()] == [PMD, PTE]


def test_the_copy_of_a_special_page_is_a_normal_one() -> None:
    table = PageTable(X86_64)
    table.map(0, 0, 4 * MIB, Bits.USER | Bits.SPECIAL)
    table.copy_on_write(0, 1, lambda length, align: GIB)
    assert table.normal_page(0) == GIB
    assert table.normal_page(2 * MIB) is None
