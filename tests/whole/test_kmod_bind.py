"""Binding real modules gives, byte for byte, what real kernels had in memory."""

import hashlib
from pathlib import Path

import pytest

from vfsmap.errors import Invalid, NotFound
from vfsmap.kmod.bind import Bound, bases_at, bind
from vfsmap.kmod.host import MODULE_AREA, Host
from vfsmap.kmod.layout import Area, Layout
from vfsmap.kmod.module import Module
from vfsmap.testing.kernels import modules

DATA = Path(__file__).parents[1] / "data" / "kmod"
PROFILES = sorted(path.name for path in DATA.iterdir() if path.is_dir())
NAMES = sorted(path.stem for path in (DATA / "61max").glob("*.lines"))


def host(profile: str) -> Host:
    return Host.open(DATA / profile / "host.json.xz")


def module(profile: str, name: str) -> Module:
    return Module.open(modules("612" if profile.startswith("612") else "61")[name])


def bound(profile: str, name: str) -> Bound:
    return bind(module(profile, name), host(profile))


def wrong_lines(profile: str, name: str, text: bytes) -> list[int]:
    lines = (DATA / profile / f"{name}.lines").read_bytes()
    return [
        at
        for at in range(0, len(text), 64)
        if hashlib.blake2b(text[at : at + 64], digest_size=8).digest()
        != lines[at // 8 : at // 8 + 8]
    ]


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", NAMES)
def test_bound_text_is_what_the_real_kernel_had_in_memory(profile: str, name: str) -> None:
    resident = host(profile).modules[name]
    found = bound(profile, name)

    text = found.placed.area(Area.TEXT)

    assert found.placed.image.text == resident.text
    assert [
        hex(found.placed.image.text.start + at) for at in wrong_lines(profile, name, text)
    ] == []
    assert hashlib.sha256(text).hexdigest() == resident.document.text_sha256


@pytest.mark.parametrize("profile", ["61max", "612off"])
def test_symbols_that_only_modules_import_are_known_as_well(profile: str) -> None:
    document = host(profile).document
    document.kernel_symbols = {
        name: address
        for name, address in document.kernel_symbols.items()
        if name not in document.modules["xfs"].imports
    }
    assert "__fentry__" not in document.kernel_symbols
    found = bind(module(profile, "xfs"), Host(document))
    assert wrong_lines(profile, "xfs", found.placed.area(Area.TEXT)) == []


@pytest.mark.parametrize("profile", PROFILES)
def test_every_section_lies_where_the_kernel_had_it(profile: str) -> None:
    for name, resident in host(profile).modules.items():
        found = module(profile, name)
        layout = Layout(found)
        bases = bound(profile, name).placed.bases
        for number, spot in layout.places.items():
            section = found.elf.sections[number].name
            if section in resident.sections and spot.area is not Area.PERCPU:
                assert bases[spot.area] + spot.offset == resident.sections[section], section


def test_a_module_of_another_kernel_is_refused() -> None:
    with pytest.raises(Invalid, match=r"built for kernel 6\.1.*, the host runs 6\.12"):
        bind(module("61max", "xfs"), host("612max"))


def test_a_module_that_the_host_has_not_loaded_needs_an_address() -> None:
    with pytest.raises(NotFound, match="no module crc7"):
        bind(module("61max", "crc7"), host("61max"))


def test_missing_symbols_are_named() -> None:
    found = module("61max", "nf_defrag_ipv4")
    with pytest.raises(NotFound, match=r"supplies no __fentry__, .*missing"):
        bind(
            found,
            Host.decode(b'{"kernel": "6.1.0-56-cloud-amd64", "x86_capability": []}'),
            bases_at(MODULE_AREA, Layout(found)),
        )
