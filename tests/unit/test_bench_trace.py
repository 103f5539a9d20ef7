"""The life that file systems are aged with."""

import pytest

from vfsmap.units import GIB, MIB
from vfsmap_tools.bench.trace import FULL, Step, trace


@pytest.fixture(scope="module")
def steps() -> list[Step]:
    return list(trace(GIB, 2))


def test_the_same_seed_gives_the_same_life(steps: list[Step]) -> None:
    assert list(trace(GIB, 2)) == steps
    assert list(trace(GIB, 2, seed=2)) != steps


def test_files_are_made_before_they_grow_and_not_touched_after_they_are_gone(
    steps: list[Step],
) -> None:
    alive: set[int] = set()
    for step in steps:
        if step.kind == "create":
            assert step.file not in alive
            alive.add(step.file)
        else:
            assert step.file in alive
            if step.kind == "delete":
                alive.remove(step.file)


def test_it_fills_to_three_quarters_stays_there_and_writes_all_of_it_over_so_often(
    steps: list[Step],
) -> None:
    sizes: dict[int, int] = {}
    live, written = 0, 0
    for step in steps:
        if step.kind == "delete":
            live -= sizes.pop(step.file)
        sizes[step.file] = sizes.get(step.file, 0) + step.length
        live += step.length
        written += step.length
        assert live <= FULL * GIB
        if step.turnover and step.kind != "delete":
            assert live > FULL * GIB - 200 * MIB
    assert written >= 3 * FULL * GIB * 0.99
    assert {step.kind for step in steps} == {"create", "grow", "delete"}
