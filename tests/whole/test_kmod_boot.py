"""Real kernels, booted now: what binding foretells is what they then have in memory."""

import pytest

from vfsmap.kmod.bind import bind, called_by
from vfsmap.kmod.host import Host
from vfsmap.kmod.kernel import Kernel, bind_kernel
from vfsmap.kmod.layout import Area
from vfsmap.kmod.module import Module
from vfsmap.testing.boots import booted
from vfsmap.testing.kernels import modules, vmlinuz
from vfsmap.testing.observed import describe

_FIRST = ["crc32c_generic", "libcrc32c", "reed_solomon"]
_LAST = [
    "ramoops",
    "irqbypass",
    "kvm",
    "nf_defrag_ipv6",
    "nf_defrag_ipv4",
    "nf_conntrack",
    "xfs",
]
NEEDED = {
    "61": [*_FIRST, "pstore_zone", *_LAST],
    "612": [*_FIRST, *_LAST],
}  # in the order in which they can be loaded


@pytest.mark.vm
@pytest.mark.parametrize(
    ("key", "cpu", "options"),
    [
        ("61", "EPYC-v3", ""),  # untrained returns
        ("612", "Skylake-Server-v4", "retbleed=stuff"),  # calls are counted
        ("612", "Cascadelake-Server-v5", "indirect_target_selection=force"),
        ("612", "max", "kaslr"),  # an option that no kernel knows
    ],
    ids=["61-zen", "612-stuff", "612-its", "612-kaslr"],
)
def test_text_of_a_kernel_and_its_modules_is_as_foretold(key: str, cpu: str, options: str) -> None:
    names = [name for name in NEEDED[key] if name in modules(key)]
    files = [Module.open(modules(key)[name]) for name in names]
    kernel = Kernel.open(vmlinuz(key))
    with booted(key, names, cpu=cpu, options=options, kaslr=options == "kaslr") as guest:
        where = Host(describe(guest, kernel, files))
        bound = [bind(module, where) for module in files]
        for found in bound:
            text = found.placed.area(Area.TEXT)
            name = found.placed.module.name
            assert text == guest.read(found.placed.image.text.start, len(text)), name
        image = bind_kernel(kernel, where, called_by(bound)).image
        size = len(image.text)
        assert image.memory.read(image.text.start, size) == guest.read(image.text.start, size)
