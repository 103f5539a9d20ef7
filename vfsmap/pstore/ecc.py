"""Reed-Solomon parity of pstore blocks: encode by table, check by encoding, repair.

The code is the one of Linux ``lib/reed_solomon`` as ramoops sets it up: GF(2^8) over 0x11d,
alpha = 2, roots alpha^0 ... alpha^(size-1), systematic and shortened, first byte = highest power.

Encoding is linear, so the parity of a block is the XOR of one table entry for each of its bytes.
An entry is an int of ``size`` bytes; the table of a position is built from the parity of a 1 there.
"""

from collections.abc import Iterator, Sequence
from functools import cache, reduce
from operator import getitem, xor
from typing import Final, NamedTuple

from vfsmap.errors import Invalid
from vfsmap.pstore.errata import EXP, find_errors, multiply

BLOCK: Final = 128
"""Data bytes that share one parity."""
MAX_PARITY: Final = 127
"""Parity bytes a block can have: block and parity together are one codeword of at most 255."""

_DOUBLE: Final = bytes(multiply(value, EXP[1]) for value in range(256))


class Repair(NamedTuple):
    """What became of a block."""

    data: bytes
    """The block, mended where it could be."""
    corrected: int
    """Bytes found wrong and mended, in the data and in the parity; -1: too many were wrong."""


class Code:
    """The code with ``size`` parity bytes a block.

    Raises:
        Invalid: ``size`` is not in 2...127.
    """

    def __init__(self, size: int) -> None:
        if not 2 <= size <= MAX_PARITY:
            raise Invalid(f"{size} parity bytes a block are not possible; use 2 to {MAX_PARITY}")
        self.size = size
        self._tables = _tables(size)

    def parity(self, data: bytes | bytearray | memoryview) -> bytes:
        """Return the parity of a block of at most 128 bytes."""
        tables = self._tables
        if len(data) != BLOCK:
            tables = tables[BLOCK - len(data) :]
        return reduce(xor, map(getitem, tables, data), 0).to_bytes(self.size, "big")

    def parities(self, data: bytes | bytearray | memoryview) -> bytes:
        """Return the parities of consecutive blocks; the last one may be short."""
        parity = self.parity
        return b"".join([parity(data[at : at + BLOCK]) for at in range(0, len(data), BLOCK)])

    def change(self, parity: bytes | memoryview, difference: bytes, after: int) -> bytes:
        """Return the parity of a block some of whose bytes changed.

        ``difference`` is old XOR new of the bytes that end ``after`` bytes before the block does.
        """
        end = BLOCK - after
        tables = self._tables[end - len(difference) : end]
        old = int.from_bytes(parity, "big")
        return reduce(xor, map(getitem, tables, difference), old).to_bytes(self.size, "big")

    def repair(self, data: bytes, parity: bytes) -> Repair:
        """Return ``data`` with up to ``size // 2`` wrong bytes, in it or in its parity, mended."""
        expected = self.parity(data)
        if expected == parity:
            return Repair(data, 0)
        word = bytearray(data + parity)
        errors = find_errors(bytes(map(xor, expected, parity)), len(word))
        if errors is None:
            return Repair(data, -1)
        for place, error in errors.items():
            word[-1 - place] ^= error
        return Repair(bytes(word[: len(data)]), len(errors))


@cache
def _tables(size: int) -> Sequence[Sequence[int]]:
    """Return, for each byte of a full block, the parity of each value it can have."""
    generator = _generator(size)
    feedback = [m.to_bytes(size, "big") for m in _multiples(generator)]
    unit = generator  # x^size mod generator: the parity of a 1 in the last byte
    tables = []
    for _ in range(BLOCK):
        tables.append(_multiples(unit))
        unit = bytes(map(xor, unit[1:] + b"\0", feedback[unit[0]]))
    return tables[::-1]


def matching_sizes(data: bytes, tail: bytes) -> Iterator[int]:
    """Yield each number of parity bytes with which the end of ``tail`` is the parity of ``data``.

    Without the tables that one code needs.
    """
    # alpha^0 and alpha^1 are roots of every code: two sums, carried along, spare most divisions
    ones = reduce(xor, data)
    head = reduce(lambda value, byte: _DOUBLE[value] ^ byte, data)
    rest, power = 0, 1
    for size in range(1, min(MAX_PARITY, len(tail)) + 1):
        ones ^= tail[-size]
        rest ^= multiply(tail[-size], power)
        head, power = _DOUBLE[head], _DOUBLE[power]
        if not ones and head == rest and size > 1 and _divide(data, size) == tail[-size:]:
            yield size


def _divide(data: bytes, size: int) -> bytes:
    parity = bytes(size)
    for byte in data:
        factor = byte ^ parity[0]
        feedback = bytes(multiply(factor, c) for c in _generator(size))
        parity = bytes(map(xor, parity[1:] + b"\0", feedback))
    return parity


@cache
def _generator(size: int) -> bytes:
    """Return the generator polynomial without its leading 1, highest power first."""
    if size == 0:
        return b""
    generator = b"\1" + _generator(size - 1)
    scaled = bytes(multiply(EXP[size - 1], c) for c in generator)
    return bytes(map(xor, generator + b"\0", b"\0" + scaled))[1:]


def _multiples(row: bytes) -> list[int]:
    """Return ``row`` times each element of the field, as ints."""
    multiples = [0]
    for _ in range(8):
        value = int.from_bytes(row, "big")
        multiples += [m ^ value for m in multiples]
        row = row.translate(_DOUBLE)
    return multiples
