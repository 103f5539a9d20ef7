"""Regions that real kernels left behind, and what those kernels showed for them."""

import lzma
import re
from pathlib import Path
from typing import Final, NamedTuple

from vfsmap.pstore.geometry import Geometry
from vfsmap.pstore.kallsyms import Symbols

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
