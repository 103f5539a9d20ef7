"""Padding: the nops the kernel writes, and how it merges those it finds.

Source: optimize_nops() in arch/x86/kernel/alternative.c of Linux 6.1 and 6.12.
"""

from typing import Final

from vfsmap.kmod.image import Dialect
from vfsmap.kmod.insn import decode

INT3: Final = 0xCC
NOPS: Final = tuple(
    bytes.fromhex(text)
    for text in (
        "",
        "90",
        "6690",
        "0f1f00",
        "0f1f4000",
        "0f1f440000",
        "660f1f440000",
        "0f1f8000000000",
        "0f1f840000000000",
        "2e0f1f840000000000",
        "662e0f1f840000000000",
        "66662e0f1f840000000000",
    )
)
"""By length; older kernels use those of up to 8 bytes."""

_MARGIN: Final = bytes(16)  # instructions are decoded past a buffer's end


def fill(length: int, dialect: Dialect) -> bytes:
    """Return ``length`` bytes that do nothing, as the kernel would write them."""
    if length <= dialect.longest_nop:
        return NOPS[length]
    if not dialect.relocates:
        whole, rest = divmod(length, dialect.longest_nop)
        return NOPS[dialect.longest_nop] * whole + NOPS[rest]
    if length < 128:
        return bytes((0xEB, length - 2)) + bytes([INT3]) * (length - 2)
    return b"\xe9" + (length - 5).to_bytes(4, "little") + bytes([INT3]) * (length - 5)


def optimized(code: bytes, length: int, dialect: Dialect) -> bytes:
    """Return the first ``length`` bytes of ``code`` with their nops merged.

    What follows in ``code`` matters only to decode the last instruction.
    """
    buffer = bytearray(code[:length])
    tail = bytes(code[length : length + len(_MARGIN)]).ljust(len(_MARGIN), b"\0")
    if dialect.relocates:
        _merge_any(buffer, tail, dialect)
    else:
        _merge_single(buffer, tail, dialect)
    return bytes(buffer)


def _merge_single(buffer: bytearray, tail: bytes, dialect: Dialect) -> None:
    """Merge runs of one-byte nops; stop where nothing can be decoded."""
    at = 0
    while at < len(buffer):
        found = decode(bytes(buffer[at : at + 15]) + tail)
        if found is None:
            return
        if found.length > 1 or found.opcode != 0x90:
            at += found.length
            continue
        end = at
        while end < len(buffer) and buffer[end] == 0x90:
            end += 1
        if end - at > 1:
            buffer[at:end] = fill(end - at, dialect)
        at = end


def _merge_any(buffer: bytearray, tail: bytes, dialect: Dialect) -> None:
    """Merge runs of nops of any length; a nop that ends the buffer is left as it is."""
    at = 0
    while at < len(buffer):
        found = decode(bytes(buffer[at : at + 15]) + tail)
        if found is None:
            return
        end = at + found.length
        if found.is_nop:
            if end == len(buffer):
                return
            end = _skip(buffer, end, tail)
            buffer[at:end] = fill(end - at, dialect)
        at = end


def _skip(buffer: bytearray, at: int, tail: bytes) -> int:
    while at < len(buffer):
        found = decode(bytes(buffer[at : at + 15]) + tail)
        if found is None or not found.is_nop or at + found.length > len(buffer):
            break
        at += found.length
    return at
