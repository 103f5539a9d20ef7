"""A pool as a strip of its units of 2 MiB: what is huge, in pieces, free, leased, sealed, log."""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, Final, NamedTuple
from xml.sax.saxutils import escape

from rich.console import Console
from rich.text import Text

from vfsmap.daemon.client import connect
from vfsmap.errors import DaemonUnreachable, Invalid, NotFound, Untrusted
from vfsmap.fs import ROOT, FileSystem
from vfsmap.mapping.layout import merge
from vfsmap.pool import Pool
from vfsmap.units import PMD, align_down, align_up, format_size
from vfsmap_tools.escaping import printable
from vfsmap_tools.mounts import find_mount, mounted_pools

UNIT: Final = PMD.size


class Kind(NamedTuple):
    """What a unit can be."""

    name: str
    glyph: str
    """How it looks where there are no colours."""
    style: str
    colour: str
    about: str


KINDS: Final = (
    Kind("log", "#", "blue", "#1f6feb", "superblocks and log"),
    Kind("leased", "▓", "cyan", "#17a2b8", "some window maps it"),
    Kind("sealed", "■", "magenta", "#a371f7", "of a file that can't change any more"),
    Kind("huge", "█", "green", "#2da44e", "a unit of one file, mapped by one entry"),
    Kind("fragmented", "▒", "yellow", "#d29922", "used in pieces, or in part"),
    Kind("free", "·", "dim", "#e6e8eb", "of no file"),
)
"""The first one that is true of a unit is what the unit is."""
_KIND: Final = {kind.name: kind for kind in KINDS}
_ROWS: Final = 32
"""Rows of the strip on a terminal, at most."""
_SVG_COLUMNS: Final = 128
_SVG_CELLS: Final = 128 * 256
_CELL: Final = 8


class Picture(NamedTuple):
    """Every unit of a pool."""

    size: int
    """Of the pool, bytes."""
    units: list[str]
    """The name of its kind for each unit, in order; the last one may be shorter than a unit."""
    owners: dict[int, str]
    """Who has the unit all to itself."""

    def bytes_of(self) -> dict[str, int]:
        """Return the bytes of the units of each kind."""
        counted = Counter(self.units)
        sizes = {kind.name: counted[kind.name] * UNIT for kind in KINDS}
        short = len(self.units) * UNIT - self.size
        if short:
            sizes[self.units[-1]] -= short
        return sizes

    def runs(self) -> Iterator[tuple[str, int, int]]:
        """Yield kind, first unit and count of each run of units that are alike."""
        at = 0
        for name, alike in groupby(self.units):
            count = len(list(alike))
            yield name, at, count
            at += count


def taken_of(path: Path) -> Picture:
    """Take a picture of a pool, or of the pool mounted on a directory.

    The pool may be in use: what is shown is how it was at one moment.

    Raises:
        Invalid: no pool is mounted on the directory.
        NotAPool, PoolDamaged: it is no pool, or can't be read.
    """
    if path.is_dir():
        mount = find_mount(path)
        if mount is None:
            raise Invalid(f"{path} is a directory where no pool is mounted")
        mounts = [mount]
    else:
        mounts = [mount for mount in mounted_pools() if mount.pool == path.resolve()]
    with FileSystem(Pool.open(mounts[-1].pool if mounts else path, "r")) as fs:
        return _taken(fs, _leases(mounts[-1].directory) if mounts else [])


def _leases(directory: Path) -> list[dict[str, Any]]:
    """Return the leases on a mounted pool; none when its daemon can't be asked."""
    try:
        with connect(directory) as client:
            return list(client.leases())
    except (DaemonUnreachable, Invalid, NotFound, Untrusted):
        return []


def _taken(fs: FileSystem, leases: Iterable[dict[str, Any]]) -> Picture:
    strip = _Strip(fs.pool.size)
    for start, length in fs.pool.space.runs():
        strip.mark(strip.whole(start, length), "free")
    sealed = set(fs.sealed_inodes())
    for ino in fs.owners_of_extents():
        for extent in merge(fs.size_and_extents(ino)[1]):
            if (extent.start - extent.offset) % UNIT == 0:
                units = strip.whole(extent.start, extent.length)
                strip.mark(units, "sealed" if ino in sealed else "huge")
                strip.owners.update(dict.fromkeys(units, ino))
    for lease in leases:
        end = lease["offset"] + lease["length"]
        for extent in fs.map_of(lease["inode"]).overlapping(lease["offset"], end):
            strip.mark(strip.touched(extent.start, extent.length), "leased")
    strip.mark(range(1), "log")
    for half in fs.pool.journal.halves:
        strip.mark(strip.touched(half.start, half.length), "log")
    names = _paths(fs, set(strip.owners.values()))
    owners = {unit: names.get(ino, f"inode {ino}") for unit, ino in strip.owners.items()}
    return Picture(strip.size, strip.units, owners)


