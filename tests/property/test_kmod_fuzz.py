"""Mutated modules and kernels: bound, or refused by an error of ours; nothing else, ever."""

import functools
import random
from pathlib import Path

import pytest

from vfsmap.errors import VfsmapError
from vfsmap.kmod.bind import bases_at, bind
from vfsmap.kmod.host import MODULE_AREA, Host
from vfsmap.kmod.kernel import Kernel
from vfsmap.kmod.layout import Layout
from vfsmap.kmod.module import Module
from vfsmap.kmod.plan import keys_of, module_names, write_set
from vfsmap.kmod.survey import survey_module
from vfsmap.testing.kernels import modules, vmlinuz

DATA = Path(__file__).parents[1] / "data" / "kmod"
NAMES = ("nf_defrag_ipv4", "irqbypass", "libcrc32c", "reed_solomon", "ramoops")
BYTES = (0, 1, 0x7F, 0x80, 0xFF)
WORDS = (bytes(8), b"\xff" * 8, (1 << 63).to_bytes(8, "little"), (1 << 40).to_bytes(8, "little"))


@functools.cache
def host(key: str) -> Host:
    return Host.open(DATA / f"{key}max" / "host.json.xz")


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


@pytest.mark.parametrize("key", ["61", "612"])
@pytest.mark.parametrize("name", NAMES)
def test_a_mutated_module_is_bound_or_refused(key: str, name: str) -> None:
    rng = random.Random(f"{key} {name}")
    outcomes = set()
    for _ in range(60):
        raw = mutated(unpacked(key, name), rng)
        try:
            module = Module(raw, f"{name}.ko")
            assert module.name
            assert module.info is not None
            assert module.versions is not None
            survey_module(module)
            bases = bases_at(MODULE_AREA, Layout(module))
            bound = bind(module, host(key), bases, resolve=lambda _: MODULE_AREA)
            keys_of(bound.placed.image, module_names(bound.placed))
            write_set(bound.placed)
            outcomes.add("bound")
        except VfsmapError:
            outcomes.add("refused")
    assert outcomes == {"bound", "refused"}


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
