from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import reedsolo
from hypothesis import given, settings
from hypothesis import strategies as st

from vfsmap.errors import Damaged, Invalid
from vfsmap.pstore.detect import detect
from vfsmap.pstore.ecc import Code
from vfsmap.pstore.format import format_region
from vfsmap.pstore.geometry import ORDERS, Geometry, Order, Place
from vfsmap.pstore.margin import find_geometry
from vfsmap.pstore.record import make_body, make_header, parse_header
from vfsmap.pstore.zone import Zone

SIZES = st.sampled_from([16, 16, 2, 5, 32, 127])


@given(SIZES, st.binary(min_size=1, max_size=128), st.data())
@settings(max_examples=60, deadline=None)
def test_parity_is_reedsolos_and_mends_as_many_bytes(
    size: int, data: bytes, draw: st.DataObject
) -> None:
    codec = reedsolo.RSCodec(size, nsize=255, fcr=0, prim=0x11D, generator=2, c_exp=8)
    code = Code(size)
    parity = code.parity(data)
    assert data + parity == bytes(codec.encode(data))

    word = bytearray(data + parity)
    places = st.lists(st.integers(0, len(word) - 1), unique=True, max_size=size // 2)
    wrong = draw.draw(places)
    for at in wrong:
        word[at] ^= draw.draw(st.integers(1, 255))
    assert code.repair(bytes(word[: len(data)]), bytes(word[len(data) :])) == (data, len(wrong))


@given(
    st.sampled_from([0, 16, 3]),
    st.lists(st.binary(max_size=700), max_size=12),
    st.sampled_from([0x200, 0x3FE, 0x1000]),
)
@settings(max_examples=60, deadline=None)
def test_zone_holds_the_tail_of_all_that_was_written(
    ecc: int, writes: list[bytes], size: int
) -> None:
    place, buffer = Place("pmsg", 0, 0, size), bytearray(size)
    zone = Zone(place, memoryview(buffer), ecc)
    zone.format()
    for data in writes:
        zone.write(data)
    expected = b"".join(writes)[-zone.capacity :]
    assert zone.read() == expected
    assert Zone(place, memoryview(buffer), ecc).attach() == (expected, 0, 0)


geometries: st.SearchStrategy[dict[str, Any]] = st.builds(
    dict,
    size=st.integers(0x4000, 0x40000),
    record=st.sampled_from([0, 0x400, 0x1000, 0x2000, 0x8000]),
    console=st.sampled_from([0, 0x800, 0x4000]),
    pmsg=st.sampled_from([0, 0x1000, 0x4000]),
    ftrace=st.sampled_from([0, 0x1000, 0x8000]),
    ecc=st.sampled_from([0, 16, 5]),
    cpus=st.sampled_from([1, 2, 3, 8]),
    order=st.sampled_from(ORDERS),
)


def build(parameters: dict[str, Any]) -> tuple[Geometry, bytearray] | None:
    """Return a region in which every zone but ftrace holds something."""
    if not parameters["record"]:  # nothing would tell where such a region ends
        parameters["size"] = sum(parameters[kind] for kind in ("console", "pmsg", "ftrace"))
    try:
        geometry = Geometry(**parameters)
    except Invalid:
        return None
    region = bytearray(geometry.size)
    text = {"dmesg": b"====1.000000-D\nOops#1", "console": b"[0] x\n", "pmsg": b"hello\n"}
    for place in geometry.places:
        view = memoryview(region)[place.offset : place.offset + place.size]
        zone = Zone(place, view, geometry.ecc)
        zone.format(0x0601C0 if place.kind == "ftrace" else 0)
        zone.write(text.get(place.kind, b""))
    return geometry, region


@given(geometries)
@settings(max_examples=80, deadline=None)
def test_zones_never_overlap_nor_leave_the_region(parameters: dict[str, Any]) -> None:
    built = build(parameters)
    if built:
        places = built[0].places
        ends = [place.offset + place.size for place in places]
        assert [place.offset for place in places[1:]] == ends[:-1]
        assert ends[-1] <= built[0].size


@given(geometries)
@settings(max_examples=60, deadline=None)
def test_zones_of_a_region_in_use_are_detected(parameters: dict[str, Any]) -> None:
    built = build(parameters)
    if built:
        geometry, region = built
        found = detect(region)
        assert [p[2:] for p in found.places] == [p[2:] for p in geometry.places]
        assert found.ecc == geometry.ecc


@given(st.binary(max_size=2000) | st.builds(lambda b: b"DBGC" + b, st.binary(max_size=500)))
@settings(max_examples=100, deadline=None)
def test_garbage_is_detected_as_nothing_or_as_something_that_fits(garbage: bytes) -> None:
    with suppress(Damaged):
        assert detect(garbage).size <= len(garbage)


@given(st.integers(0, 2**62), st.booleans(), st.binary(max_size=20))
def test_header_is_read_back(time_us: int, compressed: bool, body: bytes) -> None:
    line = make_header(time_us * 1000, compressed=compressed)
    header = parse_header(line + b"Oops" + body)
    assert header == (time_us * 1000, compressed, len(line))


@given(st.binary(max_size=3000), st.integers(20, 1500), st.sampled_from(["deflate", "none"]))
@settings(max_examples=80, deadline=None)
def test_body_never_outgrows_its_room(log: bytes, room: int, compression: Any) -> None:
    body, packed = make_body(b"Oops#1 Part1\n", log, room, room * 5 // 3, compression)
    assert 0 < len(body) <= room
    assert not packed or compression == "deflate"
    assert body[:1] not in (b"\n", b" ", b"\t", b"\xa0")


def in_use(geometry: Geometry, residue: bytes | bytearray = b"") -> bytearray:
    """Return a region as kernels leave them, all zones of which hold what they should."""
    region = bytearray(residue or geometry.size)
    text = {
        "dmesg": b"====1.000000-D\nOops#1 Part1\n",
        "console": b"[    0.000000] Linux version 6.1\n",
        "pmsg": b"hello\n",
    }
    for place in geometry.places:
        view = memoryview(region)[place.offset : place.offset + place.size]
        zone = Zone(place, view, geometry.ecc)
        zone.format(0x0601C0 if place.kind == "ftrace" else 0)
        zone.write(text.get(place.kind, bytes(24)))
    return region


FULL = st.builds(
    Geometry,
    size=st.sampled_from([0x40000, 0x3C000]),
    record=st.sampled_from([0x2000, 0x4000]),
    console=st.sampled_from([0x2000, 0x4000]),
    pmsg=st.sampled_from([0x1000, 0x4000]),
    ftrace=st.sampled_from([0x4000, 0x8000]),
    ecc=st.sampled_from([0, 16, 20]),
    cpus=st.sampled_from([1, 3, 4]),
    order=st.sampled_from(ORDERS),
)


@given(FULL, st.data())
@settings(max_examples=20, deadline=None)
def test_geometry_is_detected_though_a_byte_of_any_one_header_is_wrong(
    geometry: Geometry, data: st.DataObject
) -> None:
    region = in_use(geometry)
    place = data.draw(st.sampled_from(geometry.places))
    region[place.offset + data.draw(st.integers(0, 11))] ^= data.draw(st.integers(1, 255))
    assert detect(region) == replace(geometry, cpus=detect(region).cpus)
    assert detect(region).cpus == geometry.cpus or place.kind == "ftrace"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["console", "dmesg"])
def test_geometry_is_detected_though_a_whole_header_is_gone(order: Order, kind: str) -> None:
    geometry = Geometry(0x40000, 0x4000, 0x4000, 0x4000, 0x4000, ecc=16, cpus=4, order=order)
    region = in_use(geometry)
    place = next(place for place in geometry.places if place.kind == kind)
    region[place.offset : place.offset + 12] = bytes(12)
    assert detect(region) == geometry


@pytest.mark.parametrize("record", [0x1000, 0x2000, 0x4000])
@pytest.mark.parametrize("order", ORDERS)
def test_ledger_of_an_older_layout_does_not_hide_what_a_kernel_made_of_the_region(
    record: int, order: Order
) -> None:
    old = Geometry(0x40000, 0x2000, 0x2000, 0x1000, 0x4000, order="6.1")
    new = Geometry(0x40000, record, 0x2000, 0x4000, 0x8000, cpus=4, order=order)
    region = bytearray(old.size)
    format_region(region, old)
    region = in_use(new, residue=region)
    assert find_geometry(memoryview(region)) == old
    assert detect(region) == new
