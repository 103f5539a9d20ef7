"""Regions that real kernels left behind, and what those kernels showed for them."""

import lzma
import re
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from vfsmap.errors import VfsmapError
from vfsmap.pstore.detect import detect
from vfsmap.pstore.geometry import Geometry
from vfsmap.pstore.kallsyms import Symbols
from vfsmap.pstore.reader import read_files
from vfsmap.pstore.recorder import Recorder
from vfsmap.pstore.region import Region
from vfsmap.pstore.transfer import copy_region, extract
from vfsmap.pstore.zone import Zone

_CALL: Final = re.compile(
    r"CPU:\d+ ts:\d+ ([0-9a-f]+)  ([0-9a-f]+)  (\S+) <- (\S+)\+0x([0-9a-f]+)/0x([0-9a-f]+)$", re.M
)


class Sample(NamedTuple):
    """One region."""

    region: bytes
    geometry: Geometry
    """What the kernel was told."""
    files: dict[str, bytes]
    """What it showed after a second boot."""


def load_sample(folder: Path) -> Sample:
    """Read one of the folders of tests/data/ramoops."""
    name = folder.name
    region = lzma.decompress((folder / "region.bin.xz").read_bytes())
    size = 0x2000 if "wrap" in name else 0x20000
    geometry = Geometry(
        len(region),
        *(size, size, size, size),
        ecc=16 if "ecc16" in name else 0,
        cpus=1 if "debian" in name else 2,
        order="6.12" if "k612" in name else "6.1",
    )
    files = {
        path.name.removesuffix(".xz"): lzma.decompress(path.read_bytes())
        for path in sorted(folder.glob("expected/*.xz"))
    }
    return Sample(region, geometry, files)


def recover_symbols(shown: bytes) -> Symbols:
    """Return the symbols that an ftrace file was formatted with, as far as it tells them."""
    calls = _CALL.findall(shown.decode())
    known: dict[int, str] = {}
    for _, parent, _, place, offset, size in calls:
        start = int(parent, 16) - int(offset, 16)
        known[start] = place
        known.setdefault(start + int(size, 16), "?")
    known[1 << 64] = "?"
    callers = _make_symbols(known)
    for ip, _, name, *_ in calls:
        found = callers.find(int(ip, 16))
        if found is None or found.name != name:
            known[int(ip, 16)] = name
    return _make_symbols(known)


def _make_symbols(known: dict[int, str]) -> Symbols:
    return Symbols([(address, name, "") for address, name in known.items()])


def survive_region(content: bytes, told: Geometry, work: Path) -> int:
    """Do with a region what there is to do, by the geometry told and by the one detected.

    Nothing but a VfsmapError may come of it, reading may change nothing, and what is repaired,
    extracted or exported must be what was read.  Returns how many files it showed.
    """
    geometries: list[Geometry] = [told]
    with suppress(VfsmapError):
        detected = detect(content)
        geometries += [detected] if detected != told else []
    shown = 0
    path = work / "region"
    for geometry in geometries:
        path.write_bytes(content)
        try:
            region = Region.open(path, geometry)
        except VfsmapError:
            continue
        shown += _survive(content, region, geometry, work)
    return shown


def _survive(content: bytes, region: Region, geometry: Geometry, work: Path) -> int:
    path, copy, folder = work / "region", work / "copy", work / "files"
    with region:
        files = region.files()
        copy_region(region, copy, force=True)
    assert path.read_bytes() == copy.read_bytes() == content
    extract(files, folder)
    for file in files:
        assert (folder / file.name).read_bytes() == file.data
        (folder / file.name).unlink()
    _repair(bytearray(content), geometry)
    _write(path, geometry)
    return len(files)


def _repair(region: bytearray, geometry: Geometry) -> None:
    """Attach every zone in place; each must hold what it was read to hold."""
    for place in geometry.places:
        zone = Zone(place, memoryview(region)[place.offset :][: place.size], geometry.ecc)
        read = zone.recall()
        with suppress(VfsmapError):
            assert zone.attach().data == read.data
            assert zone.read() == read.data
    read_files(region, geometry)


def _write(path: Path, geometry: Geometry) -> None:
    """Mark, record and erase in a region file."""
    with Region.open(path, geometry, writable=True) as region:
        region.mark_read("dmesg-ramoops-0", "dmesg-ramoops-1.enc.z")
        region.unread()
    with suppress(VfsmapError), Recorder(path, geometry, watch=False) as recorder:
        recorder.console("line\n" * 50)
        recorder.pmsg("line\n" * 50)
        recorder.dmesg("Oops", "text\n" * 50)
    with Region.open(path, geometry, writable=True) as region:
        for name in {file.name for file in region.files()[::7]}:
            region.erase(name)
        region.erase_all()
        assert not region.files()
