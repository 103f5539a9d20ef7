"""The command ``map``: how a file is mapped by the kernel, or a picture of a whole pool."""

import sys
from pathlib import Path

import click
from rich.console import Console

import vfsmap
from vfsmap.errors import Invalid
from vfsmap.units import Level, format_size
from vfsmap_tools import picture as pictures
from vfsmap_tools.console import (
    LEVEL,
    SIZE,
    errors_exit,
    json_option,
    page_sizes_text,
    print_json,
    print_line,
    print_table,
)


@click.command("map")
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE|POOL|DIR")
@click.option("--write", is_flag=True, help="Map for writing.")
@click.option("--level", type=LEVEL, help="The smallest entries to accept: 4K, 2M or 1G.")
@click.option("--populate", is_flag=True, help="Touch every page first, so that all are mapped.")
@click.option("--offset", type=SIZE, default=0, help="Where to begin in the file.")
@click.option(
    "--length", type=SIZE, help="How many bytes to map; the rest of the file if not given."
)
@click.option("--picture", is_flag=True, help="Show all of a POOL, or of the one mounted on DIR.")
@click.option("--svg", type=click.Path(path_type=Path), help="Write that picture to a file.")
@json_option
@errors_exit
def map_command(
    file: Path,
    write: bool,
    level: Level | None,
    populate: bool,
    offset: int,
    length: int | None,
    picture: bool,
    svg: Path | None,
    as_json: bool,
) -> None:
    """Map a file and tell how: its extents, and page sizes as the kernel sees them.

    With --picture, map nothing: show the units of 2 MiB of a pool, a character each or a few, as a
    strip that tells which are huge, in pieces, free, leased, sealed, or log.
    """
    if picture or svg:
        if write or level or populate or offset or length is not None:
            raise Invalid(
                "a picture shows the whole pool: --picture goes with --svg and --json only"
            )
        _picture(file, svg, as_json=as_json)
        return
    with vfsmap.map(
        file, writable=write, offset=offset, length=length, level=level, populate=populate
    ) as window:
        extents = [extent._asdict() for extent in window.extents]
        sizes = window.page_sizes()
        if as_json:
            print_json(
                {
                    "file": str(file),
                    "offset": offset,
                    "length": window.length,
                    "direct": window.direct,
                    "extents": extents,
                    "page_sizes": {str(size): total for size, total in sizes.items()},
                }
            )
            return
        kind = "the pool itself" if window.direct else "the kernel's page cache"
        pages = f"{page_sizes_text(sizes)} pages" if any(sizes.values()) else "no page mapped yet"
        print_line(f"{file}: {format_size(window.length)} of {kind}, {pages}")
        if not populate and not any(sizes.values()):
            print_line("a page is mapped when it is touched; see --populate", file=sys.stderr)
        print_table(
            ("file offset", "pool offset", "length"),
            ([f"{e['offset']:#x}", f"{e['start']:#x}", format_size(e["length"])] for e in extents),
        )


def _picture(path: Path, svg: Path | None, *, as_json: bool) -> None:
    taken = pictures.taken_of(path)
    if svg:
        svg.write_text(pictures.svg(taken, str(path)))
    if as_json:
        print_json(pictures.document(taken))
    elif not svg:
        pictures.show(taken, Console(highlight=False))
