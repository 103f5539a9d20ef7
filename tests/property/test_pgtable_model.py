"""The page table against a flat dictionary of its smallest pages.

A toy architecture with pages of 1, entries of 4 and of 16 pages keeps the dictionary small; what
differs between real ones is data.
"""

from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from vfsmap.errors import Exists, Invalid
from vfsmap.pgtable import ARCHITECTURES, X86_64, Architecture, Bits, Entry, PageTable, Run
from vfsmap.pgtable import decode as decode_word
from vfsmap.pgtable import encode as encode_word
from vfsmap.units import Level

SMALL, MIDDLE, LARGE = Level("small", 12), Level("middle", 14), Level("large", 16)
TOY = replace(
    X86_64,
    name="toy",
    levels=(SMALL, MIDDLE, LARGE),
    leaves=(SMALL, MIDDLE, LARGE),
    special_levels=(SMALL, MIDDLE, LARGE),
    virtual_bits=19,
)
PAGES = 1 << (TOY.virtual_bits - 12)
PAGE = TOY.page_size
COPIES = 1 << 30

HARVEST = Bits.ACCESSED | Bits.DIRTY | Bits.SOFT_DIRTY
RIGHTS = st.sampled_from([Bits.NONE, Bits.WRITE, Bits.USER, Bits.WRITE | Bits.EXECUTE])
LEVELS = st.sampled_from(TOY.leaves)
RANGES = st.integers(0, PAGES - 1).flatmap(
    lambda start: st.tuples(st.just(start), st.integers(1, min(40, PAGES - start)))
)


class Page(NamedTuple):
    """What the dictionary knows of one page."""

    address: int
    level: Level
    bits: Bits


