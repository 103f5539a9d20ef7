"""Whole kernels: unpacked, their symbols found, and bound as real boots had them in memory."""

import functools
import hashlib
import re
import struct
from collections.abc import Iterable
from pathlib import Path

import msgspec
import pytest

import vfsmap
from vfsmap.errors import Damaged, Exists, Invalid, Sealed
from vfsmap.kmod.bind import Bound, bind, called_by
from vfsmap.kmod.host import Host
from vfsmap.kmod.image import ALTERNATIVES, CALLS, FTRACE, JUMPS, RETURNS
from vfsmap.kmod.kernel import Kernel, bind_kernel
from vfsmap.kmod.layout import Area
from vfsmap.kmod.loader import Loader
from vfsmap.kmod.module import Module
from vfsmap.kmod.store import Store
from vfsmap.kmod.tables import constants, sites
from vfsmap.testing.kernels import modules, vmlinuz

DATA = Path(__file__).parents[1] / "data" / "kmod"
DIRECTORIES = sorted(path.name for path in DATA.iterdir() if path.is_dir())
DOCUMENTS = sorted(path.name.partition(".")[0] for path in DATA.glob("*.json.xz"))


def package(profile: str) -> str:
    return "612" if profile.startswith("612") else "61"


@functools.cache
def kernel(key: str) -> Kernel:
    return Kernel.open(vmlinuz(key))


def host(profile: str) -> Host:
    path = DATA / profile / "host.json.xz"
    return Host.open(path if path.exists() else DATA / f"{profile}.json.xz")


def text_of(profile: str, callers: Iterable[Bound] = ()) -> bytes:
    image = bind_kernel(kernel(package(profile)), host(profile), called_by(callers)).image
    return image.memory.read(image.text.start, len(image.text))


