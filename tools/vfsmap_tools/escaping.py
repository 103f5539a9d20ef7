r"""How names of any bytes are printed: what a terminal would obey, and what is no text, as escapes.

``\n`` and ``\x1b`` are the control characters of ASCII, ``\u0085`` and ``\u202e`` those of Unicode:
line ends, and what turns the direction of writing.  ``\xff`` is a byte that is not UTF-8.
A backslash of a name's own is left alone, so that ``dev-sda\x2d1.swap`` stays what it is.
"""

import json
import re
from typing import Final

_BYTES: Final = {0xDC00 + byte: rf"\x{byte:02x}" for byte in range(0x80, 0x100)}
"""What os.fsdecode() makes of bytes that are not UTF-8: lone surrogates."""
_ASCII: Final = {code: ascii(chr(code))[1:-1] for code in (*range(0x20), 0x7F)}
_LINES: Final = (*range(0x80, 0xA0), 0x2028, 0x2029)
_DIRECTIONS: Final = (0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
"""The characters with the property Bidi_Control."""
_ESCAPES: Final = _BYTES | _ASCII | {code: rf"\u{code:04x}" for code in (*_LINES, *_DIRECTIONS)}
_IN_JSON: Final = re.compile(r"\\\\|\\ud[89ab]..\\ud...|\\udc(..)")
"""A backslash, a pair of surrogates, or a lone one, as JSON escapes them."""


def printable(text: str) -> str:
    """Return a text as one line that a terminal shows as it is."""
    return text.translate(_ESCAPES)


def json_text(value: object, indent: int | None = None) -> str:
    r"""Return a value as JSON that any parser takes.

    Strings are exact, but bytes that are not UTF-8 are the four characters ``\xff`` in them.
    """
    text = json.dumps(value, indent=indent, default=str)
    return _IN_JSON.sub(lambda found: rf"\\x{found[1]}" if found[1] else found[0], text)
