"""Make an empty region."""

import os
from typing import Final

from vfsmap.pstore.backing import (
    Buffer,
    create_file,
    over_buffer,
    over_file,
    require_replaceable,
)
from vfsmap.pstore.geometry import Geometry, Order
from vfsmap.pstore.reader import require_size
from vfsmap.pstore.region import Region
from vfsmap.pstore.zone import Zone

_VERSIONS: Final[dict[Order, int]] = {"6.1": 0x060100, "6.12": 0x060C00}


def format_region(
    target: str | os.PathLike[str] | Buffer,
    geometry: Geometry,
    *,
    overwrite: bool = False,
    force: bool = False,
) -> None:
    """Make an empty region of a buffer or a file; a file is created, or emptied with ``force``.

    ``overwrite`` is the policy for the day when all crash records are unread.

    Raises:
        Exists: the file is there and not empty, and ``force`` was not given.
        Invalid: the buffer is too small, or the target is no regular file.

    Crash: no region, until the last zone is made; then a whole one.
    """
    if isinstance(target, str | os.PathLike):
        require_replaceable(target, force=force)
        create_file(target, geometry.size)
        backing = over_file(target, writable=True)
    else:
        backing = over_buffer(target)
        require_size(backing.view, geometry)
        backing.view[: geometry.size] = bytes(geometry.size)
    for place in geometry.places:
        zone = Zone(place, backing.view[place.offset : place.offset + place.size], geometry.ecc)
        zone.format(_VERSIONS[geometry.order] if place.kind == "ftrace" else 0)
        zone.release()
    region = Region(backing, geometry)
    region.set_policy(overwrite=overwrite)
    region.persist()
    region.close()
