"""Lengths and operands of x86-64 instructions, as far as patching text needs them.

Source: Intel's Software Developer's Manual, volume 2, appendix A (opcode maps).
"""

from typing import Final, NamedTuple

Bytes = bytes | bytearray | memoryview


class Instruction(NamedTuple):
    """One decoded instruction; offsets count from its first byte."""

    length: int
    opcode: int
    """One byte, or 0x0f00 | the second one, or 0x0f3800 and 0x0f3a00 | the third one."""
    prefixes: bytes
    displacement: int
    """Offset of the displacement, 0 when there is none."""
    rip_relative: bool
    immediate: int
    """Offset of the immediate operand, 0 when there is none."""
    immediate_size: int

    @property
    def is_nop(self) -> bool:
        """Whether it is one of the two forms that the kernel takes for padding."""
        if self.opcode == 0x90:
            return self.prefixes[:1] != b"\xf3"
        return self.opcode == 0x0F1F

    @property
    def is_relative_branch(self) -> bool:
        """Whether its immediate is a distance from its end: call, jmp or a conditional jump."""
        return (
            self.opcode in (0xE8, 0xE9, 0xEB)
            or 0x70 <= self.opcode <= 0x7F
            or 0x0F80 <= self.opcode <= 0x0F8F
        )


def _members(text: str) -> frozenset[int]:
    """Return the set that ``text`` names: ``"00-03 63"``."""
    found: set[int] = set()
    for part in text.split():
        first, _, last = part.partition("-")
        found.update(range(int(first, 16), int(last or first, 16) + 1))
    return frozenset(found)


_PREFIXES: Final = _members("26 2e 36 3e 64-67 f0 f2 f3")
_INVALID: Final = _members("06-07 0e 16-17 1e-1f 27 2f 37 3f 60-61 82 9a ce d4-d6 ea")
_MODRM: Final = _members(
    "00-03 08-0b 10-13 18-1b 20-23 28-2b 30-33 38-3b 63 69 6b 80-8f c0-c1 c6-c7 d0-d3 d8-df "
    "f6-f7 fe-ff"
)
_BYTE: Final = _members("04 0c 14 1c 24 2c 34 3c 6a-6b 70-7f 80 83 a8 b0-b7 c0-c1 c6 cd e0-e7 eb")
_WORD_OR_LONG: Final = _members("05 0d 15 1d 25 2d 35 3d 68-69 81 a9 b8-bf c7")
_LONG: Final = _members("e8-e9")
_TWO_INVALID: Final = _members("04 0a 0c 24-27 36 39 3b-3f 7a-7b a6-a7")
_TWO_BARE: Final = _members("05-09 0b 0e 30-35 37 77 80-8f a0-a2 a8-aa c8-cf")
_TWO_BYTE: Final = _members("0f 70-73 a4 ac ba c2 c4-c6")
_LONGEST: Final = 15


class _Undecodable(Exception):
    """The bytes are no instruction that this module knows."""


def decode(data: Bytes, at: int = 0) -> Instruction | None:
    """Return the instruction at ``at``, or None when the bytes are none or are cut off."""
    try:
        found = _Decoder(data, at).run()
    except (_Undecodable, IndexError):
        return None
    return found if found.length <= _LONGEST and at + found.length <= len(data) else None


class _Decoder:
    def __init__(self, data: Bytes, at: int) -> None:
        self.data = data
        self.start = self.at = at
        self.rex = 0
        self.prefixes = bytearray()
        self.displacement = 0
        self.rip_relative = False

    def next(self) -> int:
        value = self.data[self.at]
        self.at += 1
        return value

    def run(self) -> Instruction:
        byte = self.next()
        while byte in _PREFIXES:
            self.prefixes.append(byte)
            if len(self.prefixes) >= _LONGEST:
                raise _Undecodable
            byte = self.next()
        if byte & 0xF0 == 0x40:
            self.rex = byte
            byte = self.next()
        if byte in (0xC4, 0xC5, 0x62):
            opcode, immediate = self.vector(byte)
        elif byte == 0x0F:
            opcode, immediate = self.two_byte(self.next())
        else:
            opcode, immediate = byte, self.one_byte(byte)
        length = self.at - self.start + immediate
        return Instruction(
            length,
            opcode,
            bytes(self.prefixes),
            self.displacement,
            self.rip_relative,
            length - immediate if immediate else 0,
            immediate,
        )

    @property
    def operand_size(self) -> int:
        return 2 if 0x66 in self.prefixes and not self.rex & 8 else 4

    def one_byte(self, opcode: int) -> int:
        if opcode in _INVALID:
            raise _Undecodable
        register = self.modrm() if opcode in _MODRM else 0
        if opcode in _BYTE or (opcode == 0xF6 and register < 2):
            return 1
        if 0xB8 <= opcode <= 0xBF and self.rex & 8:
            return 8
        if opcode in _WORD_OR_LONG or (opcode == 0xF7 and register < 2):
            return self.operand_size
        if opcode in _LONG:
            return 4
        if 0xA0 <= opcode <= 0xA3:
            return 4 if 0x67 in self.prefixes else 8
        return {0xC2: 2, 0xCA: 2, 0xC8: 3}.get(opcode, 0)

    def two_byte(self, opcode: int) -> tuple[int, int]:
        if opcode in (0x38, 0x3A):
            third = self.next()
            self.modrm()
            return 0x0F0000 | opcode << 8 | third, int(opcode == 0x3A)
        if opcode in _TWO_INVALID:
            raise _Undecodable
        if opcode not in _TWO_BARE:
            self.modrm()
        size = 4 if opcode & 0xF0 == 0x80 else int(opcode in _TWO_BYTE)
        return 0x0F00 | opcode, size

    def vector(self, first: int) -> tuple[int, int]:
        """Decode what follows a VEX or EVEX prefix."""
        if first == 0xC5:
            self.next()
            table = 1
        else:
            table = self.next() & (0x1F if first == 0xC4 else 7)
            for _ in range(1 if first == 0xC4 else 2):
                self.next()
        opcode = self.next()
        if table not in (1, 2, 3):
            raise _Undecodable
        if not (table == 1 and opcode == 0x77):  # vzeroupper has no operands
            self.modrm()
        immediate = int(table == 3 or (table == 1 and opcode in _TWO_BYTE))
        return {1: 0x0F00, 2: 0x0F3800, 3: 0x0F3A00}[table] | opcode, immediate

    def modrm(self) -> int:
        """Skip the operand that a ModRM byte describes; return its register field."""
        modrm = self.next()
        mode, rm = modrm >> 6, modrm & 7
        if mode != 3:
            base = self.next() & 7 if rm == 4 else rm
            size = (4 if base == 5 else 0, 1, 4)[mode]
            self.rip_relative = mode == 0 and rm == 5
            if size:
                self.displacement = self.at - self.start
            self.at += size
        return modrm >> 3 & 7
