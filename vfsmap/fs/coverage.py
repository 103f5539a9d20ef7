"""How much of the files, and of what is free, can be mapped in huge pages."""

from collections.abc import Generator, Iterable
from typing import Final, NamedTuple

from vfsmap.fs.state import State
from vfsmap.units import PMD, PTE, PUD, Extent, Level, align_down, align_up

LARGE: Final = PMD.size
"""From this size on, a file is expected to be huge."""
_SLICE: Final = 200


class Coverage(NamedTuple):
    """Bytes; those of a file count up to its end, and only where they have a place in the pool."""

    files: int
    """Of all files."""
    large: int
    """Of files of 2 MiB and more."""
    huge: int
    """Of these, what entries of 2 MiB can map."""
    giant: int
    """Of these, what entries of 1 GiB can map."""
    free: int
    """Of no file."""
    free_huge: int
    """Of these, what is in whole free units of 2 MiB."""
    free_giant: int
    """Of these, what is in whole free units of 1 GiB."""

    @property
    def share(self) -> float:
        """The part of large files that is huge; 1 when there are none."""
        return self.huge / self.large if self.large else 1.0


def mappable(extents: Iterable[Extent], size: int, level: Level) -> int:
    """Return how many of a file's ``size`` bytes entries of a level can map.

    Those are in whole units of the file that are whole units of the medium.

    Args:
        extents: of the file, ascending.
        size: of the file.
        level: of the entries.
    """
    total, at, start, end = 0, 0, 0, 0
    for extent in (*extents, Extent(-1, 0, 0)):
        if extent.offset == end and extent.start == start + end - at:
            end += extent.length
            continue
        if (start - at) % level.size == 0:
            first, last = align_up(at, level.size), align_down(end, level.size)
            total += max(min(last, size) - first, 0)
        at, start, end = extent.offset, extent.start, extent.offset + extent.length
    return total


def within(extents: Iterable[Extent], size: int) -> int:
    """Return how many of a file's ``size`` bytes have a place on the medium."""
    return sum(max(min(e.offset + e.length, size) - e.offset, 0) for e in extents)


def counting(fs: State) -> Generator[None, None, Coverage]:
    """Count, a slice of the files at a time; files that change meanwhile count as they are then.

    To be driven to its end, which returns the result; between two steps others may work.
    """
    files = large = huge = giant = 0
    owners = fs.owners_of_extents()
    for at in range(0, len(owners), _SLICE):
        for ino in owners[at : at + _SLICE]:
            size, extents = fs.size_and_extents(ino)
            present = within(extents, size)
            files += present
            if size >= LARGE:
                large += present
                huge += mappable(extents, size, PMD)
                giant += mappable(extents, size, PUD) if size >= PUD.size else 0
        yield
    space = fs.pool.space
    free, free_huge, free_giant = (space.free_in_units(level) for level in (PTE, PMD, PUD))
    return Coverage(files, large, huge, giant, free, free_huge, free_giant)


def coverage(fs: State) -> Coverage:
    """Return how much can be mapped in huge pages."""
    steps = counting(fs)
    while True:
        try:
            next(steps)
        except StopIteration as done:
            result: Coverage = done.value
            return result
