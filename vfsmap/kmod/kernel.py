"""A whole kernel: unpacked from its boot image, with the tables of what it patches in itself.

Source: Documentation/arch/x86/boot.rst (the header), arch/x86/tools/relocs.c (the words that follow
the ELF file), include/asm-generic/vmlinux.lds.h.
"""

import copy
import struct
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Final, NamedTuple, Self

from vfsmap.errors import Damaged, Invalid, NotFound
from vfsmap.kmod.bind import patch
from vfsmap.kmod.branches import BARE_RETURN, JUMP, Callers, Thunks, branch, counts_calls
from vfsmap.kmod.compressed import is_packed, unpack
from vfsmap.kmod.elf import ET_EXEC, Elf
from vfsmap.kmod.host import Host
from vfsmap.kmod.image import (
    FTRACE,
    JUMPS,
    NEW,
    OLD,
    RETURNS,
    STATIC_CALLS,
    TABLES,
    Dialect,
    Image,
    Span,
)
from vfsmap.kmod.keys import is_trampoline
from vfsmap.kmod.memory import Memory, Region
from vfsmap.kmod.symbols import read_symbols
from vfsmap.kmod.tables import Site, constants, offsets
from vfsmap.kmod.usual import usual_states
from vfsmap.units import GIB, PMD, PTE

_BOOT_MAGIC: Final = b"HdrS"
_SECTORS, _MAGIC_AT, _VERSION_AT, _PAYLOAD_AT = 0x1F1, 0x202, 0x206, 0x248
_WITH_PAYLOAD: Final = 0x208  # the header's version that first tells where the payload is
_SECTOR: Final = 512
_LOAD: Final = 1
_WORD: Final = struct.Struct("<i")
_HIGH: Final = 0xFFFF_FFFF_0000_0000
_HALF: Final = 1 << 63  # from here on addresses are the kernel's

MERGED: Final = {
    JUMPS: ("__start___jump_table", "__stop___jump_table"),
    STATIC_CALLS: ("__start_static_call_sites", "__stop_static_call_sites"),
    FTRACE: ("__start_mcount_loc", "__stop_mcount_loc"),
}
"""Tables that are parts of larger sections; only symbols tell where."""

_CONSTANT: Final = "runtime_"
_USER_END: Final = "USER_PTR_MAX"
_LA57: Final = 16 * 32 + 16
_BUILD_ID: Final = b"GNU\0"
_KEY, _TRAMPOLINE = "__SCK__", "__SCT__"


class Words(NamedTuple):
    """The places to change when the kernel is not loaded where it was linked: low halves."""

    add_64: list[int]
    subtract_32: list[int]
    add_32: list[int]


class BoundKernel(NamedTuple):
    """A kernel bound to a host."""

    image: Image
    thunk_pages: list[Region]
    doubts: list[str]
    """What the host's document leaves open, and what was taken for true."""


