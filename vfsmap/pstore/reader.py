"""The files that /sys/fs/pstore would show for a region, byte for byte.

Never writes: each zone is copied, attached as the kernel attaches it at boot, and shown from there.
Two quirks of the kernel are not copied: with ECC it mangles the ftrace file, and behind a dmesg
zone that holds a header and nothing else it shows no file at all.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from vfsmap.errors import Invalid
from vfsmap.pstore.compress import inflate
from vfsmap.pstore.ftrace import format_calls, merge, parse_calls
from vfsmap.pstore.geometry import Geometry, Kind, Place
from vfsmap.pstore.kallsyms import Symbols
from vfsmap.pstore.record import parse_header, readable_limit
from vfsmap.pstore.zone import Log, Zone


class File(NamedTuple):
    """One file of /sys/fs/pstore."""

    name: str
    data: bytes
    kind: Kind
    number: int
    """Which zone of its kind; all ftrace zones make one file, 0."""
    time_ns: int | None
    """Since 1970; only dmesg records have a time."""
    corrected: int
    """Wrong bytes that ECC mended."""
    bad: int
    """Blocks that ECC could not mend."""
    packed: bool
    """Whether the data is still compressed, because nothing here can inflate it."""


def require_size(view: memoryview, geometry: Geometry) -> None:
    """Raise Invalid unless a buffer holds the whole region."""
    if len(view) < geometry.size:
        raise Invalid(
            f"the buffer has {len(view):#x} bytes, the region {geometry.size:#x}:"
            " it is cut off, or the geometry is not its own"
        )


def read_files(
    buffer: bytes | bytearray | memoryview, geometry: Geometry, symbols: Symbols | None = None
) -> list[File]:
    """Return the files of a region, in the order in which the kernel finds them.

    Raises:
        Invalid: the buffer is smaller than the region.
    """
    view = memoryview(buffer).cast("B")
    require_size(view, geometry)
    logs = list(read_logs(view, geometry))
    files: list[File] = []
    for place, log, capacity in logs:
        if place.kind == "dmesg":
            files += _show_record(place, log, capacity, geometry)
    plain: tuple[Kind, ...] = ("console", "pmsg")
    for kind in plain:
        shown = [log for place, log, _ in logs if place.kind == kind]
        files += [_show(kind, 0, log.data, [log], ecc=bool(geometry.ecc)) for log in shown]
    traced = [log for place, log, _ in logs if place.kind == "ftrace"]
    calls = merge(parse_calls(log.data) for log in traced)
    if calls:
        text = format_calls(calls, symbols)
        files.append(_show("ftrace", 0, text, traced, ecc=bool(geometry.ecc)))
    return files


def read_logs(view: memoryview, geometry: Geometry) -> Iterator[tuple[Place, Log, int]]:
    """Yield each zone that holds something, its content and its capacity."""
    for place in geometry.places:
        zone = Zone(place, view[place.offset : place.offset + place.size], geometry.ecc)
        log = zone.recall()
        if log.data:
            yield place, log, zone.capacity


def notice(logs: Iterable[Log]) -> bytes:
    """Return what the kernel appends to a file of a region with ECC."""
    corrected = sum(log.corrected for log in logs)
    bad = sum(log.bad for log in logs)
    if not corrected + bad:
        return b"\nECC: No errors detected\n"
    return b"\nECC: %d Corrected bytes, %d unrecoverable blocks\n" % (corrected, bad)


def _show(
    kind: Kind,
    number: int,
    text: bytes,
    logs: list[Log],
    *,
    ecc: bool,
    time_ns: int | None = None,
    packed: bool = False,
) -> File:
    return File(
        name=f"{kind}-ramoops-{number}" + (".enc.z" if packed else ""),
        data=text + notice(logs) if ecc else text,
        kind=kind,
        number=number,
        time_ns=time_ns,
        corrected=sum(log.corrected for log in logs),
        bad=sum(log.bad for log in logs),
        packed=packed,
    )


def _show_record(place: Place, log: Log, capacity: int, geometry: Geometry) -> Iterator[File]:
    header = parse_header(log.data)
    if header is None or header.length == len(log.data):
        return
    body = log.data[header.length :]
    text: bytes | None = body
    if header.compressed:
        limit = readable_limit(capacity, geometry.order)
        text = inflate(body, limit, lenient=geometry.order == "6.1")
    yield _show(
        "dmesg",
        place.number,
        body if text is None else text,
        [log],
        ecc=bool(geometry.ecc),
        time_ns=header.time_ns,
        packed=text is None,
    )
