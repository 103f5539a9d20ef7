"""Alternatives: code replaced where the CPU has, or lacks, a feature.

Source: apply_alternatives() in arch/x86/kernel/alternative.c of Linux 6.1 and 6.12.
"""

import struct
from collections.abc import Iterator
from typing import Final

from vfsmap.errors import Damaged, NotFound
from vfsmap.kmod.host import Host
from vfsmap.kmod.image import ALTERNATIVES, Image
from vfsmap.kmod.insn import Instruction, decode
from vfsmap.kmod.memory import MASK
from vfsmap.kmod.nops import INT3, NOPS, optimized
from vfsmap.kmod.tables import Alternative, alternatives

_FEATURES: Final = 24 * 32
_REL32: Final = struct.Struct("<i")
_LOOK_AHEAD: Final = 16


def apply_alternatives(image: Image, host: Host) -> None:
    """Apply an image's alternatives, in the order of its table.

    Raises:
        Damaged: an entry makes no sense.
    """
    entries = alternatives(image)
    if image.dialect.relocates:
        entries = _with_common_lengths(entries)
    for entry in entries:
        if entry.feature >= _FEATURES:
            raise Damaged(f"{image.name}: {ALTERNATIVES} asks for the feature {entry.feature}")
        applies = host.has(entry.feature) != entry.inverted
        if applies:
            if entry.replacement_length > entry.length:
                raise Damaged(
                    f"{image.name}: {ALTERNATIVES} puts {entry.replacement_length} bytes into "
                    f"{entry.length} at {entry.address:#x}"
                )
            code = image.memory.read(entry.replacement, entry.replacement_length, ALTERNATIVES)
            patch = _relocated if image.dialect.relocates else _moved
            image.memory.write(entry.address, patch(image, host, entry, code), ALTERNATIVES)
        if not (applies and image.dialect.relocates):
            merge_nops(image, entry.address, entry.length)


def merge_nops(image: Image, address: int, length: int) -> None:
    """Merge the nops in a piece of text."""
    code = image.memory.upto(address, length + _LOOK_AHEAD)
    image.memory.write(address, optimized(code, length, image.dialect), ALTERNATIVES)


def _with_common_lengths(entries: list[Alternative]) -> list[Alternative]:
    """Give neighbouring entries of one place the length of the longest."""
    entries = list(entries)
    for at, entry in enumerate(entries):
        longest = entry.length
        for other in range(at + 1, len(entries)):
            if entries[other].address != entry.address:
                break
            longest = max(longest, entries[other].length)
            entries[other] = entries[other]._replace(length=longest)
        entries[at] = entry._replace(length=longest)
    return entries


def _moved(image: Image, host: Host, entry: Alternative, code: bytes) -> bytes:
    """Return a replacement as Linux 6.1 moves it: one call or one jump is retargeted."""
    if len(code) == 5 and code[0] in (0xE8, 0xE9, 0xEB):
        (distance,) = _REL32.unpack_from(code, 1)
        if code[0] == 0xE8:
            code = b"\xe8" + _wrapped(distance + entry.replacement - entry.address)
        else:
            code = _jump(entry.replacement + 5 + distance - entry.address)
    return code.ljust(entry.length, b"\x90")


def _jump(distance: int) -> bytes:
    """Return a jump; short ones only go forward, which is the kernel's rule."""
    if 0 <= distance <= 129:
        return bytes((0xEB, distance - 2 & 0xFF)) + NOPS[3]
    return b"\xe9" + _wrapped(distance - 5)


def _relocated(image: Image, host: Host, entry: Alternative, code: bytes) -> bytes:
    """Return a replacement as Linux 6.12 relocates it, instruction by instruction."""
    if entry.direct_call:
        code = _direct_call(image, host, entry, code)
    buffer = bytearray(code.ljust(entry.length, b"\x90"))
    relocate_code(buffer, entry.length, entry.address, entry.replacement, entry.replacement_length)
    done = optimized(bytes(buffer), entry.length, image.dialect)
    return done + bytes(buffer[entry.length :])


def _direct_call(image: Image, host: Host, entry: Alternative, code: bytes) -> bytes:
    """Return a direct call of what a call through memory would call now."""
    old = image.memory.read(entry.address, 6, ALTERNATIVES)
    if len(code) != 5 or code[0] != 0xE8 or entry.length != 6 or old[:2] != b"\xff\x15":
        raise Damaged(f"{image.name}: no indirect call at {entry.address:#x}: it has {old.hex()}")
    slot = (entry.address + 6 + _REL32.unpack_from(old, 2)[0]) & MASK
    target = function_in(image, host, slot)
    trap = host.require_symbol("BUG_func")
    if target == host.symbol("nop_func"):
        return b""
    return b"\xe8" + _wrapped(_REL32.unpack_from(code, 1)[0] + (target or trap) - trap)


def function_in(image: Image, host: Host, slot: int) -> int:
    """Return the function whose address lies at ``slot``: in ``pv_ops`` or in the image.

    Raises:
        NotFound: the host's document does not tell what is in ``pv_ops``.
        Damaged: it is in neither.
    """
    index, rest = divmod(slot - host.symbols.get("pv_ops", 0), 8)
    if "pv_ops" in host.symbols and not rest and 0 <= index < len(host.pv_ops):
        return host.pv_ops[index]
    if slot not in image.memory and not host.pv_ops:
        raise NotFound(f"{image.name} calls by way of pv_ops, which the host's document lacks")
    return image.memory.u64(slot, "a slot of pv_ops")


def _instructions(buffer: bytearray, length: int) -> Iterator[tuple[int, Instruction]]:
    at = 0
    while at < length:
        found = decode(bytes(buffer[at : at + 15]) + bytes(_LOOK_AHEAD))
        if found is None:
            return
        yield at, found
        at += found.length


def relocate_code(buffer: bytearray, length: int, address: int, origin: int, size: int) -> None:
    """Make code that was written for ``origin`` run at ``address``, in place.

    Branches and operands that stay within the ``size`` bytes of it are left alone.

    Raises:
        Damaged: a short branch would have to reach too far.
    """
    distance = origin - address
    for at, found in _instructions(buffer, length):
        end = at + found.length
        if found.is_relative_branch:
            value = _operand(buffer, at + found.immediate, found.immediate_size)
            if not 0 <= end + value <= size:
                _add(buffer, at + found.immediate, found.immediate_size, distance)
            short = _signed32(value + distance + 3)
            if found.opcode == 0xE9 and -128 <= short < 128:
                buffer[at : at + 2] = bytes((0xEB, short & 0xFF))
                buffer[at + 2 : end] = bytes([INT3]) * (found.length - 2)
        if found.rip_relative:
            value = _operand(buffer, at + found.displacement, 4)
            if not 0 <= end + value <= size:
                _add(buffer, at + found.displacement, 4, distance)


def _operand(buffer: bytearray, at: int, size: int) -> int:
    return int.from_bytes(buffer[at : at + size], "little", signed=True)


def _add(buffer: bytearray, at: int, size: int, distance: int) -> None:
    value = _operand(buffer, at, size) + distance
    if size == 1 and not -128 <= value < 128:
        raise Damaged(f"a short branch can't reach over {distance} bytes")
    buffer[at : at + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")


def _signed32(value: int) -> int:
    return (value + (1 << 31) & 0xFFFF_FFFF) - (1 << 31)


def _wrapped(distance: int) -> bytes:
    return (distance & 0xFFFF_FFFF).to_bytes(4, "little")