class Kernel:
    """A kernel as its build made it.

    Raises:
        Damaged: neither a boot image nor an ELF file of a kernel.
        Unsupported: for another machine, or packed in a way that is not known.
    """

    def __init__(self, data: bytes, file_name: str = "vmlinux") -> None:
        raw = payload(data, file_name)
        self.elf = Elf(raw, file_name)
        if self.elf.kind != ET_EXEC:
            raise Damaged(f"{file_name} is an ELF file of type {self.elf.kind}, not a kernel")
        self.raw = raw
        self.text = self.elf.require(".text")
        self.moved = 0
        """Bytes that it was moved by from where it was linked (KASLR)."""
        if sum(s.size for s in self.elf.segments if s.kind == _LOAD) > GIB:
            raise Damaged(f"{file_name} would take more memory than a kernel can have")

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read a boot image (vmlinuz) or an ELF file (vmlinux)."""
        return cls(path.read_bytes(), path.name)

    def moved_to(self, start: int) -> Self:
        """Return the same kernel with its text at ``start``, as KASLR would move it.

        Raises:
            Invalid: KASLR never moves a kernel there.
        """
        moved = start - self.text.address
        if moved % PMD.size or not 0 <= moved < GIB:
            raise Invalid(
                f"the host has its kernel at {start:#x}; {self.elf.name} was linked for "
                f"{self.text.address:#x} and can be moved from there by units of 2 MiB, up to 1 GiB"
            )
        found = copy.copy(self)
        found.moved = moved
        found.__dict__.pop("symbols", None)
        return found

    def _address(self, linked: int) -> int:
        """Return where something is that was linked for an address; what CPUs have each stays."""
        return linked + self.moved if linked >= _HALF else linked

    @property
    def release(self) -> str:
        """The kernel's own name for its version, from its banner; empty when it has none."""
        at = self.raw.find(b"Linux version ")
        words = self.raw[at : at + 200].split(b" ", 3) if at >= 0 else []
        return words[2].decode("ascii", "backslashreplace") if len(words) > 3 else ""

    @cached_property
    def build_id(self) -> str:
        """What the linker derived from all it linked, in hexadecimal; empty when it has none."""
        notes = self.elf.by_name.get(".notes")
        content = b"" if notes is None else bytes(self.elf.content(notes))
        at = content.find(_BUILD_ID)
        size = int.from_bytes(content[at - 8 : at - 4], "little") if at >= 8 else 0
        return content[at + 4 : at + 4 + size].hex()

    @cached_property
    def _linked_symbols(self) -> dict[str, int]:
        return read_symbols(self.raw)

    @cached_property
    def symbols(self) -> dict[str, int]:
        """The kernel's own table of symbols."""
        found = self._linked_symbols
        if self.moved:
            return {name: self._address(value) for name, value in found.items()}
        return found

    @property
    def dialect(self) -> Dialect:
        """Which kernel's patching this one does, told by the size of its alternatives."""
        section = self.elf.by_name.get(".altinstructions")
        if section is None or section.size % OLD.alternative_size:
            return NEW
        if section.size % NEW.alternative_size:
            return OLD
        return NEW if ".orc_header" in self.elf.by_name else OLD

    @property
    def words(self) -> Words:
        """What has to change when the kernel is moved: three lists, each after a zero."""
        tail = self.raw[self.elf.sections_end :]
        whole = tail[len(tail) % _WORD.size :]
        lists: list[list[int]] = []
        found: list[int] = []
        for (word,) in _WORD.iter_unpack(whole[::-1]):
            value = int.from_bytes(word.to_bytes(4, "little", signed=True), "big", signed=True)
            if value:
                found.append(value)
                continue
            lists.append(found)
            found = []
            if len(lists) == len(Words._fields):
                return Words(lists[2], lists[1], lists[0])
        return Words([], [], [])

    def image(self) -> Image:
        """Return the kernel in memory, unpatched.

        Raises:
            NotFound: it has no table of symbols, and so nothing tells where its tables are.
        """
        memory = Memory(self.elf.name)
        for number, segment in enumerate(self.elf.segments):
            if segment.kind == _LOAD and segment.size:
                data = bytearray(segment.size)
                content = self.elf.data[segment.offset : segment.offset + segment.file_size]
                data[: len(content)] = content[: segment.size]
                memory.add(Region(f"segment {number}", self._address(segment.address), data))
        text = self._address(self.text.address)
        image = Image(memory, self.dialect, range(text, text + self.text.size), is_kernel=True)
        for section in self.elf.sections:
            table = Span(self._address(section.address), section.size)
            if section.name in TABLES and section.is_loaded:
                image.tables[section.name] = table
            elif section.name.startswith(_CONSTANT):
                image.runtime_constants[section.name] = table
        for name, (first, last) in MERGED.items():
            start, end = self.symbols.get(first), self.symbols.get(last)
            if start is None or end is None:
                raise NotFound(f"{self.elf.name} has no symbols {first} and {last}")
            image.tables[name] = Span(start, max(0, end - start))
        if self.moved:
            self._move(memory)
        return image

    def _move(self, memory: Memory) -> None:
        """Change what names addresses, as the boot code does after it has chosen a place."""
        for place, size, distance in self._moves():
            if place in memory:  # first values of what each CPU has are copied elsewhere
                raw = memory.read(place, size, "a relocation")
                value = int.from_bytes(raw, "little") + distance
                value &= (1 << 8 * size) - 1
                memory.write(place, value.to_bytes(size, "little"), "a relocation")

    def _moves(self) -> Iterator[tuple[int, int, int]]:
        """Yield address, size and what is added, for each field that moving changes."""
        words = self.words
        fields = ((words.add_64, 8, 1), (words.subtract_32, 4, -1), (words.add_32, 4, 1))
        for places, size, sign in fields:
            for word in places:
                yield self._address(word & 0xFFFF_FFFF | _HIGH), size, sign * self.moved

    def moves(self) -> list[Site]:
        """Return the places in memory that moving the kernel changes."""
        return [Site(place, size) for place, size, _ in self._moves()]


def is_kernel(data: bytes, name: str) -> bool:
    """Tell a kernel from a module: a boot image, or an ELF file that is no relocatable one."""
    if data[_MAGIC_AT : _MAGIC_AT + 4] == _BOOT_MAGIC:
        return True
    raw = unpack(data, name)
    return raw[:4] == b"\x7fELF" and raw[16:18] == ET_EXEC.to_bytes(2, "little")


