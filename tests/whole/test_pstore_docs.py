"""What docs/format-pstore.md says of vfsmap's own bytes is what they are."""

import re
from pathlib import Path

from vfsmap.pstore import Geometry
from vfsmap.pstore.margin import Ledger, Mark, Session

DOCUMENT = (Path(__file__).parents[2] / "docs/format-pstore.md").read_text()


def fields(heading: str) -> dict[str, tuple[int, int]]:
    """Return the offsets and sizes of the table after ``heading``."""
    table = DOCUMENT.split(heading)[1].split("\n\n")[1]
    rows = re.findall(r"^\| (\d+) \| (\d+) \| ([^|]*?) \|", table, re.M)
    return {name: (int(offset), int(size)) for offset, size, name in rows}


def test_ledger_is_as_documented() -> None:
    geometry = Geometry(1000000, 4096, 8192, 16384, 32768, ecc=7, cpus=3, order="6.12")
    ledger = Ledger(geometry, 11, 12, overwrite=True, overwritten=13, refused=14)
    slot = ledger.pack(Mark(15, 16))
    table = fields("A ledger:")

    def number(name: str) -> int:
        offset, size = table[name]
        return int.from_bytes(slot[offset : offset + size], "little")

    assert {
        name: number(name) for name in table if name not in ("magic", "checksum", "sizes", "")
    } == {
        "serial": 11,
        "counter": 12,
        "policy": 1,
        "order": 1,
        "overwritten": 13,
        "refused": 14,
        "mark size": 15,
        "mark checksum": 16,
        "ecc": 7,
        "cpus": 3,
    }
    offset, size = table["sizes"]
    sizes = memoryview(slot[offset : offset + size]).cast("I").tolist()
    assert sizes == [1000000, 4096, 8192, 16384, 32768]
    assert slot.startswith(b"vfsmapL1")
    assert sum(table[""]) == len(slot) == 128
    assert Ledger.unpack(slot) == (ledger, Mark(15, 16))


def test_session_is_as_documented() -> None:
    session = Session(11, 12, 13, bytes(range(16)), "program")
    slot = session.pack()
    table = fields("A session, 64 bytes")

    def part(name: str) -> bytes:
        offset, size = table[name]
        return slot[offset : offset + size]

    assert [int.from_bytes(part(n), "little") for n in ("pid", "start", "namespace")] == [
        11,
        12,
        13,
    ]
    assert (part("magic"), part("boot")) == (b"vfsS", bytes(range(16)))
    assert part("name") == b"program".ljust(16, b"\0")
    assert len(slot) == 64
    assert Session.unpack(slot) == session
