"""A kernel module file: what the kernel's loader would find in it before it places anything.

Source: kernel/module/main.c, include/linux/module_signature.h; offsets measured on Debian's 6.1
and 6.12 kernels.
"""

import struct
from functools import cached_property
from pathlib import Path
from typing import Final, NamedTuple, Self

from vfsmap.errors import Damaged, Invalid, NotFound
from vfsmap.kmod.compressed import unpack
from vfsmap.kmod.elf import ET_REL, SHT_SYMTAB, STT_FUNC, Elf, Symbol

THIS_MODULE: Final = ".gnu.linkonce.this_module"
SUFFIXES: Final = (".ko", ".ko.xz", ".ko.zst", ".ko.gz")

_SIGNED: Final = b"~Module signature appended~\n"
_TRAILER: Final = struct.Struct(">BBBBB3xI")
_VERSION: Final = struct.Struct("<Q56s")
_NAME: Final = slice(24, 80)  # of struct module
_BUILD_ID: Final = 3  # NT_GNU_BUILD_ID


class Signature(NamedTuple):
    """What the trailer of a signed module says, and the signature itself (DER, PKCS#7)."""

    algorithm: int
    hash: int
    id_type: int
    content: bytes


class Module:
    """A module, unpacked and checked as far as the kernel checks it.

    Raises:
        Damaged: not an ELF file, or one that breaks the rules of modules.
        Unsupported: for another machine.
    """

    def __init__(self, data: bytes, file_name: str = "module") -> None:
        raw = unpack(data, file_name)
        self.signature = _signature(raw, file_name)
        self.elf = Elf(raw, file_name)
        if self.elf.kind != ET_REL:
            raise Damaged(f"{file_name} is an ELF file of type {self.elf.kind}, not relocatable")
        if not any(s.kind == SHT_SYMTAB for s in self.elf.sections):
            raise Damaged(f"{file_name} has no symbol table")
        if THIS_MODULE not in self.elf.by_name:
            raise Damaged(f"{file_name} is no kernel module: it has no section {THIS_MODULE}")
        self.this_module = self.elf.by_name[THIS_MODULE]
        if self.this_module.size < _NAME.stop or not self.this_module.is_loaded:
            raise Damaged(f"{file_name}: {THIS_MODULE} has {self.this_module.size} bytes")

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read a ``.ko`` file, packed or not."""
        return cls(path.read_bytes(), path.name)

    @property
    def file_name(self) -> str:
        """The name of the file it was read from."""
        return self.elf.name

    @cached_property
    def name(self) -> str:
        """The module's name as the kernel will list it."""
        raw = bytes(self.elf.content(self.this_module)[_NAME])
        name = raw.partition(b"\0")[0].decode("ascii", "backslashreplace")
        if not name or "/" in name:
            raise Damaged(f"{self.file_name}: {THIS_MODULE} names the module {name!r}")
        return name

    @cached_property
    def info(self) -> dict[str, list[str]]:
        """The module's own words about itself, each key with all its values."""
        section = self.elf.by_name.get(".modinfo")
        found: dict[str, list[str]] = {}
        if section is not None:
            for line in bytes(self.elf.content(section)).split(b"\0"):
                key, equals, value = line.decode("utf-8", "backslashreplace").partition("=")
                if equals:
                    found.setdefault(key, []).append(value)
        return found

    @property
    def vermagic(self) -> str:
        """The kernel it was built for, and the options both must share."""
        return next(iter(self.info.get("vermagic", [])), "")

    @property
    def depends(self) -> list[str]:
        """Names of the modules that must be there first."""
        return [name for text in self.info.get("depends", []) for name in text.split(",") if name]

    @cached_property
    def versions(self) -> dict[str, int]:
        """Each import and the checksum of the interface it was built against."""
        section = self.elf.by_name.get("__versions")
        if section is None:
            return {}
        content = self.elf.content(section)
        if len(content) % _VERSION.size:
            raise Damaged(f"{self.file_name}: __versions has {len(content)} bytes")
        return {
            name.partition(b"\0")[0].decode("ascii", "backslashreplace"): checksum
            for checksum, name in _VERSION.iter_unpack(content)
        }

    @cached_property
    def build_id(self) -> str:
        """What the linker derived from all it linked, in hexadecimal."""
        section = self.elf.by_name.get(".note.gnu.build-id")
        content = b"" if section is None else bytes(self.elf.content(section))
        if len(content) < 16:
            raise Damaged(f"{self.file_name} has no build id")
        name_size, size, kind = struct.unpack_from("<III", content)
        start = 12 + (name_size + 3 & -4)
        if kind != _BUILD_ID or start + size > len(content):
            raise Damaged(f"{self.file_name}: its build id makes no sense")
        return content[start : start + size].hex()

    @cached_property
    def imports(self) -> dict[str, bool]:
        """Symbols that others must supply; true where it may do without."""
        return {s.name: s.binding == 2 for s in self.elf.symbols[1:] if s.section == 0 and s.name}

    @cached_property
    def exports(self) -> dict[str, Symbol]:
        """Symbols that other modules may use."""
        marked = {
            s.name.removeprefix("__ksymtab_"): s
            for s in self.elf.symbols
            if s.name.startswith("__ksymtab_")
        }
        return {s.name: s for s in self.elf.symbols if s.name in marked and s.section}

    def function(self, name: str) -> Symbol:
        """Return the symbol of a function.

        Raises:
            NotFound: the module has no such function.
        """
        for symbol in self.elf.symbols:
            if symbol.name == name and symbol.kind == STT_FUNC and symbol.section:
                return symbol
        raise NotFound(f"{self.name} has no function {name!r}")

    def require_vermagic(self, release: str) -> None:
        """Check that it was built for the kernel of that release.

        Raises:
            Invalid: it was built for another.
        """
        built_for = self.vermagic.partition(" ")[0]
        if built_for != release:
            raise Invalid(
                f"{self.file_name} was built for kernel {built_for or 'unknown'}, "
                f"the host runs {release}"
            )


def _signature(raw: bytes, file_name: str) -> Signature | None:
    if not raw.endswith(_SIGNED):
        return None
    end = len(raw) - len(_SIGNED) - _TRAILER.size
    if end < 0:
        raise Damaged(f"{file_name}: the signature's trailer is cut")
    algorithm, digest, id_type, _, _, size = _TRAILER.unpack_from(raw, end)
    if size > end:
        raise Damaged(f"{file_name}: a signature of {size} bytes exceeds the file")
    return Signature(algorithm, digest, id_type, raw[end - size : end])


def find_modules(directory: Path) -> list[Path]:
    """Return all module files below a directory, sorted.

    Raises:
        NotFound: there are none.
    """
    found = sorted(p for p in directory.rglob("*.ko*") if p.name.endswith(SUFFIXES))
    if not found:
        raise NotFound(f"no module (*.ko, packed or not) below {directory}")
    return found
