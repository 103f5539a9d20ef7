"""Small images in memory, to try one rule of patching at a time."""

import struct
from typing import Final

from vfsmap.kmod.host import Document, Host
from vfsmap.kmod.image import NEW, Dialect, Image, Span
from vfsmap.kmod.memory import Memory, Region

TEXT: Final = 0xFFFFFFFFC0000000
TABLE: Final = TEXT + 0x10000
THUNKS: Final = 0xFFFFFFFF81E02000
SYMBOLS: Final = {
    "__x86_indirect_thunk_array": THUNKS,
    "__x86_indirect_call_thunk_array": THUNKS + 0x400,
    "__x86_indirect_jump_thunk_array": THUNKS + 0x800,
    "__x86_return_thunk": THUNKS + 0x1000,
    "its_return_thunk": THUNKS + 0x1040,
    "__fentry__": THUNKS + 0x2000,
    "_paravirt_nop": THUNKS + 0x2100,
    "paravirt_BUG": THUNKS + 0x2200,
    "nop_func": THUNKS + 0x2300,
    "BUG_func": THUNKS + 0x2400,
    "__static_call_return0": THUNKS + 0x2500,
    "__static_call_return": THUNKS + 0x2600,
    "pcpu_hot": 0x35000,
    "pv_ops": 0xFFFFFFFF82C00000,
}


def host(*features: int, **more: object) -> Host:
    """Return a host with these features, and more fields of its document."""
    words = [0] * 24
    for feature in features:
        words[feature >> 5] |= 1 << (feature & 31)
    document = Document(
        kernel="6",
        x86_capability=words,
        kernel_symbols={name: hex(value) for name, value in SYMBOLS.items()},
        x86_return_thunk=hex(SYMBOLS["__x86_return_thunk"]),
        vmlinux_text_len=0x1000000,
    )
    for name, value in more.items():
        setattr(document, name, value)
    return Host(document)


def image(
    text: bytes, table: str = "", rows: bytes = b"", *, dialect: Dialect = NEW, base: int = TEXT
) -> Image:
    """Return an image of a few bytes of text, and perhaps one table."""
    memory = Memory("test.ko")
    memory.add(Region("text", base, bytearray(text)))
    made = Image(memory, dialect, range(base, base + len(text)))
    if table:
        memory.add(Region("table", TABLE, bytearray(rows)))
        made.tables[table] = Span(TABLE, len(rows))
    return made


def to(*addresses: int) -> bytes:
    """Return a table of self-relative words."""
    return b"".join(
        struct.pack("<i", address - TABLE - 4 * i) for i, address in enumerate(addresses)
    )


def text_of(made: Image, size: int = 0, at: int = 0) -> str:
    """Return text in hexadecimal."""
    return made.memory.read(made.text.start + at, size or len(made.text)).hex()
