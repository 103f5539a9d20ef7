"""Any extents, any request: each byte asked for lies where its extent says."""

from itertools import pairwise

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vfsmap.errors import Unsupported
from vfsmap.mapping.layout import Layout, arrange, levels_of, merge
from vfsmap.pmem.medium import Commit, Medium
from vfsmap.units import KIB, MIB, PMD, PTE, PUD, Extent, align_down, align_up

PAGE = 4 * KIB
PIECES = st.lists(
    st.tuples(
        st.sampled_from([0, 0, 0, PAGE, MIB]),  # hole before it
        st.sampled_from([PAGE, 3 * PAGE, MIB, 2 * MIB, 5 * MIB, 1024 * MIB]),  # length
        st.integers(0, 1 << 20),  # where in the pool, in pages
        st.sampled_from([PTE, PMD, PUD]),  # aligned to
    ),
    min_size=1,
    max_size=8,
)


def extents_of(pieces: list[tuple[int, int, int, object]]) -> list[Extent]:
    extents = []
    offset = 0
    for hole, length, place, align in pieces:
        assert isinstance(align, type(PTE))
        offset += hole
        extents.append(Extent(offset, align_down(place * PAGE, align.size), length))
        offset += length
    return extents


def place_of(extents: list[Extent], offset: int) -> int | None:
    for extent in extents:
        if extent.offset <= offset < extent.offset + extent.length:
            return extent.start + offset - extent.offset
    return None


def place_in(layout: Layout, at: int) -> int | None:
    for call in layout.calls:
        if call.at <= at < call.at + call.length:
            return None if call.start is None else call.start + at - call.at
    raise AssertionError(f"{at:#x} is in no call")


@given(pieces=PIECES, data=st.data(), page_size=st.sampled_from([PTE.size, PMD.size, PUD.size]))
@settings(max_examples=400, deadline=None)
def test_each_byte_asked_for_is_mapped_from_its_place(
    pieces: list[tuple[int, int, int, object]], data: st.DataObject, page_size: int
) -> None:
    extents = extents_of(pieces)
    total = extents[-1].offset + extents[-1].length
    offset = data.draw(st.integers(0, total - 1))
    length = data.draw(st.integers(1, total - offset))
    medium = Medium("tmpfs", Commit.STORE, page_size, "always")
    try:
        layout = arrange(extents, offset, length, page_size=page_size, levels=levels_of(medium))
    except Unsupported:
        assume(False)
    assert layout.calls[0].at == 0
    assert layout.calls[-1].at + layout.calls[-1].length == layout.length
    for left, right in pairwise(layout.calls):
        assert left.at + left.length == right.at
        follows = left.start is not None and left.start + left.length == right.start
        assert not follows  # neighbours are merged
    for call in layout.calls:
        assert call.length > 0
        assert call.length % page_size == 0
        if call.start is not None:
            assert call.start % page_size == 0
            assert page_size == PTE.size or (layout.residue + call.at - call.start) % page_size == 0
    assert layout.length % page_size == 0
    edges = {0, length - 1, length // 2}
    edges |= {e.offset - offset for e in extents} | {e.offset + e.length - offset for e in extents}
    for at in edges:
        if 0 <= at < length:
            assert place_in(layout, layout.skip + at) == place_of(extents, offset + at)


@given(pieces=PIECES, data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_window_grows_only_within_its_files_extents(
    pieces: list[tuple[int, int, int, object]], data: st.DataObject
) -> None:
    extents = extents_of(pieces)
    total = extents[-1].offset + extents[-1].length
    offset = data.draw(st.integers(0, total - 1))
    length = data.draw(st.integers(1, total - offset))
    layout = arrange(extents, offset, length)
    first = align_down(offset, PAGE) - (layout.skip - offset % PAGE)
    for call in layout.calls:
        for at in (call.at, call.at + call.length - PAGE):
            assert place_in(layout, at) == place_of(extents, first + at)
    assert layout.length >= align_up(offset + length, PAGE) - align_down(offset, PAGE)


@given(pieces=PIECES.map(lambda pieces: pieces[:1]), data=st.data())
@settings(max_examples=300, deadline=None)
def test_an_extent_in_one_piece_is_laid_out_like_the_same_in_two(
    pieces: list[tuple[int, int, int, object]], data: st.DataObject
) -> None:
    (extent,) = extents_of(pieces)
    offset = data.draw(st.integers(extent.offset, extent.offset + extent.length - 1))
    length = data.draw(st.integers(1, extent.offset + extent.length - offset))
    levels = data.draw(st.sampled_from([(PTE,), (PTE, PMD), (PTE, PMD, PUD), (PMD,)]))
    half = align_up(extent.length // 2, PAGE)
    two = [
        extent._replace(length=half),
        Extent(extent.offset + half, extent.start + half, extent.length - half),
    ]
    parts = [part for part in two if part.length]
    assert arrange([extent], offset, length, levels=levels) == arrange(
        parts, offset, length, levels=levels
    )


@given(pieces=PIECES)
def test_merging_changes_no_place(pieces: list[tuple[int, int, int, object]]) -> None:
    extents = extents_of(pieces)
    merged = list(merge(extents))
    assert len(merged) <= len(extents)
    for extent in extents:
        assert place_of(merged, extent.offset) == extent.start
        last = extent.length - PAGE
        assert place_of(merged, extent.offset + last) == extent.start + last
