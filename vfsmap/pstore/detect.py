"""Find out the geometry of a region from its content.

The zones' signatures tell it: every geometry that puts its zones where signatures are is tried,
and the one that leaves the least unexplained wins.  So a few zones may be spoilt.  Zones that are
empty and of one size can't be told apart; then console and pmsg are taken to be there, as people
set regions up.  A ledger that nothing contradicts tells it at once, and does away with all doubt.
"""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Final, NamedTuple

from vfsmap.errors import Damaged, Invalid
from vfsmap.pstore.ecc import matching_sizes
from vfsmap.pstore.geometry import (
    HEADER,
    MAX_REGION,
    MAX_ZONES,
    ORDERS,
    Geometry,
    Group,
    Kind,
    Order,
    round_down,
)
from vfsmap.pstore.margin import find_geometry
from vfsmap.pstore.record import parse_header
from vfsmap.pstore.zone import SIGNATURE

_LEAST: Final = 512  # bytes: smaller console, pmsg and ftrace sizes are not looked for
_MOST_LEFT: Final = 12  # only so many of the last plain signatures are tried as the records' end
_MOST_CPUS: Final = 1024
_MOST_SITES: Final = 2 * MAX_ZONES
_MOST_SPOILT: Final = 1  # of console, pmsg and the first ftrace zone
_PLAIN: Final = SIGNATURE.to_bytes(4, "little")
# "DBGC" XORed with the version code of a kernel 2.x.y to 31.x.y, or two bytes of "DBGC" itself
_TRACED: Final = rb"..[\x40-\x45\x48-\x5f]C"
_SPOILT: Final = rb"DB..|D.G.|D..C|.BG.|.B.C|..GC"
_SIGNATURES: Final = re.compile(rb"(?=((%s)|%s))" % (_TRACED, _SPOILT), re.DOTALL)
# What the kernel's log looks like, and what its console therefore holds
_PRINTED: Final = re.compile(rb"\[ *\d+\.\d{6}\]")


class Site(NamedTuple):
    """A place in the region that looks like the head of a zone."""

    signature: bytes
    traced: bool
    """Whether it is one of an ftrace zone."""
    size: int
    begins: bytes
    """The first bytes of its data."""


Sites = dict[int, Site]


class _Explanation(NamedTuple):
    sites: Sites
    judge: "_Judge"
    geometry: Geometry | None

    def marks(self) -> tuple[int, ...]:
        """Return what it is worth; the larger the better."""
        return self.judge(self.geometry) if self.geometry else (-(1 << 62),)


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
    if known and _stands(region, known):
        return known
    sites, judge, best = max(_explain(region, known), key=_Explanation.marks)
    if known and best and judge(known)[0] >= judge(best)[0]:
        return known
    if best is None or 4 * judge(best)[1] < 3 * len(best.places):
        raise Damaged(
            f"no ramoops region found in {len(region):#x} bytes: give its geometry, or format it"
        )
    if _is_cut_off(region, sites, best):
        raise Damaged(
            f"what is found in {len(region):#x} bytes makes no whole region: it is cut off or badly"
            " damaged; give its geometry"
        )
    return replace(best, ecc=_detect_ecc(region, best))


def _explain(region: memoryview, known: Geometry | None) -> Iterator["_Explanation"]:
    """Yield the best explanation of what is found, and of that with one ftrace zone more."""
    found = _find_sites(region)
    for sites in (found, *_with_lone_trace(region, found)):
        judge = _Judge(region, sites)
        best = max(_guess(region, sites), key=judge, default=known)
        yield _Explanation(sites, judge, best)


