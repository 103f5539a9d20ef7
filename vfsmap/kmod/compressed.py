"""Unpacking what kernels and modules are shipped in: xz, lzma, zstd, gzip, bzip2 and lz4.

The codec is told by the first bytes.  The output is bounded, so that a few hostile bytes can't ask
for all memory.
"""

import bz2
import lzma
import struct
import zlib
from collections.abc import Callable
from typing import Any, Final

import lz4.block
import zstandard

from vfsmap.errors import Damaged, Unsupported
from vfsmap.units import GIB, MIB

LIMIT: Final = GIB
"""Bytes that nothing unpacks to: the kernel's module area and its own image have 1 GiB each."""

_PIECE: Final = 4 * MIB
_LZ4_BLOCK: Final = 8 * MIB  # the legacy format cuts its input so


def unpack(data: bytes | memoryview, name: str = "file") -> bytes:
    """Return the bytes that ``data`` holds packed, or ``data`` itself when it is not packed.

    Raises:
        Damaged: the packed bytes make no sense, or would unpack to more than 1 GiB.
        Unsupported: packed by lzo, for which there is no well-kept library.
    """
    for magic, codec in _CODECS:
        if data[: len(magic)] == magic:
            try:
                return codec(data, name)
            except _FAILURES as exc:
                raise Damaged(f"{name} can't be unpacked: {exc}") from exc
    return bytes(data)


def is_packed(data: bytes | memoryview) -> bool:
    """Tell whether :func:`unpack` knows the first bytes as those of a packed file."""
    return any(data[: len(magic)] == magic for magic, _ in _CODECS)


_FAILURES: Final[tuple[type[Exception], ...]] = (
    *(lzma.LZMAError, zlib.error, zstandard.ZstdError, OSError, EOFError, RuntimeError),
    *(struct.error, ValueError, MemoryError),
)


def _bounded(pieces: list[bytes], name: str) -> bytes:
    if sum(map(len, pieces)) > LIMIT:
        raise Damaged(f"{name} would unpack to more than {LIMIT} bytes")
    return b"".join(pieces)


def _with(make: Callable[[], object]) -> Callable[[bytes | memoryview, str], bytes]:
    """Return a function that runs a decompressor object of the standard library."""

    def run(data: bytes | memoryview, name: str) -> bytes:
        decoder: Any = make()
        pieces = [decoder.decompress(data, LIMIT + 1)]
        if not decoder.eof:
            _bounded(pieces, name)
            raise Damaged(f"{name} ends in the middle of its packed data")
        return _bounded(pieces, name)

    return run


def _zstd(data: bytes | memoryview, name: str) -> bytes:
    pieces = []
    total = 0
    reader = zstandard.ZstdDecompressor(max_window_size=2**31).stream_reader(data)
    while total <= LIMIT and (piece := reader.read(_PIECE)):
        pieces.append(piece)
        total += len(piece)
    return _bounded(pieces, name)


def _lz4(data: bytes | memoryview, name: str) -> bytes:
    """Unpack lz4's legacy frames, as the kernel's build packs them."""
    pieces = []
    at = total = 0
    while at + 4 <= len(data):
        (length,) = struct.unpack_from("<I", data, at)
        at += 4
        if length == _LZ4_MAGIC:
            continue
        if at + length > len(data):
            raise Damaged(f"{name}: an lz4 block of {length} bytes exceeds the file")
        block = bytes(data[at : at + length])
        pieces.append(lz4.block.decompress(block, uncompressed_size=_LZ4_BLOCK))
        at += length
        total += len(pieces[-1])
        if total > LIMIT:
            break
    return _bounded(pieces, name)


def _lzo(data: bytes | memoryview, name: str) -> bytes:
    raise Unsupported(f"{name} is packed by lzo; unpack it with lzop first")


_LZ4_MAGIC: Final = 0x184C2102
_CODECS: Final[list[tuple[bytes, Callable[[bytes | memoryview, str], bytes]]]] = [
    (b"\xfd7zXZ\0", _with(lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ))),
    (b"]\0\0", _with(lambda: lzma.LZMADecompressor(lzma.FORMAT_ALONE))),
    (b"\x28\xb5\x2f\xfd", _zstd),
    (b"\x1f\x8b", _with(lambda: _Gzip())),
    (b"BZh", _with(bz2.BZ2Decompressor)),
    (_LZ4_MAGIC.to_bytes(4, "little"), _lz4),
    (b"\x89LZO", _lzo),
]


class _Gzip:
    """A gzip stream behind the same two names as the other decompressors have."""

    def __init__(self) -> None:
        self._decoder = zlib.decompressobj(wbits=31)

    def decompress(self, data: bytes | memoryview, limit: int) -> bytes:
        return self._decoder.decompress(data, limit)

    @property
    def eof(self) -> bool:
        return self._decoder.eof
