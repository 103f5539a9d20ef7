"""Where a window's bytes lie: the mmap calls, and the alignment that lets them be huge.

A file's bytes lie in the pool as extents.  An entry of a level can map a run of the pool only
where the address and the pool offset agree modulo the level's size.  The difference of the two is
the run's *colour*; a window has one base address, hence one colour, and the layout chooses the one
that lets most bytes be huge.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from vfsmap.errors import Invalid, Unsupported
from vfsmap.pmem.medium import Medium
from vfsmap.units import LEVELS, PMD, PTE, Extent, Level, align_down, align_up, format_size


class Call(NamedTuple):
    """One mmap(2) of a window."""

    at: int
    """Bytes from the window's base."""
    start: int | None
    """Pool offset; None: a hole, anonymous zeros."""
    length: int


class Layout(NamedTuple):
    """A window before it has an address."""

    calls: tuple[Call, ...]
    """Ascending, without gaps."""
    length: int
    """Bytes of addresses, a multiple of the medium's page size."""
    skip: int
    """Bytes from the base to the first one asked for."""
    level: Level
    """The largest level that can map any of it."""
    residue: int
    """The base is this modulo the level's size."""


def levels_of(medium: Medium) -> tuple[Level, ...]:
    """Return the levels whose entries can map the medium, smallest first."""
    if medium.page_size == PTE.size:
        return PTE, PMD
    shift = medium.page_size.bit_length() - 1
    name = next((v.name for v in LEVELS if v.shift == shift), format_size(medium.page_size))
    return (Level(name, shift),)


def merge(extents: Iterable[Extent]) -> Iterator[Extent]:
    """Join extents that are neighbours both in the file and in the pool.

    Raises:
        Invalid: they overlap or are not ascending.
    """
    last: Extent | None = None
    for extent in extents:
        if last is None:
            last = extent
            continue
        end = last.offset + last.length
        if extent.offset < end:
            raise Invalid(f"extent at file offset {extent.offset:#x} starts before {end:#x}")
        if extent.offset == end and extent.start == last.start + last.length:
            last = last._replace(length=last.length + extent.length)
        else:
            yield last
            last = extent
    if last is not None:
        yield last


def arrange(
    extents: Iterable[Extent],
    offset: int,
    length: int,
    *,
    page_size: int = PTE.size,
    levels: Sequence[Level] = LEVELS,
    holes: bool = True,
) -> Layout:
    """Lay the file's bytes from ``offset`` on out in one range of addresses.

    ``page_size`` is the smallest piece the medium maps, ``levels`` those that may be used, smallest
    first.  The
    range grows outwards to whole entries where the file's own extent fills them, and to whole
    pages of the medium in any case.

    Raises:
        Invalid: nothing is asked for, or there is a hole and ``holes`` forbids it.
        Unsupported: the medium's pages are too large for the way the file lies in the pool.
    """
    if offset < 0 or length <= 0:
        raise Invalid(f"can't map {length} bytes at {offset}; a window has at least one byte")
    low, high = align_down(offset, PTE.size), align_up(offset + length, PTE.size)
    extents = tuple(extents)
    if len(extents) == 1 and page_size == PTE.size:
        (one,) = extents
        if one.offset <= low and high <= one.offset + one.length:
            return _arrange_one(one, offset, low, high, levels)
    inside = [e for e in merge(extents) if e.offset < high and e.offset + e.length > low]
    level, colour = _colour(inside, low, high, page_size, levels)
    low, high = _grow(inside, low, high, colour, level)
    calls = _calls([_clip(e, low, high) for e in inside], low, high)
    if not holes and any(call.start is None for call in calls):
        raise Invalid("the file has holes there; allocate them first, or map it read-only")
    calls = _to_pages(calls, low + colour, page_size)
    base = low + colour + calls[0].at
    total = calls[-1].at + calls[-1].length - calls[0].at
    moved = tuple(call._replace(at=call.at - calls[0].at) for call in calls)
    return Layout(moved, total, offset + colour - base, level, base % level.size)


