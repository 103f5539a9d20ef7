"""The format of archives: POSIX pax, with all that a pool knows of a file.

Extended attributes are ``SCHILY.xattr.NAME`` headers and files with holes are stored as GNU tar's
sparse format 1.0 has it, so GNU tar and bsdtar can unpack them.  Headers of our own, which those
ignore:

VFSMAP.format     in the global header: 1
VFSMAP.sha256     of a regular file's data as it lies here, the map of a sparse file included
VFSMAP.align      the alignment hint of a file or a directory
VFSMAP.seal       the digest of a sealed file
VFSMAP.sealing    how it was hashed
VFSMAP.members    of the last member, which is the directory itself: how many there were before it

Source: pax in POSIX.1-2017; the others in GNU tar's manual, "Storing Sparse Files", and in its
``xattrs.c``, which writes ``%`` and ``=`` in a name as ``%25`` and ``%3D``.
"""

import hashlib
import tarfile
from collections.abc import Iterator
from typing import IO, Any, Final

from vfsmap.errors import Damaged
from vfsmap.units import MIB, align_up

FORMAT: Final = "VFSMAP.format"
SHA256: Final = "VFSMAP.sha256"
ALIGN: Final = "VFSMAP.align"
SEAL: Final = "VFSMAP.seal"
SEALING: Final = "VFSMAP.sealing"
MEMBERS: Final = "VFSMAP.members"
XATTR: Final = "SCHILY.xattr."
VERSION: Final = "1"
TIMES: Final = ("atime", "mtime")
VIRTUAL: Final = "user.vfsmap."
"""Attributes that have headers of their own."""
SEALING_XATTR: Final = "user.vfsmap.sealing"
EXTENTS_XATTR: Final = "user.vfsmap.extents"
BLOCK: Final = tarfile.BLOCKSIZE
END: Final = bytes(tarfile.RECORDSIZE)
ROOT: Final = "."
_PIECE: Final = 1 * MIB

Run = tuple[int, int]
"""Offset and length of data in a file."""


def seconds(nanoseconds: int) -> str:
    """Return a time as pax has it: a decimal number of seconds."""
    whole, part = divmod(abs(nanoseconds), 10**9)
    return f"{'-' if nanoseconds < 0 else ''}{whole}.{part:09d}"


def nanoseconds(text: str) -> int:
    """Return the time that a decimal number of seconds is.

    Raises:
        Damaged: it is no number.
    """
    whole, _, fraction = text.removeprefix("-").partition(".")
    if not (whole + fraction).isdigit():
        raise Damaged(f"{text!r} is no time")
    found = int(whole or "0") * 10**9 + int(fraction[:9].ljust(9, "0"))
    return -found if text.startswith("-") else found


def xattr_header(name: str) -> str:
    """Return the header of an extended attribute."""
    return XATTR + name.replace("%", "%25").replace("=", "%3D")


def xattr_name(header: str) -> str:
    """Return the extended attribute that a header holds."""
    return header.removeprefix(XATTR).replace("%3D", "=").replace("%25", "%")


def content_of(tar: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    """Return a regular member's file; it can be asked to go forward also where a pipe is read."""
    buffered: Any = tar.extractfile(info)
    raw: IO[bytes] = buffered.raw  # the buffer asks whether what is below can seek, and it can
    return raw


def data_runs(info: tarfile.TarInfo) -> list[Run]:
    """Return where a member's file has data."""
    sparse: Any = info.sparse  # a list, whatever typeshed says
    runs: list[Run] = sparse if sparse is not None else [(0, info.size)]
    return [(offset, length) for offset, length in runs if length]


def sparse_map(runs: list[Run], size: int) -> bytes:
    """Return what the data of a file with holes begins with."""
    listed = [*runs, (size, 0)]  # which tells how long the file is
    lines = [str(len(listed)), *(str(number) for run in listed for number in run)]
    text = "\n".join(lines).encode() + b"\n"
    return text.ljust(align_up(len(text), BLOCK), b"\0")


def pieces(file: IO[bytes], offset: int, length: int) -> Iterator[bytes]:
    """Yield the bytes of a run; fewer, where the file is shorter."""
    file.seek(offset)
    while length > 0 and (piece := file.read(min(length, _PIECE))):
        yield piece
        length -= len(piece)


def start_digest(runs: list[Run], size: int) -> "hashlib._Hash":
    """Return the digest of what precedes the runs of a file."""
    return hashlib.sha256(sparse_map(runs, size) if is_sparse(runs, size) else b"")


def digest_of(file: IO[bytes], runs: list[Run], size: int) -> str:
    """Return the digest of a file with data in these runs."""
    digest = start_digest(runs, size)
    for offset, length in runs:
        for piece in pieces(file, offset, length):
            digest.update(piece)
    return digest.hexdigest()


def is_sparse(runs: list[Run], size: int) -> bool:
    """Tell whether a file has holes."""
    return bool(size) and runs != [(0, size)]
