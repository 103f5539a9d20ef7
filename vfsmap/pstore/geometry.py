"""Where the zones of a ramoops region lie: pure arithmetic over its parameters.

Parameters as the kernel module takes them; the rules are those of Linux fs/pstore/ram.c, checked
against the zones that kernels 6.1 and 6.12 made.  See docs/format-pstore.md.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal, NamedTuple

from vfsmap.errors import Invalid
from vfsmap.pstore.ecc import BLOCK, MAX_PARITY
from vfsmap.units import KIB, format_size

Order = Literal["6.1", "6.12"]
"""Which kernel's order the zones after the console follow: ``6.1`` and before, ``6.12`` and later
(the change came with 6.2)."""
Kind = Literal["dmesg", "console", "ftrace", "pmsg"]

ORDERS: Final[tuple[Order, ...]] = ("6.1", "6.12")
HEADER: Final = 12
"""Bytes of a zone's header."""
MAX_REGION: Final = 1 << 31
"""Bytes; the kernel keeps sizes and positions in 32 bits."""
MAX_ZONES: Final = 1 << 16
_MAX_CPUS: Final = 8192  # CONFIG_NR_CPUS with MAXSMP


class Place(NamedTuple):
    """Where one zone lies."""

    kind: Kind
    number: int
    """Which of its kind, from 0."""
    offset: int
    """Bytes from the start of the region; can be odd."""
    size: int
    """Bytes, with header and parity."""


class Group(NamedTuple):
    """The zones of one kind; they lie one after the other."""

    kind: Kind
    zones: int
    offset: int
    """Of the first, bytes from the start of the region."""
    size: int
    """Bytes of each."""


def round_down(size: int) -> int:
    """Return the largest power of two that is at most ``size``; 0 stays 0."""
    return 1 << (size.bit_length() - 1) if size else 0


@dataclass(frozen=True)
class Geometry:
    """The parameters of a region, rounded as the kernel rounds them.

    Raises:
        Invalid: the kernel would refuse them, or no zone could hold a byte.
    """

    size: int
    """Bytes of the whole region."""
    record: int = 128 * KIB
    """Bytes of a dmesg zone, at least: what is left over is spread over them.  0: none."""
    console: int = 128 * KIB
    pmsg: int = 128 * KIB
    ftrace: int = 0
    """Bytes of all ftrace zones together; each CPU has one."""
    ecc: int = 0
    """Parity bytes for each 128 bytes; 0: none.  1 means 16, as for the kernel."""
    cpus: int = 1
    """Possible CPUs of the machine that records."""
    order: Order = "6.12"

    def __post_init__(self) -> None:
        for name in ("size", "record", "console", "pmsg", "ftrace"):
            value = getattr(self, name)
            if not 0 <= value <= MAX_REGION:
                raise Invalid(f"{name} size {value} is not in 0 to {format_size(MAX_REGION)}")
            if name != "size":
                object.__setattr__(self, name, round_down(value))
        if self.ecc == 1:
            object.__setattr__(self, "ecc", 16)
        if self.ecc and not 2 <= self.ecc <= MAX_PARITY:
            raise Invalid(f"ecc {self.ecc} is not 0 (none), 1 (means 16) or 2 to {MAX_PARITY}")
        if not 1 <= self.cpus <= _MAX_CPUS:
            raise Invalid(f"{self.cpus} CPUs are not possible; use 1 to {_MAX_CPUS}")
        if self.order not in ORDERS:
            raise Invalid(f"order {self.order!r} is not known; use 6.1 or 6.12")
        self._require_room()

    def _require_room(self) -> None:
        fixed = self.console + self.pmsg + self.ftrace
        if self.dump < 0 or (self.record and self.dump < self.record):
            wanted = f"{self.record:#x} for one record and {fixed:#x} for console, pmsg and ftrace"
            raise Invalid(f"a region of {self.size:#x} bytes has no room for {wanted}")
        if not self.record + fixed:
            raise Invalid("every zone size is 0; give record, console, pmsg or ftrace a size")
        if self.records > MAX_ZONES:
            raise Invalid(f"{self.records} records are more than {MAX_ZONES}; use larger ones")
        for group in self.groups:
            capacity(group.size, self.ecc)

    @property
    def dump(self) -> int:
        """Bytes left for dmesg zones."""
        return self.size - self.console - self.pmsg - self.ftrace

    @property
    def records(self) -> int:
        """Number of dmesg zones."""
        return self.dump // self.record if self.record else 0

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The zones of each kind, in the order they lie in the region."""
        return tuple(self._lay_out())

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """Every zone, in the order they lie in the region."""
        return tuple(
            Place(group.kind, number, group.offset + number * group.size, group.size)
            for group in self.groups
            for number in range(group.zones)
        )

    def _lay_out(self) -> Iterator[Group]:
        kinds: list[tuple[Kind, int, int]] = [
            ("dmesg", self.records, self.dump),
            ("console", 1, self.console),
            ("ftrace", self.cpus, self.ftrace),
            ("pmsg", 1, self.pmsg),
        ]
        if self.order == "6.12":
            kinds[2:] = reversed(kinds[2:])
        offset = 0
        for kind, count, total in kinds:
            if count and total:
                size = total // count & ~1
                yield Group(kind, count, offset, size)
                offset += count * size


def capacity(zone_size: int, ecc: int) -> int:
    """Return how many bytes of content a zone holds.

    Raises:
        Invalid: none, the header and the parity fill it.
    """
    room = zone_size - HEADER
    if ecc:
        blocks = -((ecc - room) // (BLOCK + ecc))
        room -= (blocks + 1) * ecc
    if room <= 0:
        raise Invalid(f"a zone of {zone_size:#x} bytes has no room for content with ecc {ecc}")
    return room
