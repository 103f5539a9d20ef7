"""The dmesg zones of a region as a shelf of crash records: what is read, what may go, what is next.

A new record takes an empty zone, else that of the oldest record that was read; when all are unread
the region's policy says whether the oldest goes or the new one is refused.  Either is counted.
All of it happens under the region's lock.
"""

import time
import zlib
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from vfsmap.errors import Damaged, Invalid, NoSpace, NotFound
from vfsmap.pstore.compress import inflate
from vfsmap.pstore.geometry import Geometry
from vfsmap.pstore.margin import NO_MARK, Ledger, Margin, Mark, record_room, renew
from vfsmap.pstore.record import (
    Compression,
    Header,
    Reason,
    make_body,
    make_header,
    parse_header,
    parse_title,
    readable_limit,
    writable_limit,
)
from vfsmap.pstore.zone import Zone

_LEAST_TEXT: Final = 64  # bytes: a record that could not even hold its title is not worth a zone


class Entry(NamedTuple):
    """A record on the shelf."""

    number: int
    """Which zone, and which dmesg-ramoops file."""
    header: Header
    mark: Mark
    """Names the record."""
    read: bool


class Shelf:
    """The dmesg zones of one region."""

    def __init__(
        self, geometry: Geometry, zones: Sequence[Zone], persist: Callable[[], None]
    ) -> None:
        self._geometry = geometry
        self._zones = zones
        self.margins = [Margin(zone) for zone in zones]
        self._persist = persist

    @property
    def ledger(self) -> Ledger:
        """The newest ledger; of a region without one, what a look at the records tells."""
        newest = self._find_ledger()
        if newest is None:
            counter = max(map(self._count, self._zones), default=0)
            newest = Ledger(self._geometry, counter=counter)
        return newest

    def _find_ledger(self) -> Ledger | None:
        found = [margin.read_ledger() for margin in self.margins]
        ledgers = [pair[0] for pair in found if pair and pair[0].geometry == self._geometry]
        return max(ledgers, key=lambda ledger: ledger.serial, default=None)

    def entries(self) -> list[Entry]:
        """Return the records, oldest first."""
        entries = []
        for number, zone in enumerate(self._zones):
            log = zone.recall().data
            header = parse_header(log)
            if header:
                mark = Mark(len(log), zlib.crc32(log))
                entries.append(Entry(number, header, mark, mark == self._mark(number)))
        return sorted(entries, key=lambda entry: (entry.header.time_ns, entry.number))

    def put(self, reason: Reason, log: bytes, compression: Compression = "deflate") -> int:
        """Store a record with the end of ``log``; return the number of its zone.

        Raises:
            NoSpace: every zone holds an unread record, and the policy is to keep them.
            NotFound: the region has no dmesg zones.
            Damaged: what is there in their place are no such zones.
            Invalid: they are too small for any record.

        Crash: the new record whole or absent; the record it replaces, if any, may be gone already.
        """
        if not self._zones:
            raise NotFound("the region has no dmesg zones; format it with a record size")
        for zone in self._zones:
            zone.mend_header()
        number, unread = self._choose()
        zone = self._zones[number]
        now = time.time_ns()
        room = record_room(zone.capacity) - len(make_header(now, compressed=True))
        if room < _LEAST_TEXT:
            raise Invalid(f"dmesg zones of {zone.place.size} bytes are too small for a record")
        ledger = self.ledger
        counter = ledger.counter + 1
        title = f"{reason}#{counter} Part1\n".encode()
        body, packed = make_body(title, log, room, writable_limit(zone.capacity), compression)
        record = make_header(now, compressed=packed) + body

        # first, so that a number is never used twice
        ledger = renew(ledger, counter=counter, overwritten=ledger.overwritten + unread)
        self._store(ledger)
        zone.zap()
        zone.poke(0, record)
        self.margins[number].write_ledger(ledger, NO_MARK)
        self._persist()
        zone.publish(len(record))  # the commit point
        self._persist()
        return number

    def mark_read(self, seen: Callable[[Entry], bool]) -> None:
        """Note that the records that were seen are read, so that new ones may take their place.

        Nothing is noted of a record that fills its zone (a kernel's; ours leave the margin free),
        and nothing at all in a region without a ledger: there only kernels have written, and a
        look at it changes no byte.

        Crash: noted or not.
        """
        ledger = self._find_ledger()
        read = [e for e in self.entries() if not e.read and seen(e)]
        if ledger and read:
            self._store(renew(ledger), {entry.number: entry.mark for entry in read})

    def set_policy(self, *, overwrite: bool) -> None:
        """Say what happens when all records are unread.

        Crash: the old policy or the new one.
        """
        self._store(renew(self.ledger, overwrite=overwrite))

    def _choose(self) -> tuple[int, bool]:
        """Return the zone that the next record goes to, and whether that loses an unread one."""
        entries = self.entries()
        taken = {entry.number for entry in entries}
        for number, zone in enumerate(self._zones):
            if zone.signed and number not in taken:
                return number, False
        if not entries:
            raise Damaged("no dmesg zone has a signature of one; format the region")
        for entry in entries:
            if entry.read:
                return entry.number, False
        ledger = self.ledger
        if ledger.overwrite:
            return entries[0].number, True
        self._store(renew(ledger, refused=ledger.refused + 1))
        raise NoSpace(
            f"all {len(entries)} crash records are unread; read or erase one, or let the oldest go"
            " (policy overwrite)"
        )

    def _store(self, ledger: Ledger, marks: dict[int, Mark] | None = None) -> None:
        for number, margin in enumerate(self.margins):
            margin.write_ledger(ledger, (marks or {}).get(number, self._mark(number)))

    def _mark(self, number: int) -> Mark:
        found = self.margins[number].read_ledger()
        return found[1] if found else NO_MARK

    def _count(self, zone: Zone) -> int:
        """Return the number in a record's title, 0 when there is none."""
        log = zone.recall().data
        header = parse_header(log)
        if header is None:
            return 0
        body = log[header.length :]
        text = (
            inflate(body, readable_limit(zone.capacity, self._geometry.order))
            if header.compressed
            else body
        )
        title = parse_title(text or b"")
        return title.number if title else 0
