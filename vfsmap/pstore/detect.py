"""Find out the geometry of a region from its content.

A ledger tells it.  Without one, the zones' signatures do: every geometry that puts its zones where
signatures are is tried, and the one that leaves the least unexplained wins.  Zones that are empty
and of one size can't be told apart; then console and pmsg are taken to be there, as people set
regions up.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Final, NamedTuple

from vfsmap.errors import Damaged, Invalid
from vfsmap.pstore.ecc import matching_sizes
from vfsmap.pstore.geometry import (
    HEADER,
    MAX_REGION,
    ORDERS,
    Geometry,
    Group,
    Kind,
    Order,
    round_down,
)
from vfsmap.pstore.margin import find_geometry
from vfsmap.pstore.record import parse_header

_LEAST: Final = 512  # bytes: smaller console, pmsg and ftrace sizes are not looked for
_MOST_LEFT: Final = 6  # only so many of the last plain signatures are tried as the records' end
_MOST_CPUS: Final = 1024
# "DBGC" XORed with the version code of a kernel 2.x.y to 31.x.y, or two bytes of "DBGC" itself
_TRACED: Final = rb"..[\x40-\x45\x48-\x5f]C"
_SPOILT: Final = rb"DB..|D.G.|D..C|.BG.|.B.C|..GC"
_SIGNATURES: Final = re.compile(rb"(?=(%s)|%s)" % (_TRACED, _SPOILT), re.DOTALL)


class Site(NamedTuple):
    """A place in the region that looks like the head of a zone."""

    signature: bytes
    traced: bool
    """Whether it is one of an ftrace zone."""
    size: int
    begins: bytes
    """The first bytes of its data."""


Sites = dict[int, Site]
Sizes = tuple[tuple[Kind, int], ...]


class _Layout(NamedTuple):
    sizes: Sizes
    cpus: int
    end: int


def detect(buffer: bytes | bytearray | memoryview) -> Geometry:
    """Return the geometry of the region at the start of a buffer.

    Raises:
        Damaged: no ramoops region is there, or nothing explains what is.
    """
    region = memoryview(buffer).cast("B")[:MAX_REGION]
    known = find_geometry(region)
    if known:
        return known
    sites = _find_sites(region)
    judge = _Judge(region, sites)
    best = max(_guess(region, sites), key=judge, default=None)
    if best is None or 4 * judge(best)[1] < 3 * len(best.places):
        raise Damaged(
            f"no ramoops region found in {len(region):#x} bytes: give its geometry, or format it"
        )
    return replace(best, ecc=_detect_ecc(region, best))


def _find_sites(region: memoryview) -> Sites:
    sites = {}
    for match in _SIGNATURES.finditer(region):
        at = match.start()
        head = region[at : at + HEADER]
        if at % 2 or len(head) < HEADER:
            continue
        start, size = (int.from_bytes(head[i : i + 4], "little") for i in (4, 8))
        if start <= size < len(region):
            begins = bytes(region[at + HEADER : at + HEADER + 64])
            sites[at] = Site(bytes(head[:4]), match[1] is not None, size, begins)
    return sites


def _guess(region: memoryview, sites: Sites) -> Iterator[Geometry]:
    """Yield geometries whose zones are at signatures."""
    plain = [at for at, site in sites.items() if not site.traced]
    traced = [at for at, site in sites.items() if site.traced]
    length = len(region)
    ends = [length, *(1 << shift for shift in range(length.bit_length() - 1, 9, -1))]
    ends = [end for end in ends if end > max(sites, default=0)]
    for end in ends:
        yield from _complete(sites, None, {}, end, 1, ORDERS[-1])
    for start in {0, *plain[-_MOST_LEFT:], *traced[:1]}:
        for order in ORDERS:
            for sizes, cpus, least in _lay_out(sites, start, order, length):
                if order == "6.1" and not dict(sizes)["ftrace"]:
                    continue  # the same zones as in the other order
                for end in {*(end for end in ends if end >= least), least}:
                    yield from _complete(sites, start, dict(sizes), end, cpus, order)


def _lay_out(sites: Sites, start: int, order: Order, limit: int) -> Iterator[_Layout]:
    """Yield what console, pmsg and ftrace zones there can be from ``start`` on."""
    kinds: tuple[Kind, ...] = ("console", "ftrace", "pmsg")
    if order == "6.12":
        kinds = ("console", "pmsg", "ftrace")
    last = max(sites, default=0)

    def extend(done: Sizes, cpus: int, at: int) -> Iterator[_Layout]:
        if len(done) == len(kinds):
            if at > last:
                yield _Layout(done, cpus, at)
            return
        kind = kinds[len(done)]
        yield from extend((*done, (kind, 0)), cpus, at)
        site = sites.get(at)
        if site is None or site.traced != (kind == "ftrace"):
            return
        size = _LEAST
        while at + size <= limit:
            for count in _count_cpus(sites, at, size) if kind == "ftrace" else (1,):
                end = at + (size // count & ~1) * count
                if end in sites or end > last:
                    more = (*done, (kind, size))
                    yield from extend(more, max(cpus, count), end)
            size *= 2

    return extend((), 1, start)


def _count_cpus(sites: Sites, at: int, size: int) -> Iterator[int]:
    """Yield how many zones of one version can share ``size`` bytes from ``at``."""
    signature = sites[at].signature
    for count in range(1, min(_MOST_CPUS, size // 64) + 1):
        step = size // count & ~1
        places = (sites.get(at + step * index) for index in range(count))
        if all(site is not None and site.signature == signature for site in places):
            yield count


def _complete(
    sites: Sites, start: int | None, sizes: dict[Kind, int], size: int, cpus: int, order: Order
) -> Iterator[Geometry]:
    """Yield the geometries of a region of ``size`` whose records end at ``start``."""
    console, pmsg, ftrace = (sizes.get(kind, 0) for kind in ("console", "pmsg", "ftrace"))
    dump = size - console - pmsg - ftrace
    record = 0 if start == 0 else round_down(max(dump, 0))
    while record >= _LEAST or start == 0:
        count = dump // record if record else 0
        step = dump // count & ~1 if count else 0
        if start in (None, count * step) and (count < 2 or step in sites or 2 * step in sites):
            with suppress(Invalid):
                yield Geometry(size, record, console, pmsg, ftrace, 0, cpus, order)
        if not record:
            return
        record //= 2


class _Judge:
    """Tells how well a geometry explains the signatures."""

    def __init__(self, region: memoryview, sites: Sites) -> None:
        self._length = len(region)
        self._sites = sites
        self._marks = cache(self._mark)

    def __call__(self, geometry: Geometry) -> tuple[int, ...]:
        """Return a geometry's marks; the larger the better."""
        found = bad = 0
        for group in geometry.groups:
            fit, wrong = self._marks(group)
            found, bad = found + fit, bad + wrong
        left = sum(at < geometry.size for at in self._sites) - found
        usual = bool(geometry.console), bool(geometry.pmsg), geometry.console == geometry.pmsg
        whole = geometry.size == self._length
        snug = bool(geometry.record) or not geometry.dump  # nothing is left over
        return (-bad - 2 * left, found, whole, snug, *usual, -geometry.size)

    def _mark(self, group: Group) -> tuple[int, int]:
        """Return how many zones have a signature, and what speaks against the others."""
        kind, count, offset, size = group
        found = bad = 0
        for at in range(offset, offset + count * size, size):
            site = self._sites.get(at)
            if site is None or site.traced != (kind == "ftrace"):
                bad += 3
                continue
            found += 1
            bad += 2 * (site.size > size - HEADER)
            if site.size and kind != "ftrace":
                bad += 2 * ((parse_header(site.begins) is None) == (kind == "dmesg"))
        return found, bad


def _detect_ecc(region: memoryview, geometry: Geometry) -> int:
    """Return the parity bytes that most zones' ends show to be in use; 0: none are."""
    votes: dict[int, int] = {}
    places = geometry.places[:64]
    for place in places:
        zone = bytes(region[place.offset : place.offset + place.size])
        for size in matching_sizes(zone[:HEADER], zone[HEADER:]):
            votes[size] = votes.get(size, 0) + 1
    best = max(votes, key=votes.__getitem__, default=0)
    return best if best and 2 * votes[best] > len(places) else 0
