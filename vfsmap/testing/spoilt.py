"""Regions with records of every kind, torn and spoilt in every way that comes to mind."""

import random
import zlib
from typing import Final

from vfsmap.pstore import Geometry, format_region
from vfsmap.pstore.compress import deflate
from vfsmap.pstore.geometry import HEADER, Place
from vfsmap.pstore.zone import Zone

_ODD_HEADERS: Final = (
    b"====-5.000001-D\n",
    b"==== 7. 3-D\n",
    b"====+1.2-D\n",
    b"====1.-D\n",
    b"====.5-D\n",
    b"====1.5-C",
    b"====99999999999.1-D\n",
    b"====1.9999999-X\n",
    b"====1.5\t\n \xa0",
    b"====1.5-\nx",
    b"====1.5--D\n",
    b"====1.5-D\n\n \n",
    b"",
)
_WORDS: Final = (0, 1, HEADER, 0x80, 0xFFFF, 1 << 31, (1 << 32) - 1)
_LENGTHS: Final = (1, 4, 24, 128, 4096)
_CUTS: Final = (0, 1, 11, HEADER, 100, 0x2000, 0xFFFF)
_INFLATED: Final = (9000, 12000, 13000, 16000, 20000, 24400, 24600, 30000, 60000)


def spoil_region(geometry: Geometry, chance: random.Random) -> bytes:
    """Return a region with something in every zone, and damage to some of them."""
    region = bytearray(geometry.size)
    format_region(region, geometry)
    for place in geometry.places:
        view = memoryview(region)[place.offset : place.offset + place.size]
        zone = Zone(place, view, geometry.ecc)
        if place.kind == "dmesg":
            if chance.random() < 0.1:  # the record begins somewhere in the ring
                zone.write(chance.randbytes(chance.randrange(zone.capacity)))
            else:
                zone.zap()
            zone.write(_make_record(chance)[: zone.capacity])
        else:
            for _ in range(chance.randrange(5)):
                zone.write(chance.randbytes(chance.choice((0, 1, 10, 128, 1000, zone.capacity))))
        _damage(view, zone.capacity, chance)
    return bytes(region)


def mutate_region(region: bytes, geometry: Geometry, chance: random.Random) -> bytearray:
    """Return a copy of a region with one to eight changes, most of them where it has structure."""
    mutant = bytearray(region)
    for _ in range(chance.randrange(1, 9)):
        _mutate(mutant, chance.choice(geometry.places), geometry.size, chance)
    if chance.random() < 0.1:
        del mutant[chance.choice((*_CUTS, chance.randrange(len(mutant)))) :]
    elif chance.random() < 0.1:
        mutant += chance.randbytes(chance.choice(_LENGTHS))
    return mutant


def _mutate(mutant: bytearray, place: Place, size: int, chance: random.Random) -> None:
    """Change something about one zone, or somewhere."""
    head, end = place.offset, place.offset + place.size
    at, length = chance.randrange(size), chance.choice(_LENGTHS)
    kind = chance.randrange(9)
    if kind == 0:  # signature, start or size
        words = (*_WORDS, place.size, place.size - HEADER, chance.getrandbits(32))
        word = head + 4 * chance.randrange(3)
        mutant[word : word + 4] = chance.choice(words).to_bytes(4, "little")
    elif kind == 1:  # bits of the header
        mutant[head + chance.randrange(HEADER)] ^= 1 << chance.randrange(8)
    elif kind == 2:  # bits of the text header, or of a record's first bytes
        mutant[min(head + HEADER + chance.randrange(64), end - 1)] ^= 1 << chance.randrange(8)
    elif kind == 3:  # another text header
        odd = chance.choice(_ODD_HEADERS)
        mutant[head + HEADER : head + HEADER + len(odd)] = odd
    elif kind == 4:  # bytes at the end: parity, or the ring's last
        for _ in range(chance.choice((1, 8, 9, 40))):
            mutant[end - 1 - chance.randrange(min(64, place.size))] = chance.randrange(256)
    elif kind == 5:  # bytes anywhere
        for _ in range(chance.choice((1, 9, 100))):
            mutant[chance.randrange(size)] = chance.randrange(256)
    elif kind == 6:  # a run of garbage or of nothing
        run = chance.choice((chance.randbytes(length), bytes(length), b"\xff" * length))
        mutant[at : at + length] = run[: size - at]
    else:  # a piece of one place in another: heads among the data, data among the heads
        source, target = (chance.choice((at, head, chance.randrange(size))) for _ in range(2))
        piece = mutant[source : source + length][: size - target]
        mutant[target : target + len(piece)] = piece


def _make_record(chance: random.Random) -> bytes:
    text = b"Oops#%d Part1\n" % chance.randrange(9) + b"".join(
        b"<6>[%5d.0] %s\n" % (n, chance.randbytes(4).hex().encode() * chance.randrange(8))
        for n in range(chance.randrange(1, 120))
    )
    stamp = b"====%d.%06d" % (chance.randrange(2 * 10**9), chance.randrange(10**6))
    packed = deflate(text)
    level, window = chance.randrange(10), chance.randrange(9, 16)
    other = zlib.compressobj(level, zlib.DEFLATED, -window)
    long = deflate(b"Panic#1 Part1\n" + bytes(chance.choice(_INFLATED)))
    records = (
        stamp + b"-C\n" + packed,
        stamp + b"-D\n" + text,
        stamp + b"\n" + text,
        stamp + b"-C\n" + packed[: chance.randrange(1, len(packed))],
        stamp + b"-C\n" + packed + chance.randbytes(chance.randrange(40)),
        stamp + b"-C\n" + chance.randbytes(chance.randrange(20, 300)),
        stamp + b"-C\n" + long,
        stamp + b"-C\n" + other.compress(text) + other.flush(),
        chance.choice(_ODD_HEADERS) + text,
        chance.choice(_ODD_HEADERS) + text,
    )
    return chance.choice(records)


def _damage(zone: memoryview, capacity: int, chance: random.Random) -> None:
    kind = chance.random()
    if kind < 0.12:  # flipped bits in the header
        for _ in range(chance.randrange(1, 4)):
            zone[chance.randrange(12)] ^= 1 << chance.randrange(8)
    elif kind < 0.2:  # a header that no kernel wrote
        heads = ((0, 9), (7, 900), (capacity, capacity), (capacity, capacity + 1), (2**32 - 1,) * 2)
        start, size = chance.choice(heads)
        zone[4:12] = start.to_bytes(4, "little") + size.to_bytes(4, "little")
    elif kind < 0.5:  # flipped bytes anywhere
        for _ in range(chance.choice((1, 5, 20, 200))):
            zone[chance.randrange(len(zone))] ^= chance.randrange(1, 256)
