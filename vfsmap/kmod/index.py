"""What a store remembers of the images it holds, as it is written to ``index.json``."""

import hashlib
from typing import NamedTuple

import msgspec

from vfsmap.kmod.bind import Placed
from vfsmap.kmod.host import Host
from vfsmap.kmod.layout import Area
from vfsmap.kmod.pack import PackFile
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

    @property
    def areas(self) -> dict[Area, int]:
        """Where its areas lie."""
        return {Area(name): base for name, base in self.bases.items()}


class Pack(msgspec.Struct, frozen=True):
    """Modules that were bound together."""

    files: dict[str, PackFile]
    modules: list[str]


class Index(msgspec.Struct):
    """What a store holds."""

    version: int = 1
    packs: dict[str, Pack] = {}
    variants: list[Variant] = []
    functions: list[str] = []
    """Imports that got a stub, in the order of their slots."""
    variables: list[str] = []

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
