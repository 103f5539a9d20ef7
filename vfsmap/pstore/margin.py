"""What vfsmap keeps in a region beside the kernel's format: the ledger and the sessions.

It lies in the margin, the last 1024 bytes (rounded down to whole ECC blocks) of the data of each
dmesg zone, where the kernel finds a record only if it fills the zone.  To the kernel these bytes
are what any bytes past a zone's size are: nothing.  Where a kernel did fill a zone, the margin
there is lost, and the copies in the other zones serve.

    0     128  ledger, slot of even serials
    128   128  ledger, slot of odd serials
    256   768  12 sessions of 64 bytes

Everything here is little-endian and carries a CRC-32 of what follows it in its slot.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final, NamedTuple, Self

from vfsmap.errors import Invalid
from vfsmap.pstore.ecc import BLOCK
from vfsmap.pstore.geometry import HEADER, ORDERS, Geometry
from vfsmap.pstore.zone import Zone

SIZE: Final = 1024
SESSIONS: Final = 12
"""Sessions in one margin."""

_LEAST: Final = 4000  # a zone that holds less than this would give too much of itself
_SLOT: Final = 128
_MAGIC: Final = b"vfsmapL1"
# serial, counter, policy, order, overwritten, refused, mark size, mark crc, geometry
_LEDGER: Final = struct.Struct("<QIHHQQII5I2H")
_CHECKED: Final = len(_MAGIC) + 4
_SESSION_MAGIC: Final = b"vfsS"
_SESSION: Final = struct.Struct("<IIQQ16s16s")


class Mark(NamedTuple):
    """Names the record that was read in a zone; any other record there is unread."""

    size: int
    crc: int


NO_MARK: Final = Mark(0, 0)


@dataclass(frozen=True)
class Ledger:
    """What a region remembers from one run to the next."""

    geometry: Geometry
    serial: int = 0
    """Grows with each store; of several copies the highest counts."""
    counter: int = 0
    """Dmesg records written since the region was formatted: the n of ``Oops#n``."""
    overwrite: bool = False
    """Whether the oldest unread record makes room when there is no other; else the new one is
    refused."""
    overwritten: int = 0
    """Records that were overwritten unread."""
    refused: int = 0
    """Records that found no room."""

    def pack(self, mark: Mark) -> bytes:
        """Return a slot's bytes."""
        g = self.geometry
        sizes = (g.size, g.record, g.console, g.pmsg, g.ftrace, g.ecc, g.cpus)
        order = ORDERS.index(g.order)
        fields = _LEDGER.pack(
            self.serial,
            self.counter,
            self.overwrite,
            order,
            self.overwritten,
            self.refused,
            *mark,
            *sizes,
        )
        return (_MAGIC + _sum(fields) + fields).ljust(_SLOT, b"\0")

    @classmethod
    def unpack(cls, slot: bytes) -> tuple[Self, Mark] | None:
        """Return what a slot holds; None: nothing whole."""
        fields = slot[_CHECKED : _CHECKED + _LEDGER.size]
        if not slot.startswith(_MAGIC) or slot[len(_MAGIC) : _CHECKED] != _sum(fields):
            return None
        serial, counter, policy, order, overwritten, refused, *rest = _LEDGER.unpack(fields)
        mark, (size, record, console, pmsg, ftrace, ecc, cpus) = Mark(*rest[:2]), rest[2:]
        try:
            geometry = Geometry(size, record, console, pmsg, ftrace, ecc, cpus, ORDERS[order])
        except (Invalid, IndexError):
            return None
        ledger = cls(geometry, serial, counter, bool(policy), overwritten, refused)
        return ledger, mark


