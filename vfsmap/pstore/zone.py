"""One persistent_ram zone: a header, a ring of bytes and, with ECC, their parity.

    0   u32  signature   "DBGC", for ftrace XORed with the kernel's version code
    4   u32  start       where the next byte goes; of a full ring also where the oldest byte is
    8   u32  size        valid bytes, at most the capacity
    12  ...  data        the ring
        ...  parity      of each 128 bytes of data, then, at the very end, of the header

Every rule here is the kernel's (fs/pstore/ram_core.c): the order in which a write updates header,
data and parity, what attaching repairs and what it throws away.  All integers are little-endian,
as on every machine that vfsmap runs on.
"""

import sys
from typing import Final, NamedTuple

from vfsmap.errors import Damaged, Unsupported
from vfsmap.pstore.ecc import BLOCK, Code
from vfsmap.pstore.geometry import HEADER, Place, capacity

SIGNATURE: Final = 0x43474244
"""``DBGC``; Linux PERSISTENT_RAM_SIG."""

_MAJORS: Final = range(2, 32)


class Log(NamedTuple):
    """What a zone held, oldest byte first."""

    data: bytes
    corrected: int
    """Wrong bytes that ECC mended, in header, data and parity."""
    bad: int
    """Blocks that ECC could not mend; they are in ``data`` as they were."""