def _arrange_one(
    extent: Extent, offset: int, low: int, high: int, levels: Sequence[Level]
) -> Layout:
    """Lay out one extent that holds all of the range, as most files do: the same, but fast."""
    shift = extent.start - extent.offset
    for level in reversed(levels):
        first, last = _whole(extent, low, high, level.size)
        if first < last:
            low, high = min(low, first - shift), max(high, last - shift)
            break
    else:
        level = PTE
    start, size = low + shift, high - low
    return Layout((Call(0, start, size),), size, offset - low, level, start % level.size)


def _colour(
    extents: Sequence[Extent], low: int, high: int, page_size: int, levels: Sequence[Level]
) -> tuple[Level, int]:
    """Return the largest level of use, and the colour (modulo it) that maps most bytes by it."""
    for level in reversed(levels):
        gain: Counter[int] = Counter()
        for extent in extents:
            start, end = _whole(extent, low, high, level.size)
            gain[(extent.start - extent.offset) % level.size] += max(0, end - start)
        colour, best = max(gain.items(), key=lambda item: item[1], default=(0, 0))
        if best or level.size == page_size:
            return level, colour
    return PTE, 0


def _whole(extent: Extent, low: int, high: int, size: int) -> tuple[int, int]:
    """Return the pool range of the entries that lie in the extent and touch the request."""
    shift = extent.start - extent.offset
    end = extent.start + extent.length
    first = max(align_up(extent.start, size), align_down(low + shift, size))
    last = min(align_down(end, size), align_up(high + shift, size))
    return first, last


def _grow(
    extents: Sequence[Extent], low: int, high: int, colour: int, level: Level
) -> tuple[int, int]:
    """Widen the request to whole entries at both ends, where an extent fills them."""
    for extent in extents:
        if (extent.start - extent.offset - colour) % level.size:
            continue
        shift = extent.start - extent.offset
        first, last = _whole(extent, low, high, level.size)
        if first < last:
            low, high = min(low, first - shift), max(high, last - shift)
    return low, high


def _clip(extent: Extent, low: int, high: int) -> Extent:
    first, last = max(extent.offset, low), min(extent.offset + extent.length, high)
    return Extent(first, extent.start + first - extent.offset, last - first)


def _calls(extents: Sequence[Extent], low: int, high: int) -> list[Call]:
    """Return the calls for each extent and for each hole between, in bytes from ``low``."""
    calls: list[Call] = []
    done = low
    for extent in extents:
        if extent.offset > done:
            calls.append(Call(done - low, None, extent.offset - done))
        calls.append(Call(extent.offset - low, extent.start, extent.length))
        done = extent.offset + extent.length
    if done < high:
        calls.append(Call(done - low, None, high - done))
    return calls


def _to_pages(calls: list[Call], base: int, page_size: int) -> list[Call]:
    """Widen the first and the last call to whole pages of the medium.

    Raises:
        Unsupported: two calls share a page of the medium.
    """
    if page_size == PTE.size:
        return calls
    pages = f"the medium maps whole pages of {format_size(page_size)}"
    for call in calls:
        if call.start is not None and (call.start - call.at - base) % page_size:
            raise Unsupported(f"{pages}, and the file's extents lie there at different offsets")
    for left, right in pairwise(calls):
        if (base + right.at) % page_size:
            kind = "an extent and a hole" if None in (left.start, right.start) else "two extents"
            raise Unsupported(f"{pages}, and {kind} of the file share one; give it an alignment")
    first = calls[0]
    before = (base + first.at) % page_size
    start = None if first.start is None else first.start - before
    calls[0] = Call(first.at - before, start, first.length + before)
    last = calls[-1]
    calls[-1] = last._replace(length=last.length + -(base + last.at + last.length) % page_size)
    return calls
