"""Every byte of a pool, as little-endian structures.

``docs/format.md`` is the same in prose; a test compares the two.

```
0x0000  superblock, first copy
0x1000  superblock, second copy
0x2000  log halves and extents, wherever the allocator put them
```

A log half is a row of batches, each 8-byte aligned and right behind the one before.  A batch is a
:class:`BatchHeader` and its records.  A record is a :class:`RecordHeader` and a payload padded with
zeros to 8 bytes: either the new content of an object, or (tag 0, no payload) its end.  Replaying
the records of a half in order gives all objects.
"""

import ctypes
import struct
from ctypes import c_int64, c_uint8, c_uint16, c_uint32, c_uint64
from typing import Any, ClassVar, Final

from vfsmap.errors import PoolDamaged
from vfsmap.units import KIB

BLOCK: Final = 4 * KIB
"""The smallest extent, and the room for one copy of the superblock."""
SUPERBLOCKS: Final = (0, BLOCK)
"""Where the two copies of the superblock lie."""
FIRST_FREE: Final = 2 * BLOCK
"""The first byte that the allocator may hand out."""
MAGIC: Final = b"vfsmap\r\n"
VERSION: Final = 1
BATCH_MAGIC: Final = 0x54414256
"""``VBAT`` as bytes."""


class Structure(ctypes.LittleEndianStructure):
    """A layout; knows the :class:`struct.Struct` that packs the same bytes."""

    _pack_ = 1


class Half(Structure):
    """Where one half of the log lies."""

    _fields_: ClassVar = [("start", c_uint64), ("length", c_uint64)]


class Superblock(Structure):
    """The pool's first words; two copies, and the valid one of the higher epoch holds."""

    _fields_: ClassVar = [
        ("magic", c_uint8 * 8),
        ("version", c_uint32),
        ("features", c_uint32),  # bits a reader must know; none is defined yet
        ("uuid", c_uint8 * 16),
        ("label", c_uint8 * 64),  # UTF-8, zero padded
        ("size", c_uint64),  # bytes of the pool; the file may be longer
        ("epoch", c_uint64),  # grows by 1 with each superblock written
        ("generation", c_uint64),  # of the batches in the active half; drawn at random
        ("halves", Half * 2),
        ("active", c_uint32),  # 0 or 1
        ("align", c_uint32),  # log2 of the largest unit that extents are laid out for
        ("created_ns", c_uint64),  # since 1970, UTC
        ("batches", c_uint64),  # of the active half that were durable when this was written
        ("reserved", c_uint8 * 64),  # zero
        ("checksum", c_uint32),  # CRC-32 of all bytes before it
        ("padding", c_uint32),  # zero
    ]


class BatchHeader(Structure):
    """What makes a row of records one transaction."""

    _fields_: ClassVar = [
        ("magic", c_uint32),
        ("checksum", c_uint32),  # CRC-32, started with the uuid's, of the batch with 0 here
        ("generation", c_uint64),  # as in the superblock: tells from what the half held before
        ("sequence", c_uint64),  # 0 for the first batch of a half, then 1, 2, ...
        ("length", c_uint64),  # bytes of header and records
        ("next_oid", c_uint64),  # no object has had this number or a larger one
    ]


class RecordHeader(Structure):
    """What a record is about."""

    _fields_: ClassVar = [
        ("length", c_uint32),  # bytes of header, payload and padding
        ("tag", c_uint32),  # what the payload is; 0: the object is gone
        ("oid", c_uint64),
    ]


class Root(Structure):
    """Object 0: which object is the root of the pool."""

    TAG = 1
    _fields_: ClassVar = [("oid", c_uint64)]


class ExtentRecord(Structure):
    """A run of pool bytes that belongs to an object."""

    TAG = 2
    _fields_: ClassVar = [
        ("owner", c_uint64),  # inode number; 0 for the arenas of Transaction.allocate
        ("offset", c_uint64),  # where it starts in the file
        ("start", c_uint64),  # where it starts in the pool
        ("length", c_uint64),  # bytes, a multiple of 4096
    ]


