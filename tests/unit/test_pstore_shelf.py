"""The shelf of crash records when the medium is damaged or foreign."""

import pytest

from vfsmap.errors import Damaged, NoSpace
from vfsmap.pstore import Geometry, Region, format_region
from vfsmap.units import KIB

GEOMETRY = Geometry(64 * KIB, 16 * KIB, 16 * KIB, 16 * KIB, ecc=16)


@pytest.fixture
def buffer() -> bytearray:
    buffer = bytearray(GEOMETRY.size)
    format_region(buffer, GEOMETRY)
    return buffer


def fill(buffer: bytearray) -> None:
    with Region.over(buffer, GEOMETRY) as region:
        assert [region.put("Oops", b"text\n" * 20) for _ in range(2)]


@pytest.mark.parametrize("wrong", [0, 1, 5, 11, 12, 20, 70], ids="byte {}".format)
def test_damaged_record_that_ecc_can_mend_counts_as_unread_and_is_kept(
    buffer: bytearray, wrong: int
) -> None:
    fill(buffer)
    buffer[wrong] ^= 0x55
    with Region.over(buffer, GEOMETRY) as region:
        assert region.unread() == {"dmesg-ramoops-0", "dmesg-ramoops-1"}
        with pytest.raises(NoSpace):
            region.put("Oops", b"one more\n")
        assert region.file("dmesg-ramoops-0").data.startswith(b"Oops#1 Part1\ntext\n")
        region.mark_read("dmesg-ramoops-0")
        assert region.unread() == {"dmesg-ramoops-1"}


def test_zone_whose_signature_is_lost_is_no_place_for_a_record(buffer: bytearray) -> None:
    buffer[:12] = b"x" * 12
    with Region.over(buffer, GEOMETRY) as region:
        assert region.put("Oops", b"text\n") == "dmesg-ramoops-1"
    buffer[16 * KIB : 16 * KIB + 12] = b"x" * 12
    with Region.over(buffer, GEOMETRY) as region, pytest.raises(Damaged, match="format"):
        region.put("Oops", b"text\n")


def test_record_of_a_full_zone_with_a_damaged_header_is_never_taken_for_free_room() -> None:
    buffer = bytearray(GEOMETRY.size)
    format_region(buffer, GEOMETRY)
    with Region.over(buffer, GEOMETRY) as region:
        zone = region.zones[0]
        zone.zap()
        zone.write(b"====1.000000-D\nOops#1 Part1\n".ljust(zone.capacity, b"x"))
    buffer[9] ^= 1
    before = buffer[: 16 * KIB]
    with Region.over(buffer, GEOMETRY) as region:
        region.set_policy(overwrite=True)
    assert buffer[: 16 * KIB] == before


def test_record_that_took_the_place_of_the_one_that_was_read_stays_unread(
    buffer: bytearray,
) -> None:
    fill(buffer)
    with Region.over(buffer, GEOMETRY) as region:
        files = region.files()
        region.erase("dmesg-ramoops-0")
        assert region.put("Panic", b"a new one\n") == "dmesg-ramoops-0"
        region.mark_read(*files)
        assert region.unread() == {"dmesg-ramoops-0"}
        region.mark_read(*region.files())
        assert region.unread() == set()
