"""Mutated modules and kernels: bound, or refused by an error of ours; nothing else, ever.

Each mutant goes the whole way: reader, counting of sites, binding to a kernel's host and to user
space, store, loading on another host.  What is written is checked on the way: memory keeps its
size, text changes only where the plan of writes says so, and no file appears outside the store.
"""

import functools
import gzip
import lzma
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import zstandard

import vfsmap
from vfsmap.errors import VfsmapError
from vfsmap.kmod.bind import bases_at, bind, place_for
from vfsmap.kmod.elf import Elf
from vfsmap.kmod.host import MODULE_AREA, Host
from vfsmap.kmod.image import TABLES, Image
from vfsmap.kmod.kernel import Kernel, bind_kernel
from vfsmap.kmod.layout import Layout
from vfsmap.kmod.loader import Loader
from vfsmap.kmod.module import Module
from vfsmap.kmod.plan import kernel_write_set, keys_of, merged, module_names, write_set
from vfsmap.kmod.store import Store
from vfsmap.kmod.survey import survey_kernel, survey_module
from vfsmap.kmod.tables import Site
from vfsmap.kmod.userspace import user_host
from vfsmap.testing.kernels import modules, vmlinuz

DATA = Path(__file__).parents[1] / "data" / "kmod"
NAMES = ("nf_defrag_ipv4", "irqbypass", "libcrc32c", "reed_solomon", "ramoops")
BYTES = (0, 1, 0x7F, 0x80, 0xFF)
WORDS = (bytes(8), b"\xff" * 8, (1 << 63).to_bytes(8, "little"), (1 << 40).to_bytes(8, "little"))
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".ko": bytes,
    ".ko.xz": lambda raw: lzma.compress(raw, preset=0),
    ".ko.zst": lambda raw: zstandard.ZstdCompressor(level=1).compress(raw),
    ".ko.gz": lambda raw: gzip.compress(raw, 1, mtime=0),
}


@functools.cache
def host(profile: str) -> Host:
    path = DATA / profile / "host.json.xz"
    return Host.open(path if path.exists() else DATA / f"{profile}.json.xz")


@functools.cache
def unpacked(key: str, name: str) -> bytes:
    return bytes(Module.open(modules(key)[name]).elf.data)


def mutated(raw: bytes, rng: random.Random) -> bytes:
    """Return ``raw`` with a few bytes changed, often in its headers, sometimes cut."""
    changed = bytearray(raw)
    headers = int.from_bytes(raw[40:48], "little")
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place = rng.choice((len(raw), len(raw), 64, 0))
        at = rng.randrange(place) if place else rng.randrange(headers, len(raw))
        if rng.random() < 0.3:
            changed[at : at + 8] = rng.choice(WORDS)[: len(changed) - at]
        else:
            changed[at] = rng.choice((*BYTES, rng.randrange(256)))
    return bytes(changed[: rng.randrange(len(raw))] if rng.random() < 0.05 else changed)


