"""Whatever bytes claim to be a region: an answer or one clear error, and no other exception."""

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
from vfsmap.testing.regions import load_sample, survive_region
from vfsmap.testing.spoilt import mutate_region, spoil_region
from vfsmap.units import KIB

FOLDER = Path(__file__).parents[1] / "data/ramoops"
SAMPLES = sorted(path.name for path in FOLDER.glob("*/"))

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


def survive_mutants(name: str, seeds: range, work: Path) -> None:
    sample = load_sample(FOLDER / name)
    shown = 0
    for seed in seeds:
        mutant = mutate_region(sample.region, sample.geometry, random.Random(seed))
        try:
            shown += survive_region(bytes(mutant), sample.geometry, work)
        except Exception as exc:
            exc.add_note(f"seed {seed} of {name}")
            raise
    assert shown, "none was read to the end"


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
        geometry = Geometry(**parameters)  # type: ignore[arg-type]  # of several types
        if geometry.size <= 1 << 20 and len(geometry.places) < 1000:
            use(bytearray(geometry.size), geometry)


@pytest.mark.parametrize("name", SAMPLES)
def test_mutated_region_of_a_kernel_is_read_repaired_and_written_or_refused(
    name: str, tmp_path: Path
) -> None:
    survive_mutants(name, range(6), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("lot", range(10))
@pytest.mark.parametrize("name", SAMPLES)
def test_thousands_of_mutated_regions_are_read_repaired_and_written_or_refused(
    name: str, lot: int, tmp_path: Path
) -> None:
    survive_mutants(name, range(100 + 100 * lot, 200 + 100 * lot), tmp_path)


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