def _with_lone_trace(region: memoryview, sites: Sites) -> Iterator[Sites]:
    """Yield the sites and a place that, but for a byte, looks like the only ftrace zone.

    Its signature depends on the kernel that wrote it, so nothing else tells which byte is wrong.
    """
    if any(site.traced for site in sites.values()):
        return
    behind = {at + (1 << shift) for at in sites for shift in range(9, len(region).bit_length())}
    looks = 0
    for at in sorted(behind.difference(sites)):
        head = bytes(region[at : at + HEADER])
        if len(head) == HEADER and _is_nearly_traced(head, len(region)):
            site = Site(head[:4], traced=True, size=0, begins=b"")
            yield {**sites, at: site}
            looks += 1
            if looks == _MOST_LEFT:
                return


def _is_nearly_traced(head: bytes, length: int) -> bool:
    start, size = (int.from_bytes(head[at : at + 4], "little") for at in (4, 8))
    high, last = 0x40 <= head[2] <= 0x5F, head[3] == _PLAIN[3]
    return (high and last) or ((high or last) and start <= size and 0 < size < length)


def _stands(region: memoryview, geometry: Geometry) -> bool:
    """Tell at a glance whether signatures are where a geometry wants them, and nowhere else."""
    places = {place.offset for place in geometry.places if place.kind != "ftrace"}
    return {match.start() for match in re.finditer(_PLAIN, region)} == places


def _is_cut_off(region: memoryview, sites: Sites, geometry: Geometry) -> bool:
    """Tell whether what is taken for a region can only be a part of another one.

    Then less than a power of two is taken for it, and the rest is not zones; or most zones in use
    are not taken for any; or records are where console and pmsg ought to be, or the other way.
    """
    if geometry.size < len(region) and geometry.size != round_down(geometry.size):
        return True
    used = {at: site.begins for at, site in sites.items() if site.size}
    kinds = {place.offset: place.kind for place in geometry.places if place.offset in used}
    if 2 * len(kinds) < len(used):
        return True
    for at, kind in kinds.items():
        record, printed = parse_header(used[at]) is not None, _PRINTED.search(used[at])
        if record and kind in ("console", "pmsg"):
            return True
        if printed and not record and kind == "dmesg" and not geometry.console:
            return True
    return False


def _find_sites(region: memoryview) -> Sites:
    sites = dict(_scan(region, _SIGNATURES, _PLAIN))
    versions = Counter(site.signature for site in sites.values() if site.traced)
    for at, site in sites.items():
        if versions[site.signature] <= 2 and re.match(rb"DB.C", site.signature, re.DOTALL):
            sites[at] = site._replace(traced=False)  # rather one byte wrong than a kernel x.0.0
    versions = Counter(site.signature for site in sites.values() if site.traced)
    for version, _ in versions.most_common(1):  # one kernel wrote all of them
        parts = [re.escape(version[:at]) + b"." + re.escape(version[at + 1 :]) for at in range(4)]
        spoilt = re.compile(rb"(?=(()%s))" % b"|".join(parts), re.DOTALL)
        for at, site in _scan(region, spoilt, version):
            if site.signature != _PLAIN:
                sites[at] = site._replace(signature=version, traced=True)
    return sites


def _scan(
    region: memoryview, pattern: re.Pattern[bytes], exact: bytes
) -> Iterator[tuple[int, Site]]:
    """Yield what looks like a zone; of ``exact`` signature also where the rest makes no sense."""
    found = 0
    for match in pattern.finditer(region):
        at = match.start()
        head = region[at : at + HEADER]
        if at % 2 or len(head) < HEADER:
            continue
        start, size = (int.from_bytes(head[i : i + 4], "little") for i in (4, 8))
        sane = start <= size < len(region)
        if sane or match[1] == exact:
            begins = bytes(region[at + HEADER : at + HEADER + 64])
            found += 1
            if found > _MOST_SITES:
                raise Damaged(f"more than {_MOST_SITES} places look like zones: that is no region")
            yield at, Site(match[1], match[2] is not None, size if sane else 0, begins)


