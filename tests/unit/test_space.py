import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfsmap.errors import NoSpace, PoolDamaged
from vfsmap.pmem import Medium, Pmem
from vfsmap.pool.layout import FIRST_FREE
from vfsmap.pool.space import Space
from vfsmap.testing import media
from vfsmap.testing.pools import HUGE, STORED, open_pmem, scratch
from vfsmap.units import KIB, MIB, PMD

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
PAGE = 4 * KIB
SIZE = 16 * MIB


@pytest.fixture
def directory() -> Iterator[Path]:
    with scratch() as path:
        yield path


def opened(directory: Path, medium: Medium = STORED, size: int = SIZE) -> Pmem:
    path = directory / "pool"
    path.touch()
    os.truncate(path, size)
    return open_pmem(path, medium)


def filled(pmem: Pmem) -> Space:
    space = Space(pmem)
    space.fill([], pmem.size)
    return space


def holes(pmem: Pmem) -> int:
    return pmem.size - os.fstat(pmem.fd).st_blocks * 512


def test_everything_but_the_superblocks_and_what_is_used_is_free(directory: Path) -> None:
    space = Space(opened(directory))
    space.fill([(8 * MIB, MIB), (FIRST_FREE, PAGE)], SIZE)
    assert space.free_bytes == SIZE - FIRST_FREE - MIB - PAGE
    assert sorted(space.runs())[0][0] == FIRST_FREE + PAGE


@pytest.mark.parametrize(
    ("used", "message"),
    [
        ([(8 * MIB, MIB), (8 * MIB, MIB)], "bytes at 0x800000 belong to two extents"),
        ([(8 * MIB, MIB), (9 * MIB - PAGE, MIB)], "bytes at 0x8ff000 belong to two"),
        ([(0, PAGE)], "belong to two"),
        ([(15 * MIB, 2 * MIB)], "ends at 0x1100000, behind the pool's end at 0x1000000"),
        ([(32 * MIB, MIB), (64 * MIB, MIB)], "behind the pool's end"),
        ([(8 * MIB + 1, MIB)], "not on whole blocks"),
        ([(8 * MIB, 100)], "not on whole blocks"),
    ],
)
def test_extents_that_can_not_be_are_damage(
    directory: Path, used: list[tuple[int, int]], message: str
) -> None:
    with pytest.raises(PoolDamaged, match=message):
        Space(opened(directory)).fill(used, SIZE)


def test_what_is_handed_out_has_blocks_below(directory: Path) -> None:
    pmem = opened(directory)
    space = filled(pmem)
    assert holes(pmem) == SIZE
    space.take(PAGE)
    assert holes(pmem) == SIZE - 2 * MIB, "a reservation is made for a whole unit"
    space.take(4 * MIB, PMD)
    assert holes(pmem) == SIZE - 6 * MIB


@pytest.mark.parametrize("medium", [STORED, HUGE], ids=lambda medium: medium.name)
def test_units_read_as_zeros_whatever_they_held(directory: Path, medium: Medium) -> None:
    pmem = opened(directory, medium)
    pmem.store(FIRST_FREE, b"x" * (SIZE - FIRST_FREE))
    space = filled(pmem)
    start, length = space.take(4 * MIB, PMD)
    assert bytes(pmem.view[start : start + length]) == bytes(length)


def test_a_small_run_is_cleared_without_a_hole_in_its_unit(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pmem = opened(directory)
    pmem.store(FIRST_FREE, b"x" * (SIZE - FIRST_FREE))
    space = filled(pmem)
    punched: list[tuple[int, int]] = []
    punch = Pmem.punch

    def noted(pmem: Pmem, offset: int, length: int) -> bool:
        punched.append((offset, length))
        return punch(pmem, offset, length)

    monkeypatch.setattr(Pmem, "punch", noted)
    space.clear(4 * MIB + PAGE, PAGE)
    space.clear(6 * MIB - PAGE, 3 * MIB)
    assert punched == [(6 * MIB, 2 * MIB)]
    content = bytes(pmem.view[4 * MIB : 9 * MIB])
    zeros = [at for at in range(0, 5 * MIB, PAGE) if not content[at]]
    assert zeros == [PAGE, *range(2 * MIB - PAGE, 5 * MIB - PAGE, PAGE)]
    assert holes(pmem) == FIRST_FREE


def test_whole_units_that_are_free_go_back_below_a_slice_at_a_time(directory: Path) -> None:
    pmem = opened(directory)
    space = filled(pmem)
    while space.trim():
        pass
    runs = [space.take(2 * MIB, PMD) for _ in range(7)]
    small = space.take(PAGE)
    assert holes(pmem) == 0
    for run in runs:
        space.free(*run)
    assert space.trim(most=2 * MIB)
    assert holes(pmem) == 2 * MIB
    again = space.take(4 * MIB, PMD)
    while space.trim():
        pass
    assert holes(pmem) == 10 * MIB
    assert not space.trim()
    space.free(*again)
    space.free(*small)
    while space.trim():
        pass
    # the first unit holds the superblocks, and so is never whole
    assert holes(pmem) == 14 * MIB


def test_what_was_given_back_is_reserved_again_before_it_is_used(directory: Path) -> None:
    pmem = opened(directory)
    space = filled(pmem)
    blocks = [space.take(PAGE) for _ in range(3 * 512)]
    for block in blocks:
        space.free(*block)
    while space.trim():
        pass
    before = holes(pmem)
    for start, length in [space.take(PAGE) for _ in range(3 * 512)]:
        pmem.store(start, b"x" * length)
    assert holes(pmem) < before
    assert os.fstat(pmem.fd).st_blocks * 512 >= 3 * 512 * PAGE


@needs_root
@pytest.mark.parametrize("huge", ["never", "always"])
def test_a_full_tmpfs_refuses_and_never_raises_sigbus(huge: str) -> None:
    with media.tmpfs(huge, "8M") as below:
        pmem = Pmem.create(below / "pool", 64 * MIB)
        pmem.reserve(0, FIRST_FREE)
        space = filled(pmem)
        runs = [space.take(2 * MIB, PMD)]
        (below / "other").write_bytes(bytes(3 * MIB + 5 * PAGE))
        with pytest.raises(NoSpace, match="can't reserve 4M"):
            space.take(4 * MIB, PMD)
        free = space.free_bytes
        while True:
            try:
                runs.append(space.take(3 * PAGE, minimum=PAGE))
            except NoSpace:
                break
            free -= runs[-1][1]
        assert space.free_bytes == free
        for start, length in runs:
            pmem.store(start, b"x" * length)
        room = pmem.room()
        assert room is not None
        assert room - os.fstat(pmem.fd).st_blocks * 512 < 3 * PAGE
        pmem.close()


@needs_root
def test_a_full_hugetlbfs_refuses_and_never_raises_sigbus() -> None:
    with media.hugetlbfs("2M", 3) as below:
        pmem = Pmem.create(below / "pool", 64 * MIB)
        pmem.reserve(0, FIRST_FREE)
        space = filled(pmem)
        runs = [space.take(2 * MIB, PMD), space.take(8 * PAGE), space.take(2 * MIB, PMD)]
        with pytest.raises(NoSpace, match="of free huge pages of 2M"):
            space.take(2 * MIB, PMD)
        runs.append(space.take(100 * PAGE))
        for start, length in runs:
            pmem.store(start, b"x" * length)
        space.free(*runs[0])
        assert space.take(2 * MIB, PMD) == runs[0]
        pmem.close()