class TreeExtentRecord(Structure):
    """A run of pool bytes that holds part of a sealed file's Merkle tree."""

    TAG = 3
    _fields_: ClassVar = ExtentRecord._fields_


class InodeRecord(Structure):
    """A file of any kind; its object number is the inode number."""

    TAG = 16
    _fields_: ClassVar = [
        ("mode", c_uint32),  # st_mode
        ("nlink", c_uint32),  # 0: unlinked, and gone once nobody has it open
        ("uid", c_uint32),
        ("gid", c_uint32),
        ("rdev", c_uint32),  # device nodes only, as the kernel's new_encode_dev() has it
        ("flags", c_uint32),  # bit 0: sealed; bits 8-15: log2 of the alignment hint, 0 for none
        ("size", c_uint64),
        ("atime_ns", c_int64),  # since 1970, UTC; so are the next three
        ("mtime_ns", c_int64),
        ("ctime_ns", c_int64),
        ("btime_ns", c_int64),
    ]


class DirentRecord(Structure):
    """A name; the name's bytes follow the fields."""

    TAG = 17
    _fields_: ClassVar = [
        ("parent", c_uint64),
        ("ino", c_uint64),
        ("name_length", c_uint16),
        ("kind", c_uint8),  # the file's type: st_mode >> 12
    ]


class SymlinkRecord(Structure):
    """A symbolic link's target, whose bytes follow the fields."""

    TAG = 18
    _fields_: ClassVar = [("ino", c_uint64), ("target_length", c_uint16)]


class XattrRecord(Structure):
    """An extended attribute; the name's bytes, then the value's, follow the fields."""

    TAG = 19
    _fields_: ClassVar = [
        ("ino", c_uint64),
        ("value_length", c_uint32),
        ("name_length", c_uint16),
    ]


class SealRecord(Structure):
    """A sealed file's digest: its fs-verity descriptor."""

    TAG = 20
    _fields_: ClassVar = [("ino", c_uint64), ("descriptor", c_uint8 * 256)]


SPACE: Final = (ExtentRecord.TAG, TreeExtentRecord.TAG)
"""Tags whose payload names pool bytes that are in use."""
USER_TAG: Final = 1 << 31
"""Set in the tags of typed objects that programs define."""

_CODES: Final[dict[Any, str]] = {
    c_uint8: "B",
    c_uint16: "H",
    c_uint32: "I",
    c_uint64: "Q",
    c_int64: "q",
}


def packer(layout: type[Structure]) -> struct.Struct:
    """Return the struct that packs the fields of ``layout``; arrays of bytes are one ``s`` each."""
    codes = []
    for _name, kind, *_bits in layout._fields_:
        codes.append(_CODES.get(kind) or f"{ctypes.sizeof(kind)}s")
    return struct.Struct("<" + "".join(codes))


def record_packer(layout: type[Structure], *, padded: bool = True) -> struct.Struct:
    """Return the struct that packs a whole record: its header, fields and, if wanted, padding."""
    fields = packer(RecordHeader).format + packer(layout).format[1:]
    padding = -struct.calcsize(fields) % 8
    return struct.Struct(f"{fields}{padding}x" if padded and padding else fields)


BATCH: Final = packer(BatchHeader)
RECORD: Final = packer(RecordHeader)
EXTENT: Final = packer(ExtentRecord)


class WholeRecord:
    """A ``with`` block that unpacks a record.

    Raises:
        PoolDamaged: it is shorter than its fields.
    """

    __slots__ = ("_what",)

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, exc: BaseException | None, __: object) -> None:
        if isinstance(exc, struct.error):
            raise PoolDamaged(
                f"the record of {self._what} is too short; run: vfsmap check"
            ) from exc


def record(oid: int, tag: int, payload: bytes) -> bytes:
    """Return the record that gives object ``oid`` its new content."""
    length = RECORD.size + len(payload)
    padding = -length % 8
    return RECORD.pack(length + padding, tag, oid) + payload + bytes(padding)


def end_record(oid: int) -> bytes:
    """Return the record that ends object ``oid``."""
    return RECORD.pack(RECORD.size, 0, oid)