def _guess(region: memoryview, sites: Sites) -> Iterator[Geometry]:
    """Yield geometries whose zones are at signatures."""
    plain = [at for at, site in sites.items() if not site.traced]
    traced = [at for at, site in sites.items() if site.traced]
    length = len(region)
    ends = [length, *(1 << shift for shift in range(length.bit_length() - 1, 9, -1))]
    ends = [end for end in ends if end > max(sites, default=0)]
    for end in ends:
        yield from _complete(sites, None, {}, end, 1, ORDERS[-1])
    last = plain[-_MOST_LEFT:]
    after = [2 * second - first for first, second in pairwise(last)]  # where one is spoilt
    for start in {0, *last, *after, *traced[:1]}:
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

    def extend(done: Sizes, cpus: int, at: int, spoilt: int) -> Iterator[_Layout]:
        if len(done) == len(kinds):
            if at > last:
                yield _Layout(done, cpus, at)
            return
        kind = kinds[len(done)]
        yield from extend((*done, (kind, 0)), cpus, at, spoilt)
        site = sites.get(at)
        spoilt += site is None
        if spoilt > _MOST_SPOILT or (site and site.traced != (kind == "ftrace")):
            return
        size = _LEAST
        while at + size <= limit:
            for count in _count_cpus(sites, at, size) if kind == "ftrace" else (1,):
                end = at + (size // count & ~1) * count
                if end in sites or end > last:
                    more = (*done, (kind, size))
                    yield from extend(more, max(cpus, count), end, spoilt)
            size *= 2

    return extend((), 1, start, 0)


def _count_cpus(sites: Sites, at: int, size: int) -> Iterator[int]:
    """Yield how many zones of one version can share ``size`` bytes from ``at``."""
    traced = sum(site.traced for site in sites.values())
    for count in range(1, min(_MOST_CPUS, size // 64, traced * 4 // 3) + 1):
        step = size // count & ~1
        places = (sites.get(at + step * index) for index in range(count))
        found = [site.signature for site in places if site and site.traced]
        if 4 * len(found) >= 3 * count and len(set(found)) == 1:
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
        marks = [self._marks(group) for group in geometry.groups]
        found, full, bad, odd = (sum(column) for column in zip(*marks, strict=True))
        within = [site for at, site in self._sites.items() if at < geometry.size]
        left = len(within) - found + 2 * (sum(site.size > 0 for site in within) - full)
        usual = bool(geometry.console), bool(geometry.pmsg), geometry.console == geometry.pmsg
        whole = geometry.size == self._length
        bad += 4 * (not whole and geometry.size != round_down(geometry.size))
        snug = bool(geometry.record) or not geometry.dump  # nothing is left over
        return (-bad - 2 * left, found, whole, snug, -odd, *usual, -geometry.size)

    def _mark(self, group: Group) -> tuple[int, int, int, int]:
        """Return how many zones are there, how many of them in use, objections, and doubts."""
        kind, count, offset, size = group
        found = full = bad = odd = 0
        for at in range(offset, offset + count * size, size):
            site = self._sites.get(at)
            if site is None or site.traced != (kind == "ftrace"):
                bad += 3
                continue
            found += 1
            full += site.size > 0
            bad += 2 * (site.size > size - HEADER)
            if site.size and kind != "ftrace":
                bad += 4 * ((parse_header(site.begins) is None) == (kind == "dmesg"))
                odd += (_PRINTED.search(site.begins) is None) == (kind == "console")
        return found, full, bad, odd


def _detect_ecc(region: memoryview, geometry: Geometry) -> int:
    """Return the parity bytes that enough zones' ends show to be in use; 0: none are."""
    votes: dict[int, int] = {}
    places = geometry.places[:64]
    for place in places:
        zone = bytes(region[place.offset : place.offset + place.size])
        for size in matching_sizes(zone[:HEADER], zone[HEADER:]):
            votes[size] = votes.get(size, 0) + 1
    best = max(votes, key=votes.__getitem__, default=0)
    return best if best and 4 * votes[best] >= len(places) else 0