def spoilt(raw: bytes, rng: random.Random) -> bytes:
    """Return a packed file with a byte changed or its end cut off."""
    changed = bytearray(raw)
    changed[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return bytes(changed[: rng.randrange(len(raw))] if rng.random() < 0.3 else changed)


def shape(image: Image) -> list[tuple[str, int, int]]:
    return [(r.name, r.start, len(r.data)) for r in image.memory.regions]


def require_planned(before: bytes, after: bytes, start: int, planned: list[Site]) -> None:
    """Check that text changed where a plan says so, and nowhere else."""
    rest = bytearray(after)
    for first, last in merged(planned):
        low, high = max(first - start, 0), max(last - start, 0)
        rest[low:high] = before[low:high]
    assert rest == before


def text_of(image: Image) -> bytes:
    return image.memory.upto(image.text.start, len(image.text))


def require_bound_within(module: Module, where: Host) -> None:
    """Bind a module; check that only its own memory is written, and its text only as planned."""
    bases = bases_at(MODULE_AREA, Layout(module))
    relocated = place_for(module, where, bases, lambda _: MODULE_AREA)
    before, regions = text_of(relocated.image), shape(relocated.image)
    bound = bind(module, where, bases, resolve=lambda _: MODULE_AREA)
    assert shape(bound.placed.image) == regions
    keys_of(bound.placed.image, module_names(bound.placed))
    require_planned(before, text_of(bound.placed.image), MODULE_AREA, write_set(relocated))
    assert not any(address in bound.placed.image.text for address in bound.elsewhere)


def require_loaded_within(module: Module, directory: Path) -> None:
    """Store and load a module, here and elsewhere; check that nothing is written but the store."""
    around = set(directory.parent.iterdir())
    store, here = Store(directory), Host(user_host())
    try:
        (variant,) = store.add([module], here)
        content = store.file(variant.pack, "text").read_bytes()
        for where in (here, Host(user_host([0] * 24))):
            loader = Loader(store, where, vfsmap.map, policy="redirect")
            with closing(loader):
                loader.report(loader.load(variant.name))
            assert store.file(variant.pack, "text").read_bytes() == content
    finally:
        assert set(directory.parent.iterdir()) == around | {directory}
        shutil.rmtree(directory)


def try_module(raw: bytes, file_name: str, key: str, directory: Path | None) -> str:
    """Take a file all the way; return how far it came."""
    reached = "refused"
    try:
        module = Module(raw, file_name)
        assert module.name
        assert module.info is not None
        assert module.versions is not None
        reached = "read"
        survey_module(module)
        require_bound_within(module, host(f"{key}max"))
        reached = "bound"
        if directory is not None:
            require_loaded_within(module, directory)
            reached = "loaded"
    except VfsmapError:
        pass
    return reached


def mutants(key: str, name: str, count: int) -> Iterator[tuple[bytes, str]]:
    rng = random.Random(f"{key} {name}")
    for number in range(count):
        raw = mutated(unpacked(key, name), rng)
        suffix = rng.choice(tuple(PACKERS)) if number % 4 == 0 else ".ko"
        packed = PACKERS[suffix](raw)
        if suffix != ".ko" and rng.random() < 0.5:
            packed = spoilt(packed, rng)
        yield packed, f"{name}{suffix}"


@pytest.mark.parametrize("key", ["61", "612"])
@pytest.mark.parametrize("name", NAMES)
def test_a_mutated_module_is_bound_and_loaded_or_refused(
    tmp_path: Path, key: str, name: str
) -> None:
    outcomes = Counter(
        # one in seven goes through the store, which writes megabytes
        try_module(raw, file_name, key, tmp_path / str(n) if n % 7 == 0 else None)
        for n, (raw, file_name) in enumerate(mutants(key, name, 70))
    )
    assert {"refused", "bound", "loaded"} <= set(outcomes)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["61", "612"])
@pytest.mark.parametrize("name", [*NAMES, "crc7", "lz4_compress", "nf_conntrack"])
def test_thousands_of_mutated_modules_are_bound_and_loaded_or_refused(
    tmp_path: Path, key: str, name: str
) -> None:
    for n, (raw, file_name) in enumerate(mutants(key, name, 1000)):
        try_module(raw, file_name, key, tmp_path / str(n) if n % 7 == 0 else None)


def test_a_mutated_boot_image_is_read_or_refused() -> None:
    rng = random.Random(1)
    raw = vmlinuz("612").read_bytes()[: 1 << 20]  # a cut one, so that unpacking ends soon
    for _ in range(100):
        changed = bytearray(raw)
        for _ in range(3):
            changed[rng.choice((rng.randrange(0x1F0, 0x270), rng.randrange(0x5000, 0x5400)))] = (
                rng.randrange(256)
            )
        with pytest.raises(VfsmapError):
            Kernel(bytes(changed), "vmlinuz")


def try_kernel(raw: bytes, key: str) -> str:
    """Take a kernel all the way; return how far it came."""
    reached = "refused"
    try:
        kernel = Kernel(raw, "vmlinux")
        reached = "read"
        before = kernel.image()
        survey_kernel(kernel)
        after = bind_kernel(kernel, host(f"{key}max")).image
        assert shape(after) == shape(before)
        names = [(value, 0, name) for name, value in kernel.symbols.items()]
        planned = kernel_write_set(before, names)
        require_planned(text_of(before), text_of(after), before.text.start, planned)
        reached = "bound"
    except VfsmapError:
        pass
    return reached


def mutated_kernel(elf: Elf, rng: random.Random) -> bytes:
    """Return a kernel with a few words changed: of its headers, or of what is to be patched."""
    raw = bytearray(elf.data)
    spans = [range(64, 400), range(elf.sections_end - 2560, len(raw))]
    for section in elf.sections:
        if section.name in TABLES:
            spans += [range(section.offset, section.offset + section.size)] * 2
    for _ in range(rng.choice((1, 2, 8))):
        at = min(rng.choice(rng.choice(spans)), len(raw) - 8)
        raw[at : at + 8] = rng.choice((*WORDS, rng.randbytes(8)))
    return bytes(raw)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["61", "612"])
def test_a_mutated_kernel_is_bound_or_refused(key: str) -> None:
    rng = random.Random(key)
    elf = Kernel.open(vmlinuz(key)).elf
    outcomes = Counter(try_kernel(mutated_kernel(elf, rng), key) for _ in range(40))
    assert set(outcomes) > {"refused"}
