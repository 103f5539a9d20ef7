"""Calls, jumps and returns rewritten at boot: paravirt, retpolines, return thunks, call depth.

Source: arch/x86/kernel/alternative.c and callthunks.c of Linux 6.1 and 6.12.
"""

import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Final

from vfsmap.errors import Damaged, NotFound
from vfsmap.kmod.host import Host
from vfsmap.kmod.image import (
    CALLS,
    ENDBR,
    FTRACE,
    LOCKS,
    NEW,
    OLD,
    PARAVIRT,
    RETPOLINES,
    RETURNS,
    Image,
)
from vfsmap.kmod.insn import decode
from vfsmap.kmod.memory import MASK, Memory, Region
from vfsmap.kmod.nops import INT3, NOPS, fill, optimized
from vfsmap.kmod.tables import addresses, alternatives, offsets, paravirt_sites
from vfsmap.units import PTE

RETPOLINE: Final = 11 * 32 + 12
RETPOLINE_LFENCE: Final = 11 * 32 + 13
RETHUNK: Final = 11 * 32 + 14
CALL_DEPTH: Final = 11 * 32 + 19

Callers = Mapping[str, Collection[int]]
"""For modules that are at hand, by name: the functions of other images that each one calls."""

CALL, JUMP = 0xE8, 0xE9
TRAMPOLINE_END: Final = b"\x0f\xb9\xcc"
"""Follows the five bytes of a static call's trampoline."""
BARE_RETURN: Final = b"\xc3\xcc\xcc\xcc\xcc"

_LFENCE: Final = b"\x0f\xae\xe8"
_ENDBR: Final = b"\xf3\x0f\x1e\xfa"
_SEALED_ENDBR: Final = b"\x66\x0f\x1f\x00"
_CALL_DEPTH_PAD: Final = struct.Struct("<4sIB")
_COUNT: Final = b"\x65\x48\xc1\x3d"  # sar $5, %gs:(rip + ...)
_COUNTER: Final = 16  # in struct pcpu_hot
_LONGEST: Final = 15
_KEXEC_CODE: Final = 2048
_NOT_COUNTED: Final = (
    "__fentry__",
    "error_entry",
    "paranoid_entry",
    "xen_error_entry",
    "__switch_to_asm",
    "ret_from_fork",
    "soft_restart_cpu",
)


def branch(opcode: int, address: int, target: int) -> bytes:
    """Return a call or jump from ``address`` to ``target``."""
    return bytes([opcode]) + (target - address - 5 & 0xFFFF_FFFF).to_bytes(4, "little")


def apply_paravirt(image: Image, host: Host) -> None:
    """Turn calls through ``pv_ops`` into direct ones, or into nothing."""
    sites = paravirt_sites(image)
    if sites and not host.pv_ops:
        raise NotFound(f"{image.name} calls by way of pv_ops, which the host's document lacks")
    for site in sites:
        if site.slot >= len(host.pv_ops):
            raise Damaged(f"{image.name}: {PARAVIRT} names the slot {site.slot} of pv_ops")
        function = host.pv_ops[site.slot]
        code = b""
        if function != host.require_symbol("_paravirt_nop"):
            target = function or host.require_symbol("paravirt_BUG")
            code = branch(CALL, site.address, target)
        if len(code) > site.length:
            raise Damaged(
                f"{image.name}: {PARAVIRT} has {site.length} bytes for a call at {site.address:#x}"
            )
        code += fill(site.length - len(code), image.dialect)
        image.memory.write(site.address, code, PARAVIRT)


class Thunks:
    """Pages of jumps through registers, each in the upper half of its cache line.

    The kernel allocates them one by one while it patches an image; ``pages`` are their addresses.
    """

    LEAST: Final = PTE.size // 64 * (32 // 4)
    """How many fit on a page at least."""

    def __init__(self, image: Image, pages: list[int]) -> None:
        self._image = image
        self._pages = iter(pages)
        self.regions: list[Region] = []
        self._offset = PTE.size

    def make(self, register: int) -> int:
        """Write a new thunk; return its address.

        Raises:
            NotFound: there is no page for it.
        """
        size = 3 + register // 8
        if self._offset + size - 1 >= PTE.size:
            page = next(self._pages, None)
            if page is None:
                raise self._lacking()
            self.regions.append(Region("its_page", page, bytearray([INT3]) * PTE.size))
            self._offset = 32
        if (self._offset + size - 1) % 64 < 32:
            self._offset = (self._offset - 1 | 63) + 33
        at = self._offset
        self._offset += size
        self.regions[-1].data[at : at + size] = _through(0xE0, register) + bytes([INT3])
        return self.regions[-1].start + at

    def _lacking(self) -> NotFound:
        owner = "" if self._image.is_kernel else "modules.NAME."
        return NotFound(
            f"{self._image.name} needs more than {len(self.regions)} pages of thunks against "
            f"indirect target selection; only the host's memory tells where its kernel has put "
            f"them: name them in its document, as {owner}its_pages, in the order of their making"
        )


