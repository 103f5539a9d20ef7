"""``vfsmap pstore show --follow``: print a zone's bytes as they come."""

import sys
import time
from collections.abc import Callable, Iterator
from typing import Final

from vfsmap.errors import Invalid, NotFound
from vfsmap.pstore import Region
from vfsmap.pstore.zone import Zone
from vfsmap_tools.console import print_json

_PAUSE: Final = 0.1  # seconds between two looks


def follow_zone(region: Region, kind: str, *, as_json: bool) -> None:
    """Print what the console or the pmsg zone holds, and what is added, for ever."""
    if kind not in ("console", "pmsg"):
        raise Invalid(f"{kind} can't be followed; name console-ramoops-0 or pmsg-ramoops-0")
    zone = region.zone("console" if kind == "console" else "pmsg")
    if zone is None:
        raise NotFound(f"the region has no {kind} zone")
    for piece in grow(zone, lambda: settle(region)):
        if not piece:
            time.sleep(_PAUSE)
        elif as_json:
            print_json({"text": piece.decode(errors="replace")}, indent=None)
        else:
            sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()


def settle(region: Region) -> None:
    """Wait until whatever is being written to a region is there whole."""
    if region.writable:
        with region.locked():
            return
    time.sleep(_PAUSE)  # no lock to be had; a write takes some microseconds


def grow(zone: Zone, settle: Callable[[], None]) -> Iterator[bytes]:
    """Yield a zone's content, then what was added since; nothing while nothing was.

    A header is ahead of its data while a line is being written: so whatever a header tells is
    read only after ``settle``.  More than a whole ring between two looks is lost, and can't be
    told from less.
    """
    at, size = zone.start, zone.size
    settle()
    yield (bytes(zone.data[at:]) if size == zone.capacity else b"") + bytes(zone.data[:at])
    while True:
        start, now = zone.start, zone.size
        if now < size or start > zone.capacity:  # erased, and perhaps begun anew
            at = 0
        size = now
        if at == start:
            yield b""
            continue
        settle()
        data = zone.data
        yield bytes(data[at:start]) if at < start else bytes(data[at:]) + bytes(data[:start])
        at = start
