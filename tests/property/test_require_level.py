"""Whether entries of a level can map a range: told from extents as it is from each unit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfsmap.daemon.grants import require_level
from vfsmap.errors import Unsupported
from vfsmap.units import KIB, Extent

LEVEL = 16 * KIB


@st.composite
def files(draw: st.DrawFn) -> list[Extent]:
    """Extents of 4 KiB pages, ascending, with holes, at places that often fit the level."""
    extents: list[Extent] = []
    at = 0
    for hole, pages, shift in draw(
        st.lists(
            st.tuples(
                st.sampled_from([0, 0, 0, 1, 4]), st.integers(1, 12), st.sampled_from([0, 0, 1])
            ),
            max_size=5,
        )
    ):
        at += hole * 4 * KIB
        place = 1024 * KIB * (len(extents) + 1) + at + shift * 4 * KIB
        extents.append(Extent(at, place, pages * 4 * KIB))
        at += pages * 4 * KIB
    return extents


def first_unfit(extents: list[Extent], offset: int, length: int) -> int | None:
    for unit in range(offset - offset % LEVEL, offset + length, LEVEL):
        if not any(
            e.offset <= unit
            and unit + LEVEL <= e.offset + e.length
            and (e.start + unit - e.offset) % LEVEL == 0
            for e in extents
        ):
            return unit
    return None


@given(extents=files(), offset=st.integers(0, 40 * KIB), length=st.integers(1, 200 * KIB))
def test_the_first_unit_that_does_not_fit_is_named(
    extents: list[Extent], offset: int, length: int
) -> None:
    unfit = first_unfit(extents, offset, length)
    if unfit is None:
        require_level(extents, offset, length, LEVEL)
    else:
        with pytest.raises(Unsupported, match=rf"file offset {unfit:#x} can't"):
            require_level(extents, offset, length, LEVEL)
