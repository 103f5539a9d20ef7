"""The memory of one image while it is bound: byte arrays at the addresses they will have."""

import struct
from typing import Final

from vfsmap.errors import Damaged

_I32: Final = struct.Struct("<i")
_U64: Final = struct.Struct("<Q")
MASK: Final = (1 << 64) - 1


class Region:
    """Bytes that lie together."""

    def __init__(self, name: str, start: int, data: bytearray) -> None:
        self.name = name
        self.start = start
        self.data = data
        self.end = start + len(data)

    def __contains__(self, address: int) -> bool:
        return self.start <= address < self.end

    @property
    def span(self) -> range:
        """The addresses it takes."""
        return range(self.start, self.end)


class Memory:
    """Regions, looked up by address; nothing outside them can be read or written."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.regions: list[Region] = []
        self._last: Region | None = None

    def add(self, region: Region) -> None:
        """Add a region."""
        if region.data:
            self.regions.append(region)

    def __contains__(self, address: int) -> bool:
        return any(address in region for region in self.regions)

    def find(self, address: int, size: int, what: str) -> Region:
        """Return the region that holds all of a range.

        Raises:
            Damaged: none does.
        """
        last = self._last
        if last is not None and last.start <= address and address + size <= last.end:
            return last
        for region in self.regions:
            if region.start <= address and address + size <= region.end:
                self._last = region
                return region
        raise Damaged(f"{self.name}: {what} at {address:#x} is outside the image")

    def read(self, address: int, size: int, what: str = "a read") -> bytes:
        """Return bytes."""
        region = self.find(address, size, what)
        at = address - region.start
        return bytes(region.data[at : at + size])

    def upto(self, address: int, size: int) -> bytes:
        """Return at most ``size`` bytes: fewer where the region ends."""
        region = self.find(address, 1, "a read")
        at = address - region.start
        return bytes(region.data[at : at + size])

    def write(self, address: int, data: bytes, what: str = "a write") -> None:
        """Store bytes."""
        region = self.find(address, len(data), what)
        at = address - region.start
        region.data[at : at + len(data)] = data

    def s32(self, address: int, what: str = "a read") -> int:
        """Return a signed number of 32 bits."""
        region = self.find(address, 4, what)
        return int(_I32.unpack_from(region.data, address - region.start)[0])

    def u64(self, address: int, what: str = "a read") -> int:
        """Return a number of 64 bits."""
        region = self.find(address, 8, what)
        return int(_U64.unpack_from(region.data, address - region.start)[0])
