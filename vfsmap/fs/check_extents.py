"""Checking extents: whole blocks inside the pool, each byte of the pool and of a file only once."""

from collections import defaultdict
from typing import Final

from sortedcontainers import SortedDict

from vfsmap.fs.data import MAX_SIZE
from vfsmap.fs.draft import Draft, Run
from vfsmap.pool.layout import BLOCK, FIRST_FREE
from vfsmap.pool.scan import Scan
from vfsmap.units import align_up

_LAST_END: Final = align_up(MAX_SIZE, BLOCK)

Range = tuple[int, int]
"""Start and end."""


class Claims:
    """Ranges that are taken; whoever comes first keeps them."""

    def __init__(self) -> None:
        self._taken: SortedDict[int, int] = SortedDict()

    def claim(self, start: int, end: int) -> list[Range]:
        """Take a range, and return the parts of it that were free."""
        free: list[Range] = []
        position, low, high = start, start, end
        before = max(self._taken.bisect_right(start) - 1, 0)
        for first, last in self._taken.items()[before : self._taken.bisect_right(end)]:
            if last < start:
                continue
            if position < first:
                free.append((position, first))
            position, low, high = max(position, last), min(low, first), max(high, last)
            del self._taken[first]
        if position < end:
            free.append((position, end))
        self._taken[low] = high
        return free


def check_extents(draft: Draft, found: Scan) -> None:
    """Check the extents of files, of Merkle trees and of programs."""
    for runs in (draft.extents, draft.trees):
        for oid, run in list(runs.items()):
            if _impossible(run, found.superblock.size):
                what = f"{run.length:#x} bytes at {run.start:#x} can't be an extent"
                draft.note("extent", draft.owner_named(run), what, "end it")
                draft.end(oid)
            elif run.start + run.length > found.size:
                what = f"its bytes at {run.start:#x} are lost: the file is too short"
                draft.note("lost", draft.owner_named(run), what, "let them read as zeros")
    _check_overlaps(draft, found)
    _check_offsets(draft, draft.extents)
    _check_offsets(draft, draft.trees)


def file_ends(draft: Draft) -> dict[int, int]:
    """Return where the last extent of each file ends."""
    ends: defaultdict[int, int] = defaultdict(int)
    for run in draft.extents.values():
        ends[run.owner] = max(ends[run.owner], min(run.offset + run.length, MAX_SIZE))
    return ends


def _impossible(run: Run, size: int) -> bool:
    return (
        (run.offset | run.start | run.length) % BLOCK > 0
        or run.length == 0
        or run.offset + run.length > _LAST_END
        or run.start < FIRST_FREE
        or run.start + run.length > size
    )


def _check_overlaps(draft: Draft, found: Scan) -> None:
    """Cut extents that share pool bytes with the log, or with an extent written later."""
    claims = Claims()
    for half in found.superblock.halves:
        claims.claim(half.start, half.start + half.length)
    runs = {**draft.extents, **draft.trees}
    for oid in sorted(runs, key=draft.age, reverse=True):
        run = runs[oid]
        free = claims.claim(run.start, run.start + run.length)
        if free != [(run.start, run.start + run.length)]:
            what = f"its bytes at {run.start:#x} belong to what was written later"
            draft.note("overlap", draft.owner_named(run), what, "let them read as zeros")
            draft.cut_extent(oid, [_part(run, start, end) for start, end in free])


def _check_offsets(draft: Draft, runs: dict[int, Run]) -> None:
    """Cut extents that hold the same part of a file as one written later."""
    files: defaultdict[int, Claims] = defaultdict(Claims)
    for oid in sorted(runs, key=draft.age, reverse=True):
        run = runs[oid]
        if run.owner == 0:
            continue
        free = files[run.owner].claim(run.offset, run.offset + run.length)
        if free != [(run.offset, run.offset + run.length)]:
            what = f"two extents hold its bytes at {run.offset:#x}"
            draft.note("overlap", draft.owner_named(run), what, "keep what was written later")
            shift = run.start - run.offset
            draft.cut_extent(oid, [_part(run, start + shift, end + shift) for start, end in free])


def _part(run: Run, start: int, end: int) -> Run:
    return Run(run.owner, run.offset + start - run.start, start, end - start)
