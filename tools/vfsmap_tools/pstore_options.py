"""The geometry of a crash log, as the options of a command tell it or as it is found out."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, Final

import click

from vfsmap.errors import Busy, Damaged, Denied, Invalid, NoSpace, ReadOnly
from vfsmap.pstore import Geometry, Region
from vfsmap.pstore.geometry import ORDERS
from vfsmap.units import KIB
from vfsmap_tools.console import SIZE

KINDS: Final = {"record": 128 * KIB, "console": 128 * KIB, "pmsg": 128 * KIB, "ftrace": 0}
"""The sizes of zones, and what they are unless told otherwise."""


def geometry_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the parameters of a region, as its argument ``geometry``."""

    @click.option("--size", type=SIZE, help="Size of the region.")
    @click.option("--record", type=SIZE, help="Size of a crash record, at least; 0: none.")
    @click.option("--console", type=SIZE, help="Size of the console zone; 0: none.")
    @click.option("--pmsg", type=SIZE, help="Size of the pmsg zone; 0: none.")
    @click.option("--ftrace", type=SIZE, help="Size of all ftrace zones together; 0: none.")
    @click.option("--ecc", type=int, help="Parity bytes for each 128 bytes; 1 means 16, 0 none.")
    @click.option("--cpus", type=int, help="Possible CPUs: the number of ftrace zones.")
    @click.option(
        "--order",
        type=click.Choice(ORDERS),
        help="Whose order the zones follow: kernels to 6.1, or from 6.2 on.",
    )
    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        names = ("size", *KINDS, "ecc", "cpus", "order")
        given = {name: kwargs.pop(name) for name in names}
        command(*args, geometry={k: v for k, v in given.items() if v is not None}, **kwargs)

    return wrapped


def make_geometry(given: dict[str, Any], size: int) -> Geometry:
    """Return the geometry of what was given, and defaults."""
    sizes = {"size": size} | KINDS | given
    if sizes["ftrace"]:
        sizes.setdefault("cpus", os.sysconf("SC_NPROCESSORS_CONF"))
    return Geometry(**sizes)


def find_geometry(file: Path, given: dict[str, Any]) -> Geometry | None:
    """Return the geometry of what was given, the rest detected or by default; None: detect all."""
    if not given:
        return None
    try:
        with Region.open(file) as region:
            return replace(region.geometry, **given)
    except (Damaged, Invalid):  # no region, or one that what was given contradicts
        return make_geometry(given, file.stat().st_size)


def open_region(file: Path, given: dict[str, Any], *, writable: bool) -> Region:
    """Open a region by the geometry that was given, else by what is detected."""
    return Region.open(file, find_geometry(file, given), writable=writable)


def open_to_read(file: Path, given: dict[str, Any]) -> Region:
    """Open a region for writing if that is possible, so that what is read can be marked."""
    try:
        return open_region(file, given, writable=True)
    except (Denied, Busy, ReadOnly, NoSpace):
        return open_region(file, given, writable=False)