class Session(NamedTuple):
    """A program that wants its end recorded when it is not able to say goodbye."""

    pid: int
    start: int
    """Clock ticks from boot to the start of the process; with the pid, names it for good."""
    namespace: int
    """Inode of the PID namespace."""
    boot: bytes
    """The kernel's boot id."""
    name: str

    def pack(self) -> bytes:
        """Return a slot's bytes."""
        name = self.name.encode(errors="replace")[:16]
        fields = _SESSION.pack(self.pid, 0, self.start, self.namespace, self.boot, name)
        return _SESSION_MAGIC + _sum(fields) + fields

    @classmethod
    def unpack(cls, slot: bytes) -> Self | None:
        """Return what a slot holds; None: nothing whole."""
        fields = slot[8 : 8 + _SESSION.size]
        if not slot.startswith(_SESSION_MAGIC) or slot[4:8] != _sum(fields):
            return None
        pid, _, start, namespace, boot, name = _SESSION.unpack(fields)
        return cls(pid, start, namespace, boot, name.rstrip(b"\0").decode(errors="replace"))


_SESSION_SLOT: Final = 8 + _SESSION.size
assert 2 * _SLOT + SESSIONS * _SESSION_SLOT == SIZE
assert _CHECKED + _LEDGER.size <= _SLOT


def _sum(fields: bytes) -> bytes:
    return zlib.crc32(fields).to_bytes(4, "little")


def record_room(capacity: int) -> int:
    """Return how many bytes of a dmesg zone are for the record."""
    return (capacity - SIZE) // BLOCK * BLOCK if capacity >= _LEAST else capacity


class Margin:
    """The margin of one dmesg zone."""

    def __init__(self, zone: Zone) -> None:
        self._zone = zone
        self._base = record_room(zone.capacity)

    @property
    def usable(self) -> bool:
        """Whether there is a margin, and certainly no record that reaches into it."""
        zone = self._zone
        return self._base < zone.capacity and zone.valid and zone.size <= self._base

    def read_ledger(self) -> tuple[Ledger, Mark] | None:
        """Return the newer of the two slots; None: there is none."""
        slots = (Ledger.unpack(self._slot(number)) for number in (0, 1)) if self.usable else ()
        return max(filter(None, slots), key=lambda found: found[0].serial, default=None)

    def write_ledger(self, ledger: Ledger, mark: Mark) -> None:
        """Store a ledger over the older slot, if there is room for it.

        Crash: the newer slot is whole, so this margin holds what it held before.
        """
        if self.usable:
            at = self._base + ledger.serial % 2 * _SLOT
            self._zone.poke(at, ledger.pack(mark))

    def read_sessions(self) -> Iterator[tuple[int, Session | None]]:
        """Yield each slot's number and session."""
        base = self._base + 2 * _SLOT
        for number in range(SESSIONS if self.usable else 0):
            at = base + number * _SESSION_SLOT
            yield number, Session.unpack(bytes(self._zone.data[at : at + _SESSION_SLOT]))

    def write_session(self, number: int, session: Session | None) -> None:
        """Store or clear a session.

        Crash: a torn slot is an empty one.
        """
        at = self._base + 2 * _SLOT + number * _SESSION_SLOT
        self._zone.poke(at, session.pack() if session else bytes(_SESSION_SLOT))

    def _slot(self, number: int) -> bytes:
        at = self._base + number * _SLOT
        return bytes(self._zone.data[at : at + _SLOT])


def find_geometry(view: memoryview) -> Geometry | None:
    """Return the geometry that a region's newest ledger tells, without knowing it beforehand."""
    best: Ledger | None = None
    for match in re.finditer(_MAGIC, view):
        at = match.start()
        found = Ledger.unpack(bytes(view[at : at + _SLOT]))
        if found and (best is None or found[0].serial > best.serial):
            ledger, _ = found
            if len(view) >= ledger.geometry.size and _is_margin(at, ledger.geometry):
                best = ledger
    return best.geometry if best else None


def _is_margin(at: int, geometry: Geometry) -> bool:
    """Tell whether a ledger slot of such a region can lie at ``at``."""
    place = geometry.places[0]
    if place.kind != "dmesg":
        return False
    zone = Zone(place, memoryview(bytes(place.size)), geometry.ecc)
    offset = at % place.size - HEADER - record_room(zone.capacity)
    return offset in (0, _SLOT)


def renew(ledger: Ledger, **changes: int) -> Ledger:
    """Return the ledger that follows ``ledger``."""
    # of several types
    return replace(ledger, serial=ledger.serial + 1, **changes)  # type: ignore[arg-type]