class Tables(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.table = PageTable(TOY)
        self.pages: dict[int, Page] = {}
        self.next_copy = COPIES

    def entry_of(self, page: int) -> range:
        size = self.pages[page].level.size // PAGE
        return range(page - page % size, page - page % size + size)

    def split_edges(self, start: int, end: int) -> None:
        """Do to the dictionary what an operation on part of an entry does to a table."""
        for edge in (start, end):
            while edge in self.pages and self.entry_of(edge).start != edge:
                smaller = TOY.leaves[TOY.leaves.index(self.pages[edge].level) - 1]
                for page in self.entry_of(edge):
                    self.pages[page] = self.pages[page]._replace(level=smaller)

    def mapped(self, start: int, count: int) -> list[int]:
        return [page for page in range(start, start + count) if page in self.pages]

    def whole(self, start: int, count: int) -> set[int]:
        return {p for page in self.mapped(start, count) for p in self.entry_of(page)}

    @rule(where=RANGES, place=st.integers(0, 40), bits=RIGHTS, limit=st.none() | LEVELS)
    def map(self, where: tuple[int, int], place: int, bits: Bits, limit: Level | None) -> None:
        start, count = where
        try:
            self.table.map(start * PAGE, place * PAGE, count * PAGE, bits, limit)
        except Exists:
            assert self.mapped(start, count)
            return
        assert not self.mapped(start, count)
        for page in range(start, start + count):
            for level in TOY.leaves:
                size = level.size // PAGE
                first = page - page % size
                fits = first >= start and first + size <= start + count
                same = (start - place) % size == 0
                if fits and same and (limit is None or level.size <= limit.size):
                    self.pages[page] = Page((place + page - start) * PAGE, level, bits)

    @rule(where=RANGES)
    def unmap(self, where: tuple[int, int]) -> None:
        start, count = where
        self.split_edges(start, start + count)
        for page in self.mapped(start, count):
            del self.pages[page]
        self.table.unmap(start * PAGE, count * PAGE)

    @rule(where=RANGES, bits=RIGHTS)
    def protect(self, where: tuple[int, int], bits: Bits) -> None:
        start, count = where
        self.split_edges(start, start + count)
        for page in self.mapped(start, count):
            old = self.pages[page]
            kept = old.bits & (HARVEST | Bits.SPECIAL)
            self.pages[page] = old._replace(bits=kept | bits)
        self.table.protect(start * PAGE, count * PAGE, bits)

    @rule(where=RANGES)
    def mark_special(self, where: tuple[int, int]) -> None:
        start, count = where
        self.split_edges(start, start + count)
        for page in self.mapped(start, count):
            old = self.pages[page]
            self.pages[page] = old._replace(bits=old.bits | Bits.SPECIAL)
        self.table.mark_special(start * PAGE, count * PAGE)

    @rule(where=RANGES, store=st.booleans())
    def touch(self, where: tuple[int, int], store: bool) -> None:
        start, count = where
        for page in self.whole(start, count):
            old = self.pages[page]
            new = HARVEST if store else Bits.ACCESSED
            self.pages[page] = old._replace(bits=old.bits | new)
        self.table.touch(start * PAGE, count * PAGE, store=store)

    @rule(where=RANGES, dirty=st.booleans())
    def harvest(self, where: tuple[int, int], dirty: bool) -> None:
        start, count = where
        bits = Bits.DIRTY | Bits.SOFT_DIRTY if dirty else Bits.ACCESSED
        had = {page for page in self.whole(start, count) if self.pages[page].bits & bits}
        for page in had:
            old = self.pages[page]
            self.pages[page] = old._replace(bits=old.bits & ~bits)
        clear = self.table.clear_dirty if dirty else self.table.clear_accessed
        found = clear(start * PAGE, count * PAGE)
        assert {p for run in found for p in pages_of(run)} == had

    @rule(where=RANGES, level=LEVELS)
    def split(self, where: tuple[int, int], level: Level) -> None:
        start, count = where
        for page in self.whole(start, count):
            old = self.pages[page]
            if old.level.size > level.size:
                self.pages[page] = old._replace(level=level)
        self.table.split(start * PAGE, count * PAGE, level)

    @rule(first=st.integers(0, PAGES // 16 - 1), entries=st.integers(1, 8), level=LEVELS)
    def collapse(self, first: int, entries: int, level: Level) -> None:
        size = level.size // PAGE
        start, count = first * 16, min(entries * size, PAGES - first * 16)
        new: dict[int, Page] = {}
        possible = len(self.mapped(start, count)) == count
        for head in range(start, start + count, size) if possible else ():
            group = [self.pages[page] for page in range(head, head + size)]
            if group[0].level.size >= level.size:
                continue
            base = group[0].address
            follow = all(p.address == base + n * PAGE for n, p in enumerate(group))
            rights = len({p.bits & ~HARVEST for p in group}) == 1
            possible &= follow and rights and base % level.size == 0
            bits = Bits.NONE
            for page in group:
                bits |= page.bits
            for n in range(size):
                new[head + n] = Page(base + n * PAGE, level, bits)
        try:
            self.table.collapse(start * PAGE, count * PAGE, level)
        except Invalid:
            assert not possible
            return
        assert possible
        self.pages.update(new)

    @rule(where=RANGES, granularity=st.none() | LEVELS)
    def copy_on_write(self, where: tuple[int, int], granularity: Level | None) -> None:
        start, count = where
        copied: set[int] = set()
        for page in self.mapped(start, count):
            old = self.pages[page]
            if Bits.WRITE in old.bits:
                continue
            size = (granularity or old.level).size // PAGE
            copied |= set(range(page - page % size, page - page % size + size))

        def allocate(length: int, align: int) -> int:
            place = -(-self.next_copy // align) * align
            self.next_copy = place + length
            return place

        copies = self.table.copy_on_write(start * PAGE, count * PAGE, allocate, granularity)
        covered = [
            p for c in copies for p in range(c.virtual // PAGE, (c.virtual + c.length) // PAGE)
        ]
        assert sorted(covered) == sorted(copied)
        self.split_edges_of(copied)
        for copy in copies:
            for n in range(copy.length // PAGE):
                page = copy.virtual // PAGE + n
                entry = self.table.walk(page * PAGE)[1]
                assert entry is not None
                assert entry.bits & (Bits.WRITE | Bits.DIRTY) == Bits.WRITE | Bits.DIRTY
                assert granularity is None or entry.level == granularity
                self.pages[page] = Page(copy.address + n * PAGE, entry.level, entry.bits)

    def split_edges_of(self, pages: set[int]) -> None:
        for page in sorted(pages):
            if page - 1 not in pages:
                self.split_edges(page, page)
            if page + 1 not in pages:
                self.split_edges(page + 1, page + 1)

    @invariant()
    def the_table_says_what_the_dictionary_says(self) -> None:
        found = {
            page: Page(run.address + n * PAGE, run.level, run.bits)
            for run in self.table.runs()
            for n, page in enumerate(pages_of(run))
        }
        assert found == self.pages

    @invariant()
    def runs_are_aligned_apart_and_joined(self) -> None:
        runs = list(self.table.runs())
        for run in runs:
            assert (run.virtual | run.address | run.length) % run.level.size == 0
            assert decode_word(
                TOY, encode_word(TOY, Entry(run.level, run.address, run.bits)), run.level
            )
        for left, right in pairwise(runs):
            assert left.end <= right.virtual
            follows = left.end == right.virtual and left.address + left.length == right.address
            assert not (follows and left[3:] == right[3:])

    @invariant()
    def the_statistics_are_those_of_the_dictionary(self) -> None:
        statistics = self.table.statistics()
        for level in TOY.levels:
            pages = [p for p, page in self.pages.items() if page.level == level]
            assert statistics.entries[level] == len(pages) * PAGE // level.size
        small = {p // 4 for p, page in self.pages.items() if page.level == SMALL}
        middle = {p // 16 for p, page in self.pages.items() if page.level != LARGE}
        assert [statistics.tables[v] for v in TOY.levels] == [len(small), len(middle), 1]


def pages_of(run: Run) -> range:
    return range(run.virtual // PAGE, run.end // PAGE)


Tables.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestTables = Tables.TestCase


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_word_decodes_to_the_entry_it_was_made_from(
    architecture: Architecture, data: st.DataObject
) -> None:
    level = data.draw(st.sampled_from(architecture.leaves))
    count = 1 << (architecture.physical_bits - level.shift)
    address = data.draw(st.integers(0, count - 1)) << level.shift
    bits = Bits.NONE
    for bit in Bits:
        known = bit in architecture.on or bit in architecture.unless
        if known and (bit != Bits.SPECIAL or level in architecture.special_levels):
            bits |= data.draw(st.sampled_from([Bits.NONE, bit]))
    word = encode_word(architecture, Entry(level, address, bits))
    assert word >> 64 == 0
    assert word & architecture.zero_bits(level) == 0
    assert decode_word(architecture, word, level) == Entry(level, address, bits)


@given(where=RANGES, target=st.integers(0, 40), level=LEVELS)
@settings(max_examples=100, deadline=None)
def test_split_then_collapse_is_identity(where: tuple[int, int], target: int, level: Level) -> None:
    start, count = where
    table = PageTable(TOY)
    table.map(start * PAGE, target * PAGE, count * PAGE, Bits.USER)
    before = list(table.runs())
    table.split(start * PAGE, count * PAGE, SMALL)
    assert all(run.level == SMALL for run in table.runs())
    for run in before:
        if run.level != SMALL:
            table.collapse(run.virtual, run.length, run.level)
    assert list(table.runs()) == before
