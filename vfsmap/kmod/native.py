"""Machine code run in this process: functions at addresses, and what the CPU says about itself."""

import ctypes
import struct
from collections.abc import Callable, Sequence
from typing import Any, Final

from vfsmap.pmem import libc
from vfsmap.units import PTE, align_up

_CPUID: Final = bytes.fromhex(
    "53 89f8 89f1 4989d0 0fa2 418900 41895804 41894808 4189500c 5b c3"
)  # push rbx; eax, ecx = arguments 1, 2; cpuid; store the four registers at argument 3; pop; ret

# word of x86_capability: leaf, sub-leaf, register (eax, ebx, ecx, edx)
_WORDS: Final = {
    0: (0x1, 0, 3),
    1: (0x8000_0001, 0, 3),
    4: (0x1, 0, 2),
    6: (0x8000_0001, 0, 2),
    9: (0x7, 0, 1),
    10: (0xD, 1, 0),
    12: (0x7, 1, 0),
    13: (0x8000_0008, 0, 1),
    14: (0x6, 0, 0),
    15: (0x8000_000A, 0, 3),
    16: (0x7, 0, 2),
    17: (0x8000_0007, 0, 1),
    18: (0x7, 0, 3),
    19: (0x8000_001F, 0, 0),
    20: (0x8000_0021, 0, 0),
}


def install(code: bytes, address: int = 0) -> int:
    """Put machine code into new memory, at ``address`` if it is given; return where it is.

    Raises:
        OSError: the address is taken.
    """
    length = align_up(len(code), PTE.size)
    flags = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS
    flags |= libc.MAP_FIXED_NOREPLACE if address else 0
    place = libc.mmap(address, length, libc.PROT_READ | libc.PROT_WRITE, flags)
    ctypes.memmove(place, code, len(code))
    libc.mprotect(place, length, libc.PROT_READ | libc.PROT_EXEC)
    return place


def function(address: int, count: int) -> Callable[..., int]:
    """Return the function at an address, of ``count`` numbers or addresses, as a callable."""
    kind: Any = ctypes.CFUNCTYPE(ctypes.c_uint64, *[ctypes.c_uint64] * count)
    found: Callable[..., int] = kind(address)
    return found


def address_of(name: str) -> int:
    """Return the address of a function of the C library."""
    symbol = getattr(ctypes.CDLL(None), name)
    return int(ctypes.cast(symbol, ctypes.c_void_p).value or 0)


def cpu_words() -> list[int]:
    """Return the words of ``x86_capability`` that the CPU itself tells; others are 0."""
    place = install(_CPUID)
    cpuid = function(place, 3)
    buffer = ctypes.create_string_buffer(16)
    target = ctypes.addressof(buffer)
    try:
        highest: dict[int, int] = {}
        for base in (0, 0x8000_0000):
            cpuid(base, 0, target)
            highest[base] = struct.unpack("<I", buffer.raw[:4])[0]
        words = [0] * 24
        for word, (leaf, sub, register) in _WORDS.items():
            if leaf <= highest[leaf & 0x8000_0000]:
                cpuid(leaf, sub, target)
                words[word] = struct.unpack("<4I", buffer.raw)[register]
        return words
    finally:
        libc.munmap(place, PTE.size)


def call(address: int, arguments: Sequence[int]) -> int:
    """Call the function at an address."""
    return function(address, len(arguments))(*arguments)
