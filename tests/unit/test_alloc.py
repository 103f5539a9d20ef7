import pytest

from vfsmap.alloc import Allocator
from vfsmap.errors import Invalid, NoSpace, NotAligned
from vfsmap.units import GIB, KIB, MIB, PMD, PTE, PUD, Level

PAGE = 4 * KIB


def allocator(*runs: tuple[int, int]) -> Allocator:
    made = Allocator()
    for start, length in runs:
        made.free(start, length)
    return made


def test_an_empty_allocator_has_nothing() -> None:
    empty = Allocator()
    assert (empty.free_bytes, list(empty.runs()), empty.largest(PTE)) == (0, [], 0)
    with pytest.raises(NoSpace, match=r"no free run of 4K; the largest .* multiple of 4K has 0"):
        empty.allocate(PAGE)


def test_small_pieces_come_from_the_smallest_fragment_that_fits() -> None:
    space = allocator((PAGE, PAGE), (4 * PAGE, 3 * PAGE), (2 * MIB, 2 * MIB))
    assert space.allocate(2 * PAGE) == (4 * PAGE, 2 * PAGE)
    assert space.allocate(PAGE) in {(PAGE, PAGE), (6 * PAGE, PAGE)}
    assert space.allocate(PAGE) in {(PAGE, PAGE), (6 * PAGE, PAGE)}
    assert space.free_in_units(PMD) == 2 * MIB, "a unit was broken though fragments were left"
    assert space.allocate(PAGE) == (2 * MIB, PAGE)


def test_what_is_freed_grows_back_into_units_of_every_level() -> None:
    space = allocator((0, 2 * GIB))
    assert space.free_in_units(PUD) == 2 * GIB
    taken = [space.allocate(MIB) for _ in range(1024)]
    assert space.free_in_units(PUD) == GIB
    for start, length in taken:
        space.free(start, length)
    assert sorted(space.runs()) == [(0, 2 * GIB)]


def test_a_fragment_never_reaches_over_the_border_of_a_unit() -> None:
    space = allocator((2 * MIB - PAGE, 2 * PAGE))
    assert sorted(space.runs()) == [(2 * MIB - PAGE, PAGE), (2 * MIB, PAGE)]


def test_a_unit_is_aligned_even_where_free_space_is_not() -> None:
    space = allocator((PAGE, 4 * MIB))
    assert space.allocate(2 * MIB, PMD) == (2 * MIB, 2 * MIB)
    with pytest.raises(NoSpace, match=r"no free run of 2M; the largest .* multiple of 2M has 0"):
        space.allocate(2 * MIB, PMD)
    assert space.free_bytes == 2 * MIB


@pytest.mark.parametrize("level", [PTE, PMD, PUD])
def test_a_run_of_any_level_starts_at_a_multiple_of_it(level: Level) -> None:
    space = allocator((PAGE, 4 * GIB))
    start, length = space.allocate(level.size, level)
    assert (start % level.size, length) == (0, level.size)


def test_a_file_that_grows_stays_in_one_piece() -> None:
    space = allocator((0, 8 * MIB))
    start, length = space.allocate(PAGE)
    for _ in range(100):
        more, got = space.allocate(PAGE, goal=start + length)
        assert more == start + length
        length += got


def test_a_unit_is_not_broken_only_to_grow_in_one_piece() -> None:
    space = allocator((0, 2 * MIB), (2 * MIB, PAGE))
    assert space.allocate(PAGE, goal=0) == (2 * MIB, PAGE)


def test_a_goal_that_is_not_free_is_no_obstacle() -> None:
    space = allocator((0, 8 * PAGE))
    assert space.allocate(PAGE, goal=64 * PAGE) == (0, PAGE)
    assert space.allocate(PAGE, goal=0) == (PAGE, PAGE)


def test_a_minimum_makes_a_shorter_run_welcome() -> None:
    space = allocator((0, 3 * PAGE), (8 * PAGE, 5 * PAGE))
    with pytest.raises(NoSpace):
        space.allocate(6 * PAGE)
    assert space.allocate(6 * PAGE, minimum=4 * PAGE) == (8 * PAGE, 5 * PAGE)
    with pytest.raises(NoSpace):
        space.allocate(6 * PAGE, minimum=4 * PAGE)
    assert space.free_bytes == 3 * PAGE


def test_what_is_withheld_is_free_space_cut_to_the_range() -> None:
    space = allocator((0, 4 * MIB), (6 * MIB, 2 * MIB))
    runs = space.withhold(PAGE, 6 * MIB)
    assert sorted(runs) == [(PAGE, 4 * MIB - PAGE), (6 * MIB, PAGE)]
    assert sorted(space.runs()) == [(0, PAGE), (6 * MIB + PAGE, 2 * MIB - PAGE)]
    assert space.free_bytes == 2 * MIB
    assert space.withhold(PAGE, 6 * MIB) == []
    for run in runs:
        space.free(*run)
    assert space.free_in_units(PMD) == 6 * MIB


def test_units_that_came_together_are_noted_once() -> None:
    space = allocator((0, 4 * MIB))
    space.promoted.clear()
    for _ in range(10):
        start, length = space.allocate(2 * MIB, PMD)
        space.free(start, length)
    assert len(space.promoted) <= 2
    assert space.promoted[start] == 2 * MIB
    assert space.allocate(PAGE)[0] == 0
    assert space.free_units(0, 4 * MIB) == [(2 * MIB, 2 * MIB)]
    assert space.free_units(3 * MIB, 4 * MIB) == [(3 * MIB, MIB)]


@pytest.mark.parametrize("length", [0, -PAGE, PAGE - 1, MIB])
def test_a_length_that_makes_no_sense_is_refused(length: int) -> None:
    with pytest.raises(Invalid):
        allocator((0, GIB)).allocate(length, PMD)


def test_only_whole_pages_can_be_freed() -> None:
    with pytest.raises(NotAligned):
        Allocator().free(1, PAGE)
    with pytest.raises(NotAligned):
        Allocator().free(PAGE, 1)
