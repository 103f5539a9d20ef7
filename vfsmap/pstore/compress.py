"""Compression of dmesg records: raw deflate both ways, the others for reading.

A record only says that it is compressed, never how, so inflating is a matter of trying.
Kernels before 6.6 could be set to any of these; since then there is deflate alone.
"""

import zlib
from collections.abc import Callable
from typing import Final

import lz4.block
import zstandard

from vfsmap.units import MIB

REASONS: Final = (b"Panic", b"Oops", b"Emergency", b"Shutdown", b"Unknown")
"""What the text of a record can begin with; Linux kmsg_dump_reason_str()."""

_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_SANE: Final = 64 * MIB  # a record can't make us hold more, whatever it claims


def deflate(text: bytes) -> bytes:
    """Return ``text`` as raw deflate, without header or checksum."""
    # the kernel's level and window: any inflater of window 2^15 reads it, and so all kernels do
    packer = zlib.compressobj(zlib.Z_DEFAULT_COMPRESSION, zlib.DEFLATED, -15, 8)
    return packer.compress(text) + packer.flush()


def inflate(body: bytes, limit: int, *, lenient: bool = False) -> bytes | None:
    """Return the text of a compressed record, at most ``limit`` bytes; None: nothing reads it.

    ``lenient`` forgives a deflate stream that lacks a last byte of zero, as kernel 6.1 does.
    """
    limit = min(limit, _SANE)
    if body.startswith(_ZSTD_MAGIC):
        return _inflate_zstd(body, limit)
    text, rest = _inflate_deflate(body, limit)
    if text is None and lenient:
        text, rest = _inflate_deflate(body + b"\0", limit)
    if text is not None and (not rest or _looks_right(text)):
        return text
    # A block of these carries no mark of its own: only what comes out tells.
    guesses: tuple[Callable[[bytes, int], bytes | None], ...] = (_inflate_lz4, _inflate_lzo)
    for guess in guesses:
        guessed = guess(body, limit)
        if guessed is not None and len(guessed) <= limit and _looks_right(guessed):
            return guessed
    if any(reason + b"#" in body[:16] for reason in REASONS):
        return None  # LZ4 and LZO begin with plain text: this is a torn one
    return text  # to a kernel of deflate alone it does not matter what follows the stream


def _looks_right(text: bytes) -> bool:
    return text.partition(b"#")[0] in REASONS


def _inflate_deflate(body: bytes, limit: int) -> tuple[bytes | None, bytes]:
    """Return the text, None when the stream is not whole, and what follows the stream."""
    unpacker = zlib.decompressobj(-15)
    try:
        text = unpacker.decompress(body, limit + 1)
    except zlib.error:
        return None, b""
    whole = unpacker.eof and len(text) <= limit
    return (text if whole else None), unpacker.unused_data


def _inflate_zstd(body: bytes, limit: int) -> bytes | None:
    try:
        if zstandard.frame_content_size(body) > limit:
            return None
        return zstandard.ZstdDecompressor().decompress(body, max_output_size=limit)
    except zstandard.ZstdError:
        return None


def _inflate_lz4(body: bytes, limit: int) -> bytes | None:
    try:
        text: bytes = lz4.block.decompress(body, uncompressed_size=limit)
    except lz4.block.LZ4BlockError:
        return None
    return text


def _inflate_lzo(body: bytes, limit: int) -> bytes | None:
    try:
        from lzallright import LZOCompressor, LZOError
    except ImportError:
        return (
            None  # an extra: without it the record is shown as the kernel shows one it can't read
        )
    if not body:
        return None
    try:
        return LZOCompressor.decompress(body, limit)
    except LZOError:
        return None
