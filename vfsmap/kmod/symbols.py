"""A kernel's own table of its symbols (kallsyms), read from its image.

A stripped kernel still carries it: names packed by a table of 256 tokens, offsets from a base.  No
header tells where it is; it is found by what it must look like.  Source: scripts/kallsyms.c and
kernel/kallsyms.c; the order of the parts differs between 6.1 and 6.12, their forms do not.
"""

import re
import struct
from typing import Final, NamedTuple

from vfsmap.kmod.host import KERNEL_TEXT

_DIGITS: Final = b"".join(bytes([c, 0]) for c in range(0x30, 0x3A))
_TOKENS: Final = 256
_MARKED: Final = 256  # every so many names have a marker
_NAMES_MAX: Final = 1 << 24
_KERNEL_HALF: Final = 1 << 63
_LONG: Final = 0x80
_BASE: Final = KERNEL_TEXT.to_bytes(8, "little")


class _Tokens(NamedTuple):
    start: int
    end: int
    """Of the index that follows the tokens."""
    tokens: list[bytes]


def read_symbols(data: bytes) -> dict[str, int]:
    """Return the symbols that a kernel's image holds; none when their table is not found.

    Of several symbols of one name the first is kept.
    """
    for match in re.finditer(re.escape(_DIGITS), data):
        tokens = _tokens_at(data, match.start())
        if tokens is None:
            continue
        markers = _markers_before(data, tokens.start)
        names = _names_before(data, markers) or _names_behind_base(data, tokens.start)
        if names is None:
            continue
        count, start = names
        texts = _unpack(data, start, count, tokens.tokens)
        values = _values(data, tokens.end, start - 8, count)
        found: dict[str, int] = {}
        for text, value in zip(texts, values, strict=False):
            found.setdefault(text[1:].decode("ascii", "backslashreplace"), value)
        return found
    return {}


def _tokens_at(data: bytes, digits: int) -> _Tokens | None:
    """Return the tokens around those of the ten digits, if an index for them follows."""
    start = digits
    for _ in range(0x30):
        start = data.rfind(b"\0", 0, start - 1) + 1
        if digits - start > _TOKENS * 32:
            return None
    tokens = data[start : start + _TOKENS * 64].split(b"\0", _TOKENS)[:_TOKENS]
    if len(tokens) < _TOKENS:
        return None
    offsets, at = [], 0
    for token in tokens:
        offsets.append(at)
        at += len(token) + 1
    index = struct.pack(f"<{_TOKENS}H", *(offset & 0xFFFF for offset in offsets))
    place = data.find(index, start + at, start + at + 64 + len(index))
    return None if place < 0 else _Tokens(start, place + len(index), tokens)


def _markers_before(data: bytes, end: int) -> list[int]:
    """Return the ascending words that end before the tokens; the first is 0."""
    at = end & -4
    while at > 4 and data[at - 4 : at] == b"\0\0\0\0":  # padding
        at -= 4
    words: list[int] = []
    while at >= 4:
        at -= 4
        (word,) = struct.unpack_from("<I", data, at)
        if words and word >= words[-1]:
            return []
        words.append(word)
        if word == 0:
            return [*reversed(words), at]
    return []


def _names_before(data: bytes, markers: list[int]) -> tuple[int, int] | None:
    """Return how many names there are, and where they start."""
    if len(markers) < 3:
        return None
    *marks, end = markers
    latest = (end - marks[-1]) & -8
    for start in range(latest, max(latest - _MARKED * 200, 8), -8):
        (count,) = struct.unpack_from("<I", data, start - 8)
        if (len(marks) - 1) * _MARKED < count <= len(marks) * _MARKED < _NAMES_MAX:
            at = start
            for _ in range(_MARKED):
                size, at = _length(data, at)
                at += size
            if at - start == marks[1]:
                return count, start
    return None


def _names_behind_base(data: bytes, end: int) -> tuple[int, int] | None:
    """Return the same where other tables lie between markers and tokens: behind the base."""
    for match in re.finditer(re.escape(_BASE), data[:end]):
        start = match.end() + 8
        (count,) = struct.unpack_from("<I", data, match.end())
        if match.start() % 8 or not _MARKED < count < _NAMES_MAX:
            continue
        at, first = start, 0
        for number in range(count):
            if number == _MARKED:
                first = at - start
            if at + 2 >= end:
                break
            size, at = _length(data, at)
            at += size
        at = at + 7 & -8
        if at + 8 <= end and struct.unpack_from("<2I", data, at) == (0, first):
            return count, start
    return None


def _length(data: bytes, at: int) -> tuple[int, int]:
    """Return the number of tokens of the name at ``at``, and where they start."""
    first = data[at]
    if first & _LONG:
        return first & ~_LONG | data[at + 1] << 7, at + 2
    return first, at + 1


def _unpack(data: bytes, at: int, count: int, tokens: list[bytes]) -> list[bytes]:
    """Return the names, each with the letter of its kind in front."""
    found = []
    for _ in range(count):
        if at + 2 >= len(data):
            break
        size, at = _length(data, at)
        found.append(b"".join([tokens[number] for number in data[at : at + size]]))
        at += size
    return found


def _values(data: bytes, after: int, before: int, count: int) -> list[int]:
    """Return the symbols' values: their offsets lie behind the tokens, or before the count."""
    size = 4 * count + 7 & -8
    after = after + 7 & -8
    for offsets, base in ((after, after + size), (before - 8 - size, before - 8)):
        if offsets < 0 or base + 8 > len(data):
            continue
        (start,) = struct.unpack_from("<Q", data, base)
        if start >= _KERNEL_HALF and start % 4096 == 0:
            words = struct.unpack_from(f"<{count}i", data, offsets)
            # those of variables of each CPU are not relative to the base
            return [word if word >= 0 else start - 1 - word for word in words]
    return []
