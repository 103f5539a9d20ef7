"""Dmesg records: the header line, the body, and the name of the file that shows it."""

import re
from typing import Final, Literal, NamedTuple

from vfsmap.pstore.compress import REASONS, deflate
from vfsmap.pstore.geometry import Order

Reason = Literal["Panic", "Oops", "Emergency", "Shutdown", "Unknown"]
Compression = Literal["deflate", "none"]

# What the kernel's sscanf("====%lld.%lu-%c\n%n") takes, else "====%lld.%lu\n%n": spaces are
# skipped before a number, a "\n" takes any white space or none, and 0xa0 is white space to it.
_SPACE: Final = rb"[\t-\r \xa0]*"
_HEADER: Final = re.compile(
    rb"====" + _SPACE + rb"(-?[0-9]+)\." + _SPACE + rb"([0-9]+)(?:-([^\0]))?" + _SPACE, re.DOTALL
)
_TITLE: Final = re.compile(rb"(%s)#([0-9]{1,10}) Part[0-9]" % b"|".join(REASONS))
_SPACES: Final = b"\t\n\v\f\r \xa0"


class Header(NamedTuple):
    """The first line of a record."""

    time_ns: int
    """Since 1970."""
    compressed: bool
    length: int
    """Bytes of the line."""


class Title(NamedTuple):
    """The first line of a record's text."""

    reason: str
    number: int
    """Which crash since the counter began."""


def make_header(time_ns: int, *, compressed: bool) -> bytes:
    """Return the line that opens a record made at ``time_ns``."""
    seconds, rest = divmod(time_ns, 1_000_000_000)
    return b"====%d.%06d-%s\n" % (seconds, rest // 1000, b"C" if compressed else b"D")


def parse_header(log: bytes) -> Header | None:
    """Return the header of a dmesg zone's content; None: the kernel would not take it either."""
    match = _HEADER.match(log)
    if not match:
        return None
    seconds, fraction, mark = match.groups()
    # The kernel's numbers have 64 bits; only nonsense has more digits than that.
    time_ns = int(seconds[:20]) * 1_000_000_000 + int(fraction[:20]) * 1000
    return Header(time_ns, mark == b"C", match.end())


def parse_title(text: bytes) -> Title | None:
    """Return reason and count from a record's text; None: it is not the kernel's kind of text."""
    match = _TITLE.match(text)
    return Title(match[1].decode(), int(match[2])) if match else None


def readable_limit(capacity: int, order: Order) -> int:
    """Return the longest text that a kernel inflates from zones of ``capacity`` bytes."""
    if order == "6.12":
        return capacity * 3
    # 6.1 sizes its buffer by the ratio it expects, in percent: zbufsize_deflate()
    expected = ((range(1000, 2001), 56), (range(2001, 3001), 54), (range(3001, 4000), 52))
    for sizes, percent in (*expected, (range(4000, 10001), 45)):
        if capacity in sizes:
            return capacity * 100 // percent
    return capacity * 100 // 60


def writable_limit(capacity: int) -> int:
    """Return the longest text that every kernel inflates from zones of ``capacity`` bytes."""
    return capacity * 100 // 60  # the least of readable_limit()


def make_body(
    title: bytes, tail: bytes, room: int, limit: int, compression: Compression
) -> tuple[bytes, bool]:
    """Return a record's body, at most ``room`` bytes, and whether it is compressed.

    The text is ``title`` and as much of the end of ``tail`` as fits, from the start of a line
    where there is one.
    """
    plain = max(0, room - len(title))
    keep = min(len(tail), limit - len(title))
    while compression == "deflate" and keep >= 0:
        packed = deflate(title + _last_lines(tail, keep))
        # the kernel takes white space after the header for a part of the header
        if len(packed) <= room and packed[0] not in _SPACES:
            return packed, True
        if keep <= plain:
            break
        keep = max(plain, min(keep * room // len(packed), keep - keep // 16 - 1))
    return (title + _last_lines(tail, plain))[:room], False


def _last_lines(text: bytes, count: int) -> bytes:
    """Return the last ``count`` bytes, less a line cut at the front."""
    if count >= len(text):
        return text
    start = len(text) - count
    line = text.find(b"\n", start - 1 if start else 0) + 1
    return text[line:] if 0 < line < len(text) else text[start:]
