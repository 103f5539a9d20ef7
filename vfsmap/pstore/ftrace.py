"""Function trace records: decode, merge the CPUs' zones, and show them as text.

0   u64  ip         the function that was called
8   u64  parent_ip  where from
16  u64  ts         a counter << 8 | CPU (on x86-64; not a time)
"""

import struct
from collections.abc import Iterable
from typing import Final, NamedTuple

from vfsmap.pstore.kallsyms import Symbols

_RECORD: Final = struct.Struct("<QQQ")


class Call(NamedTuple):
    """One traced call."""

    ip: int
    parent: int
    stamp: int

    @property
    def cpu(self) -> int:
        """Which CPU traced it."""
        return self.stamp & 0xFF

    @property
    def counter(self) -> int:
        """The trace's counter."""
        return self.stamp >> 8


def parse_calls(log: bytes) -> list[Call]:
    """Return the calls in one zone's content; a record cut by the ring's end is left out."""
    return list(map(Call._make, _RECORD.iter_unpack(log[len(log) % _RECORD.size :])))


def pack_calls(calls: Iterable[Call]) -> bytes:
    """Return calls as they lie in a zone."""
    return b"".join(_RECORD.pack(*call) for call in calls)


def merge(logs: Iterable[list[Call]]) -> list[Call]:
    """Return the calls of all zones in the kernel's order.

    Zones are merged one after the other into what there is; of two equal counts the later zone's
    call comes first.  Zones need not be sorted, and what is not sorted stays so.
    """
    merged: list[Call] = []
    for log in logs:
        merged = _merge_two(merged, log)
    return merged


def _merge_two(old: list[Call], new: list[Call]) -> list[Call]:
    if not old or not new:
        return old or new
    merged, i, j = [], 0, 0
    while i < len(old) and j < len(new):
        if old[i].stamp >> 8 < new[j].stamp >> 8:
            merged.append(old[i])
            i += 1
        else:
            merged.append(new[j])
            j += 1
    return merged + old[i:] + new[j:]


def format_calls(calls: Iterable[Call], symbols: Symbols | None = None) -> bytes:
    """Return the lines that the kernel shows for ``calls``; addresses where no symbol is known."""
    symbols = symbols or Symbols([])
    name, place = symbols.format_name, symbols.format_place
    return "".join(
        f"CPU:{call.cpu} ts:{call.counter} {call.ip:08x}  {call.parent:08x}"
        f"  {name(call.ip)} <- {place(call.parent)}\n"
        for call in calls
    ).encode()