def payload(data: bytes, name: str) -> bytes:
    """Return the ELF file in a boot image, or in a packed file, or ``data`` if it is one.

    Raises:
        Damaged: there is none.
    """
    if data[_MAGIC_AT : _MAGIC_AT + 4] != _BOOT_MAGIC:
        return unpack(data, name)
    (version,) = struct.unpack_from("<H", data, _VERSION_AT)
    if version < _WITH_PAYLOAD or len(data) < _PAYLOAD_AT + 8:
        raise Damaged(f"{name}: a boot image of version {version:#x} does not tell its payload")
    start, length = struct.unpack_from("<II", data, _PAYLOAD_AT)
    start += ((data[_SECTORS] or 4) + 1) * _SECTOR
    packed = memoryview(data)[start : start + length]
    if len(packed) < max(length, 8) or not is_packed(packed):
        raise Damaged(f"{name}: no packed kernel at {start:#x}")
    raw = unpack(packed[:-4], name)  # the last word is the unpacked size
    (size,) = struct.unpack("<I", packed[-4:])
    if size != len(raw):
        raise Damaged(f"{name} unpacks to {len(raw)} bytes, its end promises {size}")
    return raw


def bind_kernel(kernel: Kernel, host: Host, callers: Callers | None = None) -> BoundKernel:
    """Return a kernel as the host has it in memory.

    When the host's document does not tell the states of the kernel's own keys, the usual ones of
    that build are taken, or they stay as they were built.  ``callers`` tell what the host's modules
    call (:func:`vfsmap.kmod.bind.called_by`), which matters where calls are counted; of modules
    that are not among them it is guessed.

    Raises:
        Invalid: the host runs another kernel, or has it at another address.
        NotFound: a symbol that is needed is not known.
        Damaged: a table makes no sense.
    """
    if kernel.release != host.release:
        raise Invalid(f"{kernel.elf.name} is kernel {kernel.release}, the host runs {host.release}")
    kernel = kernel.moved_to(host.text.start)
    host = host.with_symbols(kernel.symbols)
    image = kernel.image()
    doubts = _assume(kernel, image, host)
    thunks = Thunks(image, host.thunk_pages)
    doubts += patch(image, host, thunks, callers=callers).doubts
    if image.dialect.relocates and counts_calls(host) and not host.modules:
        doubts.append(
            "calls are counted on this host, whose document names no modules: the kernel's text "
            "is what it is before any module is loaded"
        )
    _set_trampolines(image, host)
    _set_constants(image, host)
    return BoundKernel(image, thunks.regions, doubts)


def _assume(kernel: Kernel, image: Image, host: Host) -> list[str]:
    """Let the host know what its document does not tell of a kernel; return what was assumed."""
    usual = usual_states(kernel.build_id, host).moved(kernel.moved)
    doubts = []
    if not host.document.static_key_enabled:
        host.keys = usual.keys | host.keys
        host.calls = usual.calls | host.calls
        what = "jump labels and static calls stay as they were built"
        if usual.keys:
            what = "they are taken to be those of a similar boot of this build"
        doubts.append(f"the host's document does not tell the states of the kernel's keys: {what}")
    host.constants = {_USER_END: _user_end(host)} | host.constants
    for name, span in image.runtime_constants.items():
        variable = name.removeprefix(_CONSTANT).partition("_")[2]
        if variable not in host.constants:
            what = "hold what a similar boot had" if variable in usual.constants else "stay unset"
            doubts.append(
                f"the host's document lacks runtime_constants.{variable}: "
                f"{len(constants(image, span))} places of the kernel's text {what}"
            )
    host.constants = usual.constants | host.constants
    return doubts


def _user_end(host: Host) -> int:
    """Return where the last page of user space starts, which the levels of page tables decide."""
    return (1 << (56 if host.document.la57 or host.has(_LA57) else 47)) - PTE.size


def _set_trampolines(image: Image, host: Host) -> None:
    """Let the trampolines of static calls go where their keys say."""
    pairs = dict(host.trampolines)
    returns = set(offsets(image, RETURNS))
    for name, key in host.symbols.items():
        # keys that modules can't reach are not in the kernel's own table
        trampoline = host.symbols.get(_TRAMPOLINE + name.removeprefix(_KEY), 0)
        if name.startswith(_KEY) and trampoline:
            pairs[trampoline] = key
    for trampoline, key in pairs.items():
        function = host.calls.get(key)
        if function is None or trampoline not in image.text:
            continue
        if not is_trampoline(image, trampoline):
            continue
        if function:
            code = branch(JUMP, trampoline, function)
        elif image.memory.read(trampoline, 1) == bytes([JUMP]) and trampoline not in returns:
            code = BARE_RETURN  # so early in the boot that no return thunk is chosen yet
        else:
            continue
        image.memory.write(trampoline, code, STATIC_CALLS)


def _set_constants(image: Image, host: Host) -> None:
    """Store the constants that the kernel computes at boot in its instructions."""
    for name, span in image.runtime_constants.items():
        kind, _, variable = name.removeprefix(_CONSTANT).partition("_")
        value = host.constants.get(variable)
        if value is None:
            continue
        size = 8 if kind == "ptr" else 1
        for place in constants(image, span):
            image.memory.write(place, value.to_bytes(size, "little"), name)