def most_thunk_pages(sites: int, host: Host) -> int:
    """Return how many pages of thunks so many indirect branches may take on a host."""
    if host.has(RETPOLINE) and not host.has(RETPOLINE_LFENCE):
        return 0
    if not any(host.has(dialect.its_feature) for dialect in (OLD, NEW)):
        return 0
    return -(-sites // Thunks.LEAST)


def _through(base: int, register: int) -> bytes:
    """Return a call (base 0xd0) or jump (0xe0) through a register."""
    prefix = b"\x41" if register >= 8 else b""
    return prefix + bytes((0xFF, base + register % 8))


def apply_retpolines(image: Image, host: Host, thunks: Thunks) -> None:
    """Rewrite calls and jumps by way of retpolines as the CPU's mitigation wants them."""
    sites = offsets(image, RETPOLINES)
    if not sites:
        return
    start = host.symbol("__x86_indirect_thunk_array") or host.require_symbol(
        "__x86_indirect_thunk_rax"
    )
    for address in sites:
        code = image.memory.upto(address, _LONGEST)
        found = decode(code)
        if found is None or not found.is_relative_branch or found.immediate_size != 4:
            raise Damaged(f"{image.name}: no branch at {address:#x} ({RETPOLINES})")
        distance = int.from_bytes(
            code[found.immediate : found.immediate + 4], "little", signed=True
        )
        register = (address + found.length + distance - start & MASK) >> 5
        if register > 15 or register == 4:
            raise Damaged(f"{image.name}: the branch at {address:#x} goes to no retpoline")
        new = _retpoline(image, host, thunks, address, code[: found.length], register)
        if len(new) == found.length:
            image.memory.write(address, optimized(new, len(new), image.dialect), RETPOLINES)


def _retpoline(
    image: Image, host: Host, thunks: Thunks, address: int, old: bytes, register: int
) -> bytes:
    """Return what a branch to a retpoline becomes; none when it stays."""
    if host.has(RETPOLINE) and not host.has(RETPOLINE_LFENCE):
        if not (image.dialect.relocates and host.has(CALL_DEPTH)):
            return b""
        kind = "call" if old[-5] == CALL else "jump"
        array = host.require_symbol(f"__x86_indirect_{kind}_thunk_array")
        return _same_branch(old, address, array + 32 * register)
    opcode, new = old[-5], b""
    if old[0] == 0x0F:  # a conditional jump hops over the indirect one
        opcode, new = JUMP, bytes((0x70 + (old[1] & 15 ^ 1), len(old) - 2))
    if host.has(RETPOLINE_LFENCE):
        new += _LFENCE
    last = address + len(new) + 1 + register // 8
    if host.has(image.dialect.its_feature) and not last & 0x20:
        return _same_branch(old, address, thunks.make(register))
    new += _through(0xD0 if opcode == CALL else 0xE0, register)
    if opcode == JUMP and len(new) < len(old):
        new += bytes([INT3])
    return new.ljust(len(old), b"\x90")


def _same_branch(old: bytes, address: int, target: int) -> bytes:
    """Return the same kind of branch, prefix and all, to another target."""
    prefix = old[:-4]
    return prefix + (target - address - len(old) & 0xFFFF_FFFF).to_bytes(4, "little")


def wants_thunk(host: Host, address: int) -> bool:
    """Tell whether a return at an address has to go by way of the return thunk."""
    if not host.has(RETHUNK):
        return False
    if host.return_thunk != host.symbols.get("its_return_thunk", -1):
        return True
    return not address & 0x20


def return_code(host: Host, address: int) -> bytes:
    """Return the five bytes of a return."""
    if wants_thunk(host, address):
        return branch(JUMP, address, host.return_thunk)
    return BARE_RETURN


def apply_returns(image: Image, host: Host) -> None:
    """Turn jumps to the return thunk into returns, or into jumps to the thunk in use."""
    thunk = host.symbol("__x86_return_thunk")
    for address in offsets(image, RETURNS):
        code = image.memory.upto(address, 8)
        if len(code) < 5:
            raise Damaged(f"{image.name}: the return at {address:#x} is cut off")
        is_thunk = thunk is not None and code[:5] == branch(JUMP, address, thunk)
        if is_thunk or (code[0] == 0xC3 and code[5:] == TRAMPOLINE_END):
            image.memory.write(address, return_code(host, address), RETURNS)


def seal_entries(image: Image) -> None:
    """Take the landing marks off functions that nobody calls indirectly."""
    for address in offsets(image, ENDBR):
        if image.memory.read(address, 4, ENDBR) == _ENDBR:
            image.memory.write(address, _SEALED_ENDBR, ENDBR)


def drop_locks(image: Image) -> None:
    """Take the lock prefixes out, for a machine with one CPU."""
    for address in offsets(image, LOCKS):
        if address in image.lock_text and image.memory.read(address, 1, LOCKS) == b"\xf0":
            image.memory.write(address, b"\x3e", LOCKS)


def drop_tracing(image: Image, host: Host) -> None:
    """Turn each function's call of the tracer into a nop."""
    tracer = host.symbol("__fentry__")
    for address in addresses(image, FTRACE):
        code = image.memory.read(address, 5, FTRACE)
        if tracer is not None and code == branch(CALL, address, tracer):
            image.memory.write(address, NOPS[5], FTRACE)


def counts_calls(host: Host) -> bool:
    """Tell whether a host counts the depth of calls (``retbleed=stuff``)."""
    return host.call_depth or host.has(CALL_DEPTH)


class CallDepth:
    """Counts of calls, written in front of functions and called instead of them."""

    PAD: Final = _CALL_DEPTH_PAD.size
    """How far in front of a function its count lies."""

    def __init__(
        self,
        image: Image,
        host: Host,
        others: Sequence[Memory] = (),
        callers: Callers | None = None,
    ) -> None:
        """Prepare; of the host's modules that are not among ``callers`` it has to be guessed."""
        self._image = image
        self._host = host
        self._others = others
        self._callers = callers or {}
        self._texts = [host.text, image.text, *(m.text for m in host.modules.values())]
        self._counter = host.require_symbol("pcpu_hot") + _COUNTER
        self._skipped = {host.symbols.get(name) for name in _NOT_COUNTED}
        self._kexec = host.symbols.get("relocate_kernel", -_KEXEC_CODE)
        self.elsewhere: dict[int, bytes] = {}
        """Pads in other images: they are written when this one is loaded."""

    def apply(self) -> None:
        """Let all direct calls of core text be counted."""
        for targets in self._callers.values():
            for target in targets:
                if target in self._image.text:
                    self.pad(target)
        for address in self._sites():
            if address not in self._image.text:
                continue
            code = self._image.memory.upto(address, 5)
            if code[0] != CALL or len(code) < 5:
                continue
            target = address + 5 + int.from_bytes(code[1:], "little", signed=True) & MASK
            if (pad := self.pad(target)) is not None:
                self._image.memory.write(address, branch(CALL, address, pad), CALLS)

    def guess(self) -> tuple[int, list[str]]:
        """Take what modules that are not at hand import for called.

        Return how many functions are marked for that reason alone, and the names of the modules
        that import them.  Nothing may be counted after this.
        """
        marked: set[int] = set()
        names = []
        for name, module in self._host.modules.items():
            if name in self._callers or module.text == self._image.text:
                continue
            found = {a for a in module.imports.values() if a in self._image.text}
            new = {a for a in found - marked if self._unmarked(a) and self.pad(a) is not None}
            if new or found & marked:
                names.append(name)
            marked |= new
        return len(marked), names

    def _unmarked(self, target: int) -> bool:
        return self._image.memory.upto(target - self.PAD, self.PAD) == b"\x90" * self.PAD

    def _sites(self) -> Iterator[int]:
        yield from offsets(self._image, CALLS)
        yield from (entry.address for entry in alternatives(self._image))

    def pad(self, target: int) -> int | None:
        """Return the address of the pad in front of a function, written if need be."""
        in_kexec = self._kexec <= target < self._kexec + _KEXEC_CODE
        if target in self._skipped or in_kexec or not any(target in t for t in self._texts):
            return None
        pad = target - _CALL_DEPTH_PAD.size
        code = _CALL_DEPTH_PAD.pack(_COUNT, self._counter - target & 0xFFFF_FFFF, 5)
        old = self._read(pad, target)
        if old == code:
            return pad
        if old != b"\x90" * len(code):
            return None
        if pad in self._image.memory:
            self._image.memory.write(pad, code, CALLS)
        else:
            self.elsewhere[pad] = code
        return pad

    def _read(self, pad: int, target: int) -> bytes:
        """Return a pad's bytes; of an image that is not at hand, nops except at trampolines."""
        if pad in self.elsewhere:
            return self.elsewhere[pad]
        for memory in (self._image.memory, *self._others):
            if pad in memory:
                return memory.upto(pad, _CALL_DEPTH_PAD.size)
        if target in self._host.trampolines:
            return b""
        return b"\x90" * _CALL_DEPTH_PAD.size