@pytest.mark.parametrize("profile", DIRECTORIES)
def test_bound_kernel_is_page_for_page_what_was_in_memory(profile: str) -> None:
    text = text_of(profile)
    pages = (DATA / profile / "vmlinux.pages").read_bytes()
    wrong = [
        at
        for at in range(0, len(text), 4096)
        if hashlib.blake2b(text[at : at + 4096], digest_size=8).digest()
        != pages[at // 512 : at // 512 + 8]
    ]
    assert wrong == []
    assert hashlib.sha256(text).hexdigest() == host(profile).document.vmlinux_text_sha256


@pytest.mark.parametrize("profile", DOCUMENTS)
def test_kernel_and_modules_of_other_profiles_are_what_was_in_memory(profile: str) -> None:
    where = host(profile)
    bound = [bind(Module.open(modules(package(profile))[name]), where) for name in where.modules]
    for found in bound:
        name = found.placed.module.name
        wanted = where.modules[name].document.text_sha256
        assert hashlib.sha256(found.placed.area(Area.TEXT)).hexdigest() == wanted, name
    text = text_of(profile, bound)
    assert hashlib.sha256(text).hexdigest() == where.document.vmlinux_text_sha256


def test_a_store_knows_from_its_modules_which_functions_of_a_kernel_are_called(
    tmp_path: Path,
) -> None:
    where = host("612stuff")
    store, raw = Store(tmp_path), vmlinuz("612").read_bytes()
    (doubt,) = store.add_kernel(raw, where).doubts
    assert re.search(r"whether \d+ functions of vmlinux are called depends on", doubt)
    assert {"xfs", "kvm"} <= set(re.split(r"[ ,;:]+", doubt))
    with pytest.raises(Exists, match="vmlinux bound to that host already"):
        store.add_kernel(raw, where)
    store.add([Module.open(modules("612")[name]) for name in where.modules], where)
    variant = store.add_kernel(raw, where)  # instead of that with doubts
    assert store.find("vmlinux") == [variant]
    assert len(list((tmp_path / "packs").iterdir())) == 2
    text = store.file(variant.pack, "text").read_bytes()[: len(variant.text)]
    assert hashlib.sha256(text).hexdigest() == where.document.vmlinux_text_sha256
    assert variant.doubts == []
    assert Store(tmp_path).verify(vfsmap.map) == {}


def test_a_module_that_was_loaded_and_removed_has_left_its_mark_on_the_kernel(
    tmp_path: Path,
) -> None:
    loaded = host("612stuff")
    left = dict(loaded.document.modules)
    gone = left.pop("xfs")
    known = gone.imports | loaded.document.kernel_symbols
    after = Host(msgspec.structs.replace(loaded.document, modules=left, kernel_symbols=known))
    files = [Module.open(modules("612")[name]) for name in loaded.modules]
    wanted = loaded.document.vmlinux_text_sha256
    for number, beside in enumerate((files, [m for m in files if m.name != "xfs"])):
        store = Store(tmp_path / str(number))
        variant = store.add_kernel(vmlinuz("612").read_bytes(), after, beside)
        text = store.file(variant.pack, "text").read_bytes()[: len(variant.text)]
        assert variant.doubts == []
        assert (hashlib.sha256(text).hexdigest() == wanted) == (number == 0)


def test_what_a_document_does_not_tell_of_a_kernel_is_taken_from_a_similar_boot_and_said() -> None:
    known = host("612up")
    document = msgspec.structs.replace(
        known.document, static_key_enabled={}, static_call_func={}, runtime_constants={}
    )
    found = bind_kernel(kernel("612"), Host(document))
    states, *lacking = found.doubts
    assert "states of the kernel's keys: they are taken to be those of a similar boot" in states
    assert {doubt.partition(":")[0].rpartition(".")[2] for doubt in lacking} == {
        "dentry_hashtable",
        "d_hash_shift",
    }
    # where boot put its table of names is all that differs from what really was in memory
    table = found.image.runtime_constants["runtime_ptr_dentry_hashtable"]
    value = known.constants["dentry_hashtable"].to_bytes(8, "little")
    for place in constants(found.image, table):
        found.image.memory.write(place, value, "the table's address")
    text = found.image.memory.read(found.image.text.start, len(found.image.text))
    assert hashlib.sha256(text).hexdigest() == known.document.vmlinux_text_sha256


@pytest.mark.parametrize(
    ("key", "symbols", "known"),
    [("61", 82125, 0xFFFFFFFF81000000), ("612", 148055, 0xFFFFFFFF81000000)],
)
def test_symbols_are_found_in_a_stripped_kernel(key: str, symbols: int, known: int) -> None:
    assert len(kernel(key).symbols) == symbols
    assert kernel(key).symbols["_text"] == known
    assert kernel(key).symbols["__fentry__"] == host(f"{key}max").symbols["__fentry__"]


@pytest.mark.parametrize(
    ("key", "counts"),
    [
        ("61", {ALTERNATIVES: 4207, RETURNS: 45964, JUMPS: 5822, FTRACE: 35609}),
        ("612", {ALTERNATIVES: 8476, RETURNS: 55356, CALLS: 229649, JUMPS: 8749, FTRACE: 40339}),
    ],
)
def test_tables_hold_as_many_sites_in_text_as_were_counted(
    key: str, counts: dict[str, int]
) -> None:
    image = kernel(key).image()
    for name, count in counts.items():
        assert sum(site.address in image.text for site in sites(image, name)) == count, name


def test_relocation_words_lie_in_text_as_counted() -> None:
    words = kernel("61").words
    text = kernel("61").text
    low = text.address & 0xFFFFFFFF
    inside = [sum(0 <= (word & 0xFFFFFFFF) - low < text.size for word in found) for found in words]
    assert [len(found) > 0 for found in words] == [True, True, True]
    assert inside[0] < 100 < inside[1] < inside[2]


@pytest.mark.parametrize("start", [0xFFFFFFFF9B001000, 0xFFFFFFFF80000000, 0xFFFFFFFFC1000000])
def test_a_host_with_its_kernel_where_none_can_be_is_refused(start: int) -> None:
    where = host("61max")
    where.text = range(start, start + 0x1000000)
    with pytest.raises(Invalid, match="units of 2 MiB, up to 1 GiB"):
        bind_kernel(kernel("61"), where)


def test_moving_a_kernel_changes_what_its_relocation_words_name_and_no_more() -> None:
    moved = kernel("61").moved_to(0xFFFFFFFF9B000000)
    before, after = kernel("61").image(), moved.image()
    old = before.memory.read(before.text.start, len(before.text))
    new = bytearray(after.memory.read(after.text.start, len(after.text)))
    inside = [site for site in moved.moves() if site.address in after.text]
    assert len(inside) > 50000
    for address, length in inside:
        at = address - after.text.start
        assert new[at : at + length] != old[at : at + length]
        new[at : at + length] = old[at : at + length]
    assert new == old
    assert moved.symbols["_text"] == after.text.start
    assert moved.symbols["cpu_number"] == kernel("61").symbols["cpu_number"]


def test_a_stored_kernel_becomes_what_was_in_memory_where_kaslr_had_moved_it(
    tmp_path: Path,
) -> None:
    store, moved = Store(tmp_path), host("61kaslr")
    store.add_kernel(vmlinuz("61").read_bytes(), host("61max"))
    loader = Loader(store, moved, vfsmap.map, policy="redirect")
    loaded = loader.load("vmlinux")
    assert hashlib.sha256(loaded.text).hexdigest() == moved.document.vmlinux_text_sha256
    report = loader.report(loaded)
    assert not report.bound_here
    assert report.differing_sites > 50000
    loader.close()
    with pytest.raises(Sealed, match="vmlinux is persistent text and is never written"):
        Loader(store, moved, vfsmap.map, policy="refuse").load("vmlinux")


def test_a_cut_boot_image_is_refused_and_named() -> None:
    raw = vmlinuz("612").read_bytes()
    with pytest.raises(Damaged, match="vmlinuz"):
        Kernel(raw[: len(raw) // 2], "vmlinuz")


def test_a_boot_image_whose_end_promises_another_size_is_refused() -> None:
    raw = bytearray(vmlinuz("612").read_bytes())
    start, length = struct.unpack_from("<II", raw, 0x248)
    end = (raw[0x1F1] + 1) * 512 + start + length
    raw[end - 4 : end] = b"\1\0\0\0"
    with pytest.raises(Damaged, match="its end promises 1"):
        Kernel(bytes(raw), "vmlinuz")
