"""A host: everything that one boot of one machine decides about the text of its modules.

It is kept as a JSON document, whose fields docs/kmod-host.md describes.
"""

import hashlib
from pathlib import Path
from typing import Final, NamedTuple, Self

import msgspec

from vfsmap.errors import Damaged, Invalid, NotFound
from vfsmap.kmod.compressed import unpack
from vfsmap.units import GIB

KERNEL_TEXT: Final = 0xFFFF_FFFF_8100_0000
"""Where a kernel that is not moved at random has its text."""
KERNEL_AREA: Final = 0xFFFF_FFFF_8000_0000
"""Its code reaches what lies from here on, and nothing else."""
MODULE_AREA: Final = 0xFFFF_FFFF_C000_0000

_WORDS: Final = 24  # 22 words of features, 2 of bugs
_MASK: Final = (1 << 64) - 1

Number = int | str
"""An address: a number, or hexadecimal text, which other readers of JSON keep exact."""
Numbers = dict[str, Number]


class ModuleDocument(msgspec.Struct, omit_defaults=True):
    """Where one module lies, and what it is bound to."""

    sections: Numbers = {}
    imports: Numbers = {}
    percpu_base: Number = 0
    text_base: Number = 0
    text_len: int = 0
    static_key_enabled: dict[str, int] = {}
    static_call_func: Numbers = {}
    its_pages: list[Number] = []
    ko_sha256: str = ""
    text_sha256: str = ""


class Document(msgspec.Struct, omit_defaults=True):
    """The JSON document; unknown fields are ignored."""

    kernel: str
    x86_capability: list[int]
    tag: str = ""
    kernel_text_va: Number = KERNEL_TEXT
    vmlinux_text_len: int = 0
    vmlinux_text_sha256: str = ""
    kernel_symbols: Numbers = {}
    pv_ops: list[Number] = []
    x86_return_thunk: Number = 0
    call_depth: bool = False
    uniproc_patched: bool = False
    la57: bool = False
    tramp_to_key: dict[str, Number] = {}
    static_key_enabled: dict[str, int] = {}
    static_call_func: Numbers = {}
    runtime_constants: dict[str, Number] = {}
    its_pages: list[Number] = []
    modules: dict[str, ModuleDocument] = {}
    cpu_flags: list[str] = []
    vulnerabilities: list[str] = []
    cmdline: str = ""
    user_space: bool = False


class Resident(NamedTuple):
    """A module where this host has it."""

    sections: dict[str, int]
    imports: dict[str, int]
    percpu_base: int
    text: range
    its_pages: list[int]
    document: ModuleDocument


class Host:
    """What a document says, its numbers read.

    Raises:
        Invalid: a number is none, or does not fit its place.
    """

    def __init__(self, document: Document) -> None:
        self.document = document
        self.release = document.kernel
        self.capability = _words(document.x86_capability)
        self.symbols = _addresses(document.kernel_symbols)
        self.pv_ops = [number(value) for value in document.pv_ops]
        self.return_thunk = number(document.x86_return_thunk)
        self.call_depth = document.call_depth
        self.uniproc = document.uniproc_patched
        self.user_space = document.user_space
        start = number(document.kernel_text_va)
        self.text = _range(start, document.vmlinux_text_len, "vmlinux_text_len")
        self.trampolines = {number(k): number(v) for k, v in document.tramp_to_key.items()}
        self.constants = _addresses(document.runtime_constants)
        self.thunk_pages = [number(page) for page in document.its_pages]
        self.keys: dict[int, int] = {}
        self.calls: dict[int, int] = {}
        self.modules: dict[str, Resident] = {}
        self._learn_states(document)
        imports: dict[str, int] = {}
        for name, module in document.modules.items():
            self._learn_states(module)
            base = number(module.text_base)
            self.modules[name] = Resident(
                _addresses(module.sections),
                _addresses(module.imports),
                number(module.percpu_base),
                _range(base, module.text_len, f"modules.{name}.text_len"),
                [number(page) for page in module.its_pages],
                module,
            )
            imports |= self.modules[name].imports
        self.symbols = imports | self.symbols

    def _learn_states(self, document: Document | ModuleDocument) -> None:
        for key, enabled in document.static_key_enabled.items():
            self.keys[number(key)] = enabled
        for key, function in document.static_call_func.items():
            self.calls[number(key)] = number(function)

    @classmethod
    def decode(cls, raw: bytes, name: str = "host") -> Self:
        """Read a JSON document, packed or not.

        Raises:
            Damaged: it is no JSON, or lacks a field, or has one of a wrong type.
            Invalid: a number is none, or does not fit its place.
        """
        try:
            return cls(msgspec.json.decode(unpack(raw, name), type=Document))
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise Damaged(f"{name}: {exc}") from exc
        except Invalid as exc:
            raise Invalid(f"{name}: {exc}") from exc

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read a host's document from a file."""
        return cls.decode(path.read_bytes(), path.name)

    def encode(self) -> bytes:
        """Return the document as JSON."""
        return msgspec.json.format(msgspec.json.encode(self.document), indent=1)

    def has(self, feature: int) -> bool:
        """Tell whether the CPU, as Linux sees it, has a feature: word * 32 + bit."""
        return bool(self.capability[feature >> 5] >> (feature & 31) & 1)

    def with_symbols(self, symbols: dict[str, int]) -> Self:
        """Return the same host, that knows more symbols of the kernel; its own win."""
        found = type(self)(self.document)
        found.symbols = symbols | self.symbols
        return found

    def symbol(self, name: str) -> int | None:
        """Return the address of a symbol of the kernel, or of a module's import, or None."""
        return self.symbols.get(name)

    def require_symbol(self, name: str) -> int:
        """Return the address of a symbol of the kernel.

        Raises:
            NotFound: the document does not hold it.
        """
        try:
            return self.symbols[name]
        except KeyError:
            raise NotFound(f"the host's document has no symbol {name}") from None

    def import_of(self, module: str, name: str) -> int | None:
        """Return what a module's import is bound to here, or None when nobody knows."""
        resident = self.modules.get(module)
        if resident is not None and name in resident.imports:
            return resident.imports[name]
        return self.symbols.get(name)

    @property
    def profile(self) -> str:
        """A digest of all that selects patches but addresses: CPU features and mitigations."""
        parts = (
            self.capability,
            self.pv_ops,
            self.return_thunk,
            self.call_depth,
            self.uniproc,
        )
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def number(value: Number) -> int:
    """Return an address that a document gives as a number or as hexadecimal text.

    Raises:
        Invalid: it is neither, or does not fit 64 bits.
    """
    try:
        found = value if isinstance(value, int) else int(value, 16)
    except ValueError:
        raise Invalid(f"{value!r} is no address; write it like 0xffffffff81000000") from None
    if not 0 <= found <= _MASK:
        raise Invalid(f"address {value} does not fit 64 bits")
    return found


def _range(start: int, size: int, what: str) -> range:
    if not 0 <= size <= GIB:
        raise Invalid(f"{what}: no text has {size} bytes")
    return range(start, start + size)


def _addresses(document: Numbers) -> dict[str, int]:
    return {name: number(value) for name, value in document.items()}


def _words(words: list[int]) -> tuple[int, ...]:
    if len(words) > _WORDS or not all(0 <= word < 1 << 32 for word in words):
        raise Invalid(f"x86_capability: at most {_WORDS} words of 32 bits are expected")
    return (*words, *(0,) * (_WORDS - len(words)))
