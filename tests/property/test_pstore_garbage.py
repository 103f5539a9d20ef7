"""Whatever bytes claim to be a region: an answer or one clear error, and no other exception."""

import lzma
import random
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfsmap.errors import Invalid, VfsmapError
from vfsmap.pstore import Geometry, Recorder, Region, format_region
from vfsmap.pstore.geometry import ORDERS
from vfsmap.pstore.kallsyms import Symbols
from vfsmap.pstore.reader import read_files
from vfsmap.testing.regions import load_sample
from vfsmap.testing.spoilt import spoil_region
from vfsmap.units import KIB

SAMPLES = Path(__file__).parents[1] / "data/ramoops"
WRAPPED = lzma.decompress((SAMPLES / "k612_wrap_ecc16/region.bin.xz").read_bytes())

numbers = st.integers(-1, 1 << 33) | st.sampled_from([0, 1, 2, 12, 13, 4096, 1 << 31, 1 << 32])


def use(region: bytearray, geometry: Geometry | None) -> None:
    """Do with a region what there is to do; a VfsmapError may end it."""
    with suppress(VfsmapError), Region.over(region, geometry) as opened:
        opened.files()
        opened.unread()
        opened.mark_read("dmesg-ramoops-0")
        for file in opened.files():
            opened.erase(file.name)
    with suppress(VfsmapError), Recorder(region, geometry, watch=False) as recorder:
        recorder.console("line\n" * 50)
        recorder.pmsg("line\n" * 50)
        recorder.dmesg("Oops", "text\n" * 50)


@given(
    st.builds(
        dict,
        size=numbers,
        record=numbers,
        console=numbers,
        pmsg=numbers,
        ftrace=numbers,
        ecc=st.integers(-1, 200),
        cpus=numbers,
        order=st.sampled_from(ORDERS),
    )
)
@settings(max_examples=300, deadline=None)
def test_any_geometry_is_laid_out_or_refused(parameters: dict[str, int]) -> None:
    with suppress(Invalid):
        geometry = Geometry(**parameters)  # type: ignore[arg-type]
        if geometry.size <= 1 << 20 and len(geometry.places) < 1000:
            use(bytearray(geometry.size), geometry)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_mutated_region_of_a_kernel_is_read_or_refused(data: st.DataObject) -> None:
    region = bytearray(WRAPPED)
    places = st.integers(0, len(region) - 1) | st.sampled_from(
        [zone * 0x2000 + at for zone in range(8) for at in range(40)]
    )
    for at in data.draw(st.lists(places, max_size=30)):
        region[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([len(region)] * 4 + [0, 1, 11, 12, 100, 0x2000, 0xFFFF]))
    geometry = load_sample(SAMPLES / "k612_wrap_ecc16").geometry
    use(region[:cut], geometry)
    use(region[:cut], None)


@pytest.mark.parametrize("ecc", [0, 16, 5])
def test_region_spoilt_in_every_way_is_read_used_and_read_again(ecc: int) -> None:
    geometry = Geometry(64 * KIB, 8 * KIB, 8 * KIB, 8 * KIB, ecc=ecc)
    for seed in range(12):
        region = bytearray(spoil_region(geometry, random.Random(seed)))
        use(region, geometry)
        read_files(region, geometry)


@given(st.binary(max_size=3000))
@settings(max_examples=200, deadline=None)
def test_garbage_is_refused(garbage: bytes) -> None:
    use(bytearray(garbage), None)


@given(st.integers(0, 1 << 32), st.integers(0, 2000), st.sampled_from([0, 2, 16, 127]))
@settings(max_examples=20, deadline=None)
def test_garbage_in_zones_is_no_more_than_garbage_in_files(seed: int, size: int, ecc: int) -> None:
    chance = random.Random(seed)
    geometry = Geometry(8 * KIB, 2 * KIB, 2 * KIB, 2 * KIB, ftrace=2 * KIB, ecc=ecc)
    region = bytearray(8 * KIB)
    format_region(region, geometry)
    for place in geometry.places:
        content = size.to_bytes(4, "little") * 2 + chance.randbytes(place.size - 12)
        region[place.offset + 4 : place.offset + place.size] = content
    use(region, geometry)


@given(st.text(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_text_is_kallsyms_or_refused(text: str) -> None:
    with suppress(Invalid):
        Symbols.parse(text).format_place(0xFFFFFFFF81000000)
