"""What a store remembers of the images it holds, as it is written to ``index.json``."""

import hashlib
from typing import Final, NamedTuple

import msgspec

from vfsmap.kmod.bind import Placed
from vfsmap.kmod.host import Host
from vfsmap.kmod.layout import Area
from vfsmap.kmod.pack import COPIED, FILES, PackFile
from vfsmap.kmod.userspace import (
    FIRST_SLOT,
    FIRST_VARIABLE,
    SLOT,
    STUBS,
    VARIABLE,
    VARIABLES,
)


class Stubs(NamedTuple):
    """Places of stand-ins for what modules import, in user space."""

    functions: list[tuple[str, int]]
    variables: list[tuple[str, int]]


class Variant(msgspec.Struct, frozen=True):
    """One module bound to one host."""

    name: str
    build_id: str
    kernel: str
    """The release of the kernel that the host runs."""
    source: str
    """sha256 of the unpacked module file, or of the kernel's boot image."""
    host: str
    """Digest of the host's document."""
    profile: str
    """Digest of the CPU features and mitigations it was patched for."""
    symbols: str
    """Digest of what its imports were bound to."""
    pack: str
    bases: dict[str, int]
    sizes: dict[str, int]
    offsets: dict[str, int]
    """Where each copied area lies in the pack's data file."""
    thunk_pages: list[int] = []
    is_kernel: bool = False
    doubts: list[str] = []
    """What the host's document left open when it was bound."""

    @property
    def text(self) -> range:
        """The addresses of its text."""
        start = self.bases[Area.TEXT.value]
        return range(start, start + self.sizes[Area.TEXT.value])

    def problem(self) -> str:
        """Return what makes no sense in it; nothing if all does."""
        areas = {area.value for area in Area}
        for name in areas | self.bases.keys() | self.sizes.keys():
            base, size = self.bases.get(name, 0), self.sizes.get(name, -1)
            placed = name in self.bases or self.is_kernel or not size
            if name not in areas or not placed or not _is_range(base, size):
                return f"its area {name} can't be"
        if Area.TEXT.value not in self.bases:
            return "it has no text"
        copied = (area.value for area in COPIED if self.sizes[area.value])
        if not all(self.offsets.get(name, -1) >= 0 for name in copied):
            return "its data is nowhere"
        return ""

    @property
    def areas(self) -> dict[Area, int]:
        """Where its areas lie."""
        return {Area(name): base for name, base in self.bases.items()}


class Pack(msgspec.Struct, frozen=True):
    """Modules that were bound together."""

    files: dict[str, PackFile]
    modules: list[str]


_LARGEST: Final = 1 << 32


def _is_range(start: int, size: int) -> bool:
    return 0 <= size <= _LARGEST and start >= 0 and start + size <= 1 << 64


class Index(msgspec.Struct):
    """What a store holds."""

    version: int = 1
    packs: dict[str, Pack] = {}
    variants: list[Variant] = []
    functions: list[str] = []
    """Imports that got a stub, in the order of their slots."""
    variables: list[str] = []

    def problem(self) -> str:
        """Return what makes no sense in it; nothing if all does."""
        for name, pack in self.packs.items():
            for file in FILES:
                recorded = pack.files.get(file)
                if recorded is None or not _is_range(recorded.address, recorded.size):
                    return f"pack {name} has no file {file} that could be mapped"
        for variant in self.variants:
            if variant.pack not in self.packs:
                return f"{variant.name} is in the pack {variant.pack}, which is not there"
            if wrong := variant.problem():
                return f"{variant.name}: {wrong}"
        return ""

    def stubs(self) -> Stubs:
        """Return all places of stand-ins."""
        functions = enumerate(self.functions, FIRST_SLOT)
        variables = enumerate(self.variables, FIRST_VARIABLE)
        return Stubs(
            [(name, STUBS + SLOT * slot) for slot, name in functions],
            [(name, VARIABLES + VARIABLE * slot) for slot, name in variables],
        )


def host_digest(host: Host) -> str:
    """Return what tells one host's document from another."""
    return hashlib.blake2b(host.encode(), digest_size=16).hexdigest()


def symbols_digest(placed: Placed) -> str:
    """Return what tells one binding of a module's imports from another."""
    rows = zip(placed.module.elf.symbol_rows, placed.values, strict=True)
    imports = sorted((placed.module.elf.symbol_name(row), v) for row, v in rows if row[3] == 0)
    return hashlib.blake2b(repr(imports).encode(), digest_size=16).hexdigest()