class _Strip:
    """Units that are being sorted."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.units = ["fragmented"] * -(-size // UNIT)
        self.owners: dict[int, int] = {}

    def whole(self, start: int, length: int) -> range:
        """Return the units that lie in a range, up to the end of the pool."""
        end = start + length
        last = len(self.units) if end == self.size else align_down(end, UNIT) // UNIT
        return range(align_up(start, UNIT) // UNIT, last)

    def touched(self, start: int, length: int) -> range:
        """Return the units that have a byte in a range."""
        return range(start // UNIT, min(-(-(start + length) // UNIT), len(self.units)))

    def mark(self, units: range, kind: str) -> None:
        """Say what units are."""
        for unit in units:
            self.units[unit] = kind


def _paths(fs: FileSystem, wanted: set[int]) -> dict[int, str]:
    """Return a path of each wanted file that has one."""
    found: dict[int, str] = {}
    directories = [(ROOT, "")]
    while directories and len(found) < len(wanted):
        directory, above = directories.pop()
        for _, name, ino in fs.entries(directory):
            path = f"{above}/{name.decode(errors='backslashreplace')}"
            if ino in wanted:
                found[ino] = path
            elif fs.get(ino).is_directory:
                directories.append((ino, path))
    return found


# the strip for people


def show(picture: Picture, console: Console) -> None:
    """Print a picture: the strip, and what is what."""
    columns = max(min(console.width, 128), 16)
    a_cell = max(1, -(-len(picture.units) // (columns * _ROWS)))
    strip = Text()
    for name in _cells(picture.units, a_cell):
        strip.append(_KIND[name].glyph, _KIND[name].style)
    for line in strip.wrap(console, columns):
        console.print(line)
    one = format_size(a_cell * UNIT)
    console.print(f"\n{format_size(picture.size)}, a character is {one}", highlight=False)
    for kind in KINDS:
        size = picture.bytes_of()[kind.name]
        if size:
            share = f"{size / picture.size:6.1%} {format_size(size):>8}"
            console.print(
                Text.assemble((kind.glyph, kind.style), f" {kind.name:<10} {share}  {kind.about}")
            )


def _cells(units: list[str], a_cell: int) -> Iterator[str]:
    """Yield the commonest kind of each so many units."""
    for at in range(0, len(units), a_cell):
        ((name, _),) = Counter(units[at : at + a_cell]).most_common(1)
        yield name


def svg(picture: Picture, title: str) -> str:
    """Return a picture as SVG; a unit tells what it is where the pointer rests."""
    a_cell = max(1, -(-len(picture.units) // _SVG_CELLS))
    cells = list(_cells(picture.units, a_cell))
    rows = -(-len(cells) // _SVG_COLUMNS)
    width, height = _SVG_COLUMNS * _CELL, (rows + 4) * _CELL
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="{_CELL}">',
        f"<title>{escape(printable(title))}</title>",
    ]
    at = 0
    for (name, _, _), alike in groupby(
        enumerate(cells), lambda c: (c[1], c[0] // _SVG_COLUMNS, _owner(picture, c[0], a_cell))
    ):
        count = len(list(alike))
        x, y = at % _SVG_COLUMNS * _CELL, at // _SVG_COLUMNS * _CELL
        parts.append(
            f'<rect x="{x}" y="{y}" width="{count * _CELL - 1}" height="{_CELL - 1}" '
            f'fill="{_KIND[name].colour}"><title>{escape(_told(picture, at, count, a_cell, name))}'
            "</title></rect>"
        )
        at += count
    sizes = picture.bytes_of()
    x, y = 0, (rows + 2) * _CELL
    for kind in KINDS:
        words = f"{kind.name} {format_size(sizes[kind.name])}"
        parts.append(
            f'<rect x="{x}" y="{y - _CELL + 1}" width="{_CELL - 1}" height="{_CELL - 1}" '
            f'fill="{kind.colour}"/><text x="{x + 1.5 * _CELL}" y="{y}">{words}</text>'
        )
        x += width // len(KINDS)
    return "\n".join([*parts, "</svg>", ""])


def _owner(picture: Picture, cell: int, a_cell: int) -> str:
    return picture.owners.get(cell, "") if a_cell == 1 else ""


def _told(picture: Picture, at: int, count: int, a_cell: int, name: str) -> str:
    start, end = at * a_cell * UNIT, min((at + count) * a_cell * UNIT, picture.size)
    owner = _owner(picture, at, a_cell)
    place = f"{start:#x} to {end:#x}, {format_size(end - start)}"
    return printable(f"{place}: {name}{f', {owner}' if owner else ''}")


def document(picture: Picture) -> dict[str, Any]:
    """Return a picture for scripts."""
    return {
        "size": picture.size,
        "unit": UNIT,
        "bytes": picture.bytes_of(),
        "runs": [
            {"kind": name, "first": first, "count": count} for name, first, count in picture.runs()
        ],
    }
