"""The allocator beside a set of free blocks."""

import random
import sys
from types import FrameType
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from vfsmap.alloc import Allocator
from vfsmap.errors import NoSpace
from vfsmap.units import Level

LEVELS = (Level("one", 0), Level("four", 2), Level("sixteen", 4))
"""Small ones, so that units come together and are broken all the time."""
BLOCKS = 96
Run = tuple[int, int]


def pieces(free: set[int], level: Level) -> list[Run]:
    """Return the longest runs of free, whole units of a level."""
    size = level.size
    units = [u for u in range(0, BLOCKS, size) if free.issuperset(range(u, u + size))]
    runs: list[Run] = []
    for unit in units:
        if runs and sum(runs[-1]) == unit:
            runs[-1] = (runs[-1][0], runs[-1][1] + size)
        else:
            runs.append((unit, size))
    return runs


class AllocatorModel(RuleBasedStateMachine):
    taken = Bundle("taken")

    @initialize(holes=st.sets(st.integers(0, BLOCKS - 1), max_size=10))
    def fill(self, holes: set[int]) -> None:
        self.space = Allocator(LEVELS)
        self.free = set(range(BLOCKS)) - holes
        for start, length in pieces(self.free, LEVELS[0]):
            self.space.free(start, length)

    @rule(
        target=taken,
        level=st.sampled_from(LEVELS),
        units=st.integers(1, 6),
        goal=st.none() | st.integers(0, BLOCKS),
        least=st.integers(0, 6),
    )
    def allocate(self, level: Level, units: int, goal: int | None, least: int) -> Run:
        length = units * level.size
        minimum = min(least, units) * level.size
        try:
            start, got = self.space.allocate(length, level, goal=goal, minimum=minimum)
        except NoSpace:
            # a run that lies in units of different levels is found piece by piece
            longest = self.space.largest(level)
            assert longest < (minimum or length)
            assert longest >= min(
                level.size, max((n for _, n in pieces(self.free, level)), default=0)
            )
            return 0, 0
        assert (minimum or length) <= got <= length
        assert start % level.size == got % level.size == 0
        assert self.free.issuperset(range(start, start + got))
        self.free.difference_update(range(start, start + got))
        return start, got

    @rule(run=consumes(taken))
    def give_back(self, run: Run) -> None:
        start, length = run
        if length:
            self.space.free(start, length)
            self.free.update(range(start, start + length))

    @rule(run=consumes(taken), cut=st.integers(1, 5))
    def give_back_in_two_parts(self, run: Run, cut: int) -> None:
        start, length = run
        for part in ((start + cut, length - cut), (start, min(cut, length))):
            self.give_back(part if part[1] > 0 else (0, 0))

    @rule(target=taken, start=st.integers(0, BLOCKS), length=st.integers(1, 40))
    def withhold(self, start: int, length: int) -> Any:
        runs = self.space.withhold(start, length)
        blocks = [at for first, size in runs for at in range(first, first + size)]
        wanted = self.free & set(range(start, start + length))
        assert sorted(blocks) == sorted(wanted)
        self.free -= wanted
        first, *others = runs or [(0, 0)]
        for run in others:
            self.give_back(run)
        return first

    @invariant()
    def the_same_blocks_are_free(self) -> None:
        blocks = [at for start, size in self.space.runs() for at in range(start, start + size)]
        assert sorted(blocks) == sorted(self.free)
        assert self.space.free_bytes == len(self.free)

    @invariant()
    def free_space_is_counted_at_the_largest_level_it_fills(self) -> None:
        for level in LEVELS:
            units = pieces(self.free, level)
            assert self.space.free_in_units(level) == sum(size for _, size in units)
            assert (self.space.largest(level) > 0) == bool(units)

    @invariant()
    def whole_units_are_listed_as_such(self) -> None:
        found = self.space.free_units(0, BLOCKS)
        blocks = {at for start, size in found for at in range(start, start + size)}
        units = pieces(self.free, LEVELS[1])
        assert blocks == {at for start, size in units for at in range(start, start + size)}


TestAllocatorModel = AllocatorModel.TestCase
TestAllocatorModel.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, derandomize=True
)


def test_a_request_costs_no_more_calls_in_a_large_pool() -> None:
    def calls(fragments: int) -> int:
        space = Allocator()
        for at in range(fragments):
            space.free(at << 13, 1 << 12)
        rng = random.Random(fragments)
        count = 0

        def note(frame: FrameType, event: str, arg: Any) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(note)
        try:
            for _ in range(200):
                start, length = space.allocate(1 << 12, goal=rng.randrange(fragments) << 13)
                space.free(start, length)
                for run in space.withhold(start, length):
                    space.free(*run)
        finally:
            sys.setprofile(None)
        return count

    assert calls(16_000) <= 1.3 * calls(500)
