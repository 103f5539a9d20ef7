"""Regions of real kernels read as those kernels showed them."""

import re
from pathlib import Path

import pytest

from vfsmap.errors import Damaged, VfsmapError
from vfsmap.pstore.detect import detect
from vfsmap.pstore.reader import read_files
from vfsmap.testing.regions import Sample, load_sample, recover_symbols

FOLDERS = sorted(path for path in (Path(__file__).parents[1] / "data/ramoops").glob("*/"))


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def sample(request: pytest.FixtureRequest) -> Sample:
    return load_sample(request.param)


def test_every_kernel_of_the_collection_is_there() -> None:
    assert len(FOLDERS) == 7


def test_region_of_a_real_kernel_shows_the_files_that_the_kernel_showed(sample: Sample) -> None:
    shown = {file.name: file.data for file in read_files(sample.region, sample.geometry)}
    traced = sample.files.pop("ftrace-ramoops-0", None)
    if traced:
        symbols = recover_symbols(traced)
        files = read_files(sample.region, sample.geometry, symbols)
        assert {file.name: file.data for file in files}["ftrace-ramoops-0"] == traced
        del shown["ftrace-ramoops-0"]
    if not sample.files:  # Debian's kernel was not booted twice
        assert shown.pop("dmesg-ramoops-0").startswith(b"Panic#1 Part1\n")
    assert shown == sample.files


def test_ftrace_without_symbols_shows_addresses_in_their_place() -> None:
    sample = load_sample(next(folder for folder in FOLDERS if folder.name == "k61_ecc0"))
    shown = {file.name: file.data for file in read_files(sample.region, sample.geometry)}
    pattern = rb"(CPU:\d+ ts:\d+ (\w+)  (\w+)  )\S+ <- \S+"
    addresses = re.sub(pattern, rb"\g<1>0x\2 <- 0x\3", sample.files["ftrace-ramoops-0"])
    assert shown["ftrace-ramoops-0"] == addresses


@pytest.mark.parametrize("more", [b"", bytes(1 << 20), b"\xff" * 5000])
def test_geometry_of_a_real_region_is_detected(sample: Sample, more: bytes) -> None:
    assert detect(sample.region + more) == sample.geometry


def test_detecting_and_reading_leave_the_region_alone(sample: Sample) -> None:
    region = bytearray(sample.region)
    read_files(memoryview(region).toreadonly(), detect(memoryview(region).toreadonly()))
    assert region == sample.region


@pytest.mark.parametrize("length", [0, 11, 12, 4096, 0x20001, 0xFFFFF])
def test_region_cut_short_is_refused_and_the_message_says_so(length: int) -> None:
    sample = load_sample(next(folder for folder in FOLDERS if folder.name == "k61_ecc0"))
    with pytest.raises(VfsmapError, match="cut off"):
        read_files(sample.region[:length], sample.geometry)


@pytest.mark.parametrize("name", ["k61_ecc0", "k612_ecc0"])
@pytest.mark.parametrize("length", [0x50000, 0xE000D, 0xFC000, 0xFFFFF])
def test_region_cut_short_is_not_taken_for_another_one(name: str, length: int) -> None:
    sample = load_sample(next(folder for folder in FOLDERS if folder.name == name))
    with pytest.raises(Damaged, match="cut off"):
        detect(sample.region[:length])


@pytest.mark.parametrize("head", [b"DBGC", b"\x84CAC"])
def test_what_is_full_of_zones_heads_is_no_region(head: bytes) -> None:
    with pytest.raises(Damaged, match="no region"):
        detect((head + bytes(8)) * (1 << 18))
