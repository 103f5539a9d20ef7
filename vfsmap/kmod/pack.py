"""Packs: modules that were bound together, in files whose offsets agree with addresses.

A pack has three files.  ``text`` and ``rodata`` each hold a range of addresses that starts and ends
on units of 2 MiB, so that their pages can be mapped in place, by huge entries; the modules' areas
lie in them page by page, side by side.  ``data`` holds what every process needs a copy of, area
after area.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from vfsmap.errors import Damaged, Invalid
from vfsmap.kmod.bind import Bound
from vfsmap.kmod.layout import Area, Layout
from vfsmap.mapping.window import Window
from vfsmap.units import PMD, PTE, align_down, align_up
from vfsmap.verity import Descriptor, Verifier, hash_file

Mapper = Callable[..., Window]
"""How a file becomes a window; ``vfsmap.map`` is one."""

TEXT, RODATA, DATA = "text", "rodata", "data"
FILES: Final = (TEXT, RODATA, DATA)
IN_PLACE: Final = {Area.TEXT: TEXT, Area.RODATA: RODATA}
"""The areas that nobody writes to once they are bound, and the file each lies in."""
COPIED: Final = (
    Area.RO_AFTER_INIT,
    Area.DATA,
    Area.INIT_TEXT,
    Area.INIT_RODATA,
    Area.INIT_DATA,
)
_LARGEST: Final = 1 << 30

ALIGN_XATTR: Final = "user.vfsmap.align"
SEAL_XATTR: Final = "user.vfsmap.seal"
EXTENTS_XATTR: Final = "user.vfsmap.extents"


class PackFile(msgspec.Struct, frozen=True):
    """One file of a pack: the addresses it holds and what fixes its content."""

    address: int
    size: int
    descriptor: str
    """fs-verity's, in hexadecimal."""

    @property
    def digest(self) -> str:
        """The digest as the fsverity tool prints it."""
        return str(self.verity)

    @property
    def verity(self) -> Descriptor:
        """The descriptor, decoded.

        Raises:
            Damaged: it makes no sense.
        """
        try:
            raw = bytes.fromhex(self.descriptor)
        except ValueError as exc:
            raise Damaged(f"a verity descriptor is no hexadecimal text: {exc}") from exc
        return Descriptor.decode(raw)


def arrange(
    layouts: Sequence[Layout], start: int, spare: Sequence[int] = ()
) -> list[dict[Area, int]]:
    """Return addresses for modules from a unit on: all text, then all read-only data, then data.

    ``spare`` are the bytes to leave free behind each module's text.

    Raises:
        Invalid: ``start`` is not on a unit of 2 MiB.
    """
    if start % PMD.size:
        raise Invalid(f"{start:#x} is not on a unit of 2 MiB, as text in huge units must be")
    places: list[dict[Area, int]] = [{Area.PERCPU: 0} for _ in layouts]
    at = start
    for areas in ((Area.TEXT,), (Area.RODATA,), COPIED):
        for layout, place, gap in zip(layouts, places, spare or [0] * len(layouts), strict=True):
            for area in areas:
                place[area] = at
                at += align_up(layout.sizes[area], PTE.size)
                at += gap if area is Area.TEXT else 0
        at = align_up(at, PMD.size)
    return places


def end_of(places: Iterable[dict[Area, int]], layouts: Iterable[Layout]) -> int:
    """Return the first unit behind everything that was arranged."""
    end = 0
    for place, layout in zip(places, layouts, strict=True):
        end = max(end, *(place[area] + layout.sizes[area] for area in place))
    return align_up(end, PMD.size)


def in_units(parts: Iterable[tuple[int, bytes]], name: str) -> tuple[int, bytearray]:
    """Return the units of 2 MiB that hold all parts, and their first address.

    Raises:
        Invalid: the parts lie too far apart, or in each other's place.
    """
    placed = sorted((address, data) for address, data in parts if data)
    if not placed:
        return 0, bytearray()
    start = align_down(placed[0][0], PMD.size)
    end = align_up(max(address + len(data) for address, data in placed), PMD.size)
    if end - start > _LARGEST:
        raise Invalid(f"the modules' {name} lies over {end - start:#x} bytes; add fewer at once")
    content = bytearray(end - start)
    free = start
    for address, data in placed:
        if address < free:
            raise Invalid(f"two modules' {name} share the address {address:#x}")
        content[address - start : address - start + len(data)] = data
        free = address + len(data)
    return start, content


def write_file(path: Path, content: bytes | bytearray, address: int) -> PackFile:
    """Write and seal one file of a pack; its Merkle tree goes beside it.

    On a mounted pool the seal is the pool's and final; elsewhere the file only becomes read-only.

    Crash: nothing refers to the file yet.
    """
    descriptor, tree = hash_file([memoryview(content)])
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        _try_xattr(path, ALIGN_XATTR, b"2M")
        view = memoryview(content)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)
    path.chmod(0o444)
    path.with_suffix(".tree").write_bytes(tree)
    if _try_xattr(path, SEAL_XATTR, b"1"):
        found = os.getxattr(path, SEAL_XATTR).decode()
        if found != str(descriptor):
            raise Damaged(f"{path} was sealed as {found}, but {descriptor} was written")
    return PackFile(address, len(content), descriptor.encode().hex())


def _try_xattr(path: Path, name: str, value: bytes) -> bool:
    """Set an attribute of a mounted pool; on other file systems it would mean nothing."""
    try:
        os.getxattr(path, EXTENTS_XATTR)  # no other file system has it
        os.setxattr(path, name, value)
    except OSError:
        return False
    return True


def damaged_blocks(
    path: Path, recorded: PackFile, content: memoryview, offset: int = 0
) -> list[int]:
    """Return the numbers of blocks that differ from what was sealed.

    ``content`` is the file from ``offset``, a multiple of 4 KiB, on.

    Raises:
        Damaged: the tree does not lead to the digest, or is missing.
    """
    try:
        tree = path.with_suffix(".tree").read_bytes()
    except OSError as exc:
        raise Damaged(f"{path} has no Merkle tree beside it: {exc.strerror}") from exc
    return Verifier(recorded.verity, tree).damaged(offset, content)


def data_parts(bound: Bound) -> dict[Area, bytes]:
    """Return the areas that every process gets a copy of."""
    return {area: bound.placed.area(area) for area in COPIED if bound.placed.layout.sizes[area]}


def make_empty(directory: Path) -> None:
    """Make a directory, without what an add that was cut short has left in it."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in directory.iterdir():
        path.unlink()


def write_once(path: Path, content: bytes) -> None:
    """Write a file whose name fixes its content, unless it is there."""
    if path.exists() and path.stat().st_size == len(content):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_bytes(content)
    new.replace(path)