class Zone:
    """A zone in a buffer.

    ``view`` is the zone's bytes; a read-only one serves for reading.  Several zones may be
    written at once, one zone by one writer at a time.

    Raises:
        Invalid: the zone has no room for content.
    """

    def __init__(self, place: Place, view: memoryview, ecc: int = 0) -> None:
        if sys.byteorder != "little":
            raise Unsupported("pstore regions are written by little-endian machines only")
        self.place = place
        self._view = view[: place.size]
        self.capacity = capacity(place.size, ecc)
        self._head = view[:HEADER]
        self._words = self._head.cast("I")
        self.data = view[HEADER : HEADER + self.capacity]
        self._parity = view[HEADER + self.capacity : place.size]
        self._header_parity = view[place.size - ecc : place.size]
        self._ecc = ecc
        self._code = Code(ecc) if ecc else None
        self._suspect: set[int] | None = None  # blocks whose parity may be wrong; None: all

    def release(self) -> None:
        """Let go of the buffer."""
        parts = (self._words, self._head, self.data, self._parity, self._header_parity)
        for view in (*parts, self._view):
            view.release()

    @property
    def signature(self) -> int:
        """The signature as it stands."""
        return self._words[0]

    @property
    def start(self) -> int:
        """Where the next byte goes."""
        return self._words[1]

    @property
    def size(self) -> int:
        """Valid bytes."""
        return self._words[2]

    @property
    def version(self) -> int:
        """The version code in an ftrace zone's signature, 0 for the other kinds."""
        return self.signature ^ SIGNATURE

    @property
    def signed(self) -> bool:
        """Whether the signature fits the kind of zone."""
        if self.place.kind == "ftrace":
            return self.version >> 16 in _MAJORS
        return self.signature == SIGNATURE

    @property
    def valid(self) -> bool:
        """Whether the header makes sense."""
        return self.signed and self.start <= self.size <= self.capacity

    def format(self, version: int = 0) -> None:
        """Make an empty zone; its data stays.

        Crash: a zone that attaching finds empty or zaps.
        """
        self._words[0] = SIGNATURE ^ version
        self.zap()

    def zap(self) -> None:
        """Empty the zone; its data stays behind, unreachable.

        Crash: a zone that attaching finds empty, or zaps for a start after its size.
        """
        self._words[1] = 0
        self._words[2] = 0
        self._protect_header()

    def attach(self) -> Log:
        """Repair in place what ECC can repair, and return the old content.

        A zone with a bad header is zapped, its content given up; so the kernel does at boot.

        Raises:
            Damaged: the signature is not one of this kind of zone, even after repair.

        Crash: the old bytes or the repaired ones, either of which the next attach can read.
        """
        errors = self.attach_header()
        corrected, bad = max(errors, 0), int(errors < 0)
        if self.size and self._code:
            errors, lost = self._repair_blocks(self._code)
            corrected, bad = corrected + errors, bad + lost
        return Log(self.read(), corrected, bad)

    def attach_header(self) -> int:
        """Repair the header, zap the zone if it makes no sense, and return the bytes mended.

        -1 says that ECC could not mend it.

        Raises:
            Damaged: the signature is not one of this kind of zone, even after repair.

        Crash: the old header, the repaired one, or an empty zone.
        """
        errors = self.mend_header()
        self._require_signed()
        if not self.valid:
            self.zap()
        return errors

    def mend_header(self) -> int:
        """Repair the header if ECC can; return the bytes mended, -1 if it could not.

        Crash: the old header or the repaired one, which mean the same.
        """
        if self._code is None:
            return 0
        head, errors = self._code.repair(bytes(self._head), bytes(self._header_parity))
        if errors > 0:
            self._head[:] = head
        return errors

    def recall(self) -> Log:
        """Return what :meth:`attach` would, and leave the medium alone; nothing of an alien zone.

        The kernel would format a zone whose signature is not one of its kind.
        """
        copy = Zone(self.place, memoryview(bytearray(self._view)), self._ecc)
        try:
            return copy.attach()
        except Damaged:
            return Log(b"", 0, 0)

    def _require_signed(self) -> None:
        if not self.signed:
            kind, number, offset, _ = self.place
            raise Damaged(
                f"no {kind} zone {number} at {offset:#x}: its signature is {self.signature:#010x};"
                " format the region, or give the geometry it was made with"
            )

    def read(self) -> bytes:
        """Return the content as it stands, oldest byte first."""
        start, size = self.start, self.size
        return bytes(self.data[start:size]) + bytes(self.data[: min(start, size)])

    def write(self, data: bytes) -> None:
        """Append ``data``; of more than the capacity only the tail.

        Crash: header first, then data, then parity, as the kernel does: the bytes of ``data`` can
            be stale or torn, and with ECC their blocks unmendable; nothing before them is.
        """
        room = self.capacity
        count = len(data)
        if count > room:
            data, count = data[-room:], room
        words = self._words
        size = words[2]
        if size < room:
            size += count
            words[2] = size if size < room else room
        old = words[1]
        end = old + count
        if end < room:
            words[1] = end
            if self._code is None:
                self.data[old:end] = data
                return
            self._put(self._code, old, data)
        elif old > room:  # spoilt since it was attached
            self.zap()
            self.write(data)
            return
        else:
            words[1] = end - room
            cut = room - old
            self.poke(old, data[:cut])
            if cut < count:
                self.poke(0, data[cut:])
        self._protect_header()

    def publish(self, size: int) -> None:
        """Make the first ``size`` bytes of data the content of an empty zone.

        Crash: an empty zone before the first store, the whole content after it.
        """
        self._words[2] = size  # the commit point
        self._words[1] = size
        self._protect_header()

    def poke(self, offset: int, data: bytes) -> None:
        """Store ``data`` at ``offset`` of the ring, with its parity, and leave the header alone.

        Crash: the data torn, its parity old.
        """
        if self._code is None:
            self.data[offset : offset + len(data)] = data
        else:
            self._put(self._code, offset, data)

    def reseal(self, offset: int, count: int) -> None:
        """Recompute the parity of the header and of the blocks from ``offset`` on, around the end.

        For a write that its writer did not live to finish.
        """
        if self._code is None:
            return
        surveyed, self._suspect = self._suspect, None
        head = min(count, self.capacity - offset)
        for at, length in ((offset, head), (0, min(count - head, self.capacity))):
            self._put(self._code, at, bytes(self.data[at : at + length]))
        self._suspect = surveyed
        self._protect_header()

    def survey(self) -> None:
        """Find the blocks whose parity is wrong: of the others a write need only code its change.

        A write to a wrong one computes its parity afresh, as without a survey every write does.
        """
        if self._code:
            blocks = range(-(-self.capacity // BLOCK))
            self._suspect = {n for n in blocks if not self._is_whole(self._code, n)}

    def _is_whole(self, code: Code, number: int) -> bool:
        block = bytes(self.data[number * BLOCK : (number + 1) * BLOCK])
        parity = self._parity[number * code.size : (number + 1) * code.size]
        return parity == (code.parity(block) if any(block) else bytes(code.size))

    def _put(self, code: Code, offset: int, data: bytes) -> None:
        # Parity is computed before the stores, so that data and parity differ only for a moment.
        end = offset + len(data)
        first, last = offset // BLOCK, max(offset, end - 1) // BLOCK
        suspect = self._suspect
        if suspect is None or (suspect and not suspect.isdisjoint(range(first, last + 1))):
            base, limit = first * BLOCK, min((last + 1) * BLOCK, self.capacity)
            parity = code.parities(b"".join((self.data[base:offset], data, self.data[end:limit])))
            if suspect:
                suspect.difference_update(range(first, last + 1))
        else:
            parity = self._change(code, offset, data)
        at = first * code.size
        self.data[offset:end] = data
        self._parity[at : at + len(parity)] = parity

    def _change(self, code: Code, offset: int, data: bytes) -> bytes:
        """Return the parity of the blocks that ``data`` touches, from what changes."""
        end, size = offset + len(data), code.size
        new, old = int.from_bytes(data, "big"), int.from_bytes(self.data[offset:end], "big")
        difference = (new ^ old).to_bytes(end - offset, "big")
        parity = b""
        at = offset
        while at < end:
            number = at // BLOCK
            limit = min(number * BLOCK + BLOCK, self.capacity)
            stop = min(limit, end)
            was = self._parity[number * size : number * size + size]
            parity += code.change(was, difference[at - offset : stop - offset], limit - stop)
            at = stop
        return parity

    def _protect_header(self) -> None:
        if self._code:
            self._header_parity[:] = self._code.parity(self._head)

    def _repair_blocks(self, code: Code) -> tuple[int, int]:
        """Mend every block that holds valid bytes; return the bytes mended and the blocks lost."""
        corrected = bad = 0
        for number in range(-(-self.size // BLOCK)):
            block = self.data[number * BLOCK : (number + 1) * BLOCK]
            parity = self._parity[number * code.size : (number + 1) * code.size]
            mended, errors = code.repair(bytes(block), bytes(parity))
            if errors > 0:
                block[:] = mended
                corrected += errors
            bad += errors < 0
        return corrected, bad
