"""Runs: neighbouring entries of one level as one object, and how they divide and join."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from vfsmap.errors import Invalid
from vfsmap.pgtable.architecture import Bits
from vfsmap.units import Level, align_down, align_up

_HARVEST = Bits.ACCESSED | Bits.DIRTY | Bits.SOFT_DIRTY


class Run(NamedTuple):
    """Neighbouring entries of one level with the same bits."""

    virtual: int
    address: int
    length: int
    level: Level
    bits: Bits

    @property
    def end(self) -> int:
        """The first virtual address behind it."""
        return self.virtual + self.length


def largest(
    virtual: int, address: int, length: int, bits: Bits, levels: Sequence[Level]
) -> Iterator[Run]:
    """Yield the runs that map a range by the largest of ``levels``, in order of address."""
    for level in sorted(levels, key=lambda level: -level.size):
        start, end = align_up(virtual, level.size), align_down(virtual + length, level.size)
        if start < end and (virtual - address) % level.size == 0:
            smaller = [v for v in levels if v.size < level.size]
            yield from largest(virtual, address, start - virtual, bits, smaller)
            yield Run(start, address + start - virtual, end - start, level, bits)
            rest = virtual + length - end
            yield from largest(end, address + end - virtual, rest, bits, smaller)
            return


def divided(run: Run, at: int, leaves: Sequence[Level]) -> Iterator[Run]:
    """Yield the run in pieces, one of which ends at ``at``; an entry that spans it is split."""
    if at <= run.virtual or at >= run.end:
        yield run
        return
    start = align_down(at, run.level.size)
    if start == at:
        yield _part(run, run.virtual, at)
        yield _part(run, at, run.end)
        return
    if run.virtual < start:
        yield _part(run, run.virtual, start)
    smaller = leaves[leaves.index(run.level) - 1]
    yield from divided(_part(run, start, start + run.level.size, smaller), at, leaves)
    if start + run.level.size < run.end:
        yield _part(run, start + run.level.size, run.end)


def joined(runs: Iterable[Run]) -> Iterator[Run]:
    """Yield the runs with neighbours that are alike made one."""
    last: Run | None = None
    for run in runs:
        if last and _follows(last, run) and last[3:] == run[3:]:
            last = last._replace(length=last.length + run.length)
            continue
        if last:
            yield last
        last = run
    if last:
        yield last


def stretches(runs: Iterable[Run]) -> Iterator[list[Run]]:
    """Yield lists of runs that follow each other in both addresses and have the same rights."""
    stretch: list[Run] = []
    for run in runs:
        if stretch and not (_follows(stretch[-1], run) and _rights(stretch[-1]) == _rights(run)):
            yield stretch
            stretch = []
        stretch.append(run)
    if stretch:
        yield stretch


def collapsed(stretch: Sequence[Run], level: Level) -> list[Run]:
    """Return entries of ``level`` in place of a stretch; accessed and dirty add up in each.

    Raises:
        Invalid: its addresses or its ends are off the level's size.
    """
    first, last = stretch[0], stretch[-1]
    if (first.virtual | first.address | last.end) % level.size:
        raise Invalid(
            f"{first.virtual:#x}+{last.end - first.virtual:#x} can't be entries of {level}: "
            "the bytes behind it, or the rights, change inside one"
        )
    whole: list[Run] = []
    shared: dict[int, Bits] = {}  # entries that take parts of several runs
    for run in stretch:
        start, end = align_up(run.virtual, level.size), align_down(run.end, level.size)
        if start < end:
            whole.append(_part(run, start, end, level))
        for edge in {align_down(run.virtual, level.size), align_down(run.end - 1, level.size)}:
            if not start <= edge < end:
                shared[edge] = shared.get(edge, Bits.NONE) | run.bits
    for edge, bits in shared.items():
        address = first.address + edge - first.virtual
        whole.append(Run(edge, address, level.size, level, bits))
    return sorted(whole, key=lambda run: run.virtual)


def _part(run: Run, start: int, end: int, level: Level | None = None) -> Run:
    address = run.address + start - run.virtual
    return Run(start, address, end - start, level or run.level, run.bits)


def _follows(left: Run, right: Run) -> bool:
    return left.end == right.virtual and left.address + left.length == right.address


def _rights(run: Run) -> Bits:
    return run.bits & ~_HARVEST
