from typing import Any

import pytest

from vfsmap.errors import Invalid
from vfsmap.pstore.geometry import Geometry, Order, Place, capacity, round_down

KERNELS = Geometry(0xF0000, 0x2FFFF, 0x20000, 0x20000, 0x20000, cpus=3)


@pytest.mark.parametrize(
    ("order", "tail"),
    [  # zones that kernels 6.1 and 6.12 really made of these parameters
        ("6.1", [("ftrace", 0xB0000), ("ftrace", 0xBAAAA), ("ftrace", 0xC5554), ("pmsg", 0xCFFFE)]),
        (
            "6.12",
            [("pmsg", 0xB0000), ("ftrace", 0xD0000), ("ftrace", 0xDAAAA), ("ftrace", 0xE5554)],
        ),
    ],
)
def test_zones_lie_where_the_kernel_put_them(order: Order, tail: list[tuple[str, int]]) -> None:
    geometry = Geometry(0xF0000, 0x2FFFF, 0x20000, 0x20000, 0x20000, cpus=3, order=order)
    assert [place[:3] for place in geometry.places[:4]] == [
        ("dmesg", n, n * 0x24000) for n in range(4)
    ]
    assert geometry.places[4] == Place("console", 0, 0x90000, 0x20000)
    assert [(place.kind, place.offset) for place in geometry.places[5:]] == tail
    assert {p.size for p in geometry.places if p.kind == "ftrace"} == {0xAAAA}


@pytest.mark.parametrize(
    ("zone", "ecc", "bytes_left"),
    [(0x20000, 16, 116468), (0x2000, 16, 7252), (0x20000, 0, 0x20000 - 12), (0x1000, 0, 4084)],
)
def test_capacity_is_the_kernels(zone: int, ecc: int, bytes_left: int) -> None:
    assert capacity(zone, ecc) == bytes_left


def test_sizes_are_rounded_down_to_powers_of_two_but_not_the_region() -> None:
    geometry = Geometry(1000003, 5000, 4097, 9000, 3000)
    assert (geometry.size, geometry.record, geometry.console, geometry.pmsg, geometry.ftrace) == (
        1000003,
        4096,
        4096,
        8192,
        2048,
    )
    assert round_down(0) == 0


def test_ecc_1_means_16() -> None:
    assert Geometry(1 << 20, ecc=1) == Geometry(1 << 20, ecc=16)


def test_size_0_makes_no_zone_and_takes_no_room() -> None:
    geometry = Geometry(1 << 20, 0, 0, 1 << 12, 0)
    assert geometry.places == (Place("pmsg", 0, 0, 1 << 12),)


def test_what_does_not_divide_is_spread_over_the_records() -> None:
    assert [p.size for p in Geometry(1 << 20, 0x30000, 0x1000, 0x1000).places[:3]] == [
        0xFE000 // 7 & ~1
    ] * 3


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"size": -1}, "size -1"),
        ({"size": 1 << 40}, "not in 0 to 2G"),
        ({"size": 0}, "no room"),
        ({"record": 1 << 20}, "no room"),
        ({"pmsg": 1 << 21}, "no room"),
        ({"record": 0, "console": 0, "pmsg": 0}, "every zone size is 0"),
        ({"record": 1, "size": 1 << 20}, "more than 65536"),
        ({"ecc": 128}, "2 to 127"),
        ({"ecc": -1}, "2 to 127"),
        ({"cpus": 0}, "0 CPUs"),
        ({"cpus": 10000}, "10000 CPUs"),
        ({"ftrace": 0x1000, "cpus": 4096}, "no room for content"),
        ({"ftrace": 0x1000, "cpus": 512}, "no room for content"),
        ({"console": 32, "ecc": 127}, "no room for content"),
        ({"order": "5.0"}, "use 6.1 or 6.12"),
    ],
)
def test_impossible_geometry_is_refused_with_the_rule(changes: dict[str, Any], rule: str) -> None:
    with pytest.raises(Invalid, match=rule):
        Geometry(**({"size": 1 << 20} | changes))
