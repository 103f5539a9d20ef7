"""A host's document made from a guest that was booted: what binding has to reproduce."""

import hashlib
import struct
from collections.abc import Iterable
from typing import Final

from vfsmap.kmod import tables
from vfsmap.kmod.bind import place_for
from vfsmap.kmod.host import Document, Host, ModuleDocument
from vfsmap.kmod.image import RETPOLINES, Image
from vfsmap.kmod.kernel import Kernel
from vfsmap.kmod.layout import PERCPU, Area, Layout
from vfsmap.kmod.module import Module
from vfsmap.testing.boots import Guest
from vfsmap.units import PTE, align_down

_CAPABILITY: Final = {12: 40, 14: 48}  # in struct cpuinfo_x86, by the size of an alternative
_PV_SLOTS: Final = 128
_CALL_DEPTH: Final = 19  # bit of word 11
_WANTED: Final = frozenset(
    [
        "BUG_func",
        "__fentry__",
        "__static_call_return",
        "__static_call_return0",
        "__switch_to_asm",
        "__x86_return_thunk",
        "_etext",
        "_paravirt_ident_64",
        "_paravirt_nop",
        "_text",
        "call_depth_return_thunk",
        "error_entry",
        "its_return_thunk",
        "nop_func",
        "paranoid_entry",
        "paravirt_BUG",
        "pcpu_hot",
        "pv_ops",
        "relocate_kernel",
        "ret_from_fork",
        "retbleed_return_thunk",
        "soft_restart_cpu",
        "srso_alias_return_thunk",
        "srso_return_thunk",
        "xen_error_entry",
    ]
)
_PREFIXES: Final = ("__start_", "__stop_", "__x86_indirect_", "__SCK__", "__SCT__")


def describe(guest: Guest, kernel: Kernel, files: Iterable[Module]) -> Document:
    """Return everything that the guest's boot decided."""
    symbols = guest.symbols
    kernel = kernel.moved_to(symbols["_text"])
    text = range(symbols["_text"], symbols["_text"] + kernel.text.size)
    capability = symbols["boot_cpu_data"] + _CAPABILITY[kernel.dialect.alternative_size]
    flags = next((line for line in guest.told["cpuinfo"] if line.startswith("flags")), "")
    words = list(struct.unpack("<24I", guest.read(capability, 96)))
    thunk = symbols.get("x86_return_thunk")
    document = Document(
        kernel=kernel.release,
        x86_capability=words,
        kernel_text_va=hex(text.start),
        vmlinux_text_len=len(text),
        vmlinux_text_sha256=hashlib.sha256(guest.read(text.start, len(text))).hexdigest(),
        pv_ops=[hex(guest.u64(symbols["pv_ops"] + 8 * slot)) for slot in range(_PV_SLOTS)],
        x86_return_thunk=hex(guest.u64(thunk) if thunk else symbols["__x86_return_thunk"]),
        cpu_flags=sorted(flags.partition(":")[2].split()),
        vulnerabilities=guest.told["vulnerabilities"],
        la57=guest.levels == 5,
        cmdline=next(x for x in guest.told["console"] if "Command line" in x).split(": ", 1)[1],
        call_depth=bool(words[11] >> _CALL_DEPTH & 1),
        uniproc_patched=guest.read(symbols["uniproc_patched"], 1) != b"\0",
        kernel_symbols={
            name: hex(address)
            for name, address in symbols.items()
            if name in _WANTED or name.startswith(_PREFIXES)
        },
        tramp_to_key={hex(trampoline): hex(key) for trampoline, key in _trampolines(guest)},
    )
    image = kernel.image()
    document.static_key_enabled, document.static_call_func = _states(guest, image, changed=True)
    document.runtime_constants = _constants(guest, image)
    document.its_pages = list(map(hex, _thunk_pages(guest, image)))
    for module in files:
        document.modules[module.name] = _describe_module(guest, module)
    host = Host(document)
    for module in files:
        found = document.modules[module.name]
        placed = place_for(module, host)
        found.static_key_enabled, found.static_call_func = _states(guest, placed.image)
        found.its_pages = list(map(hex, _thunk_pages(guest, placed.image)))
    return document


def _trampolines(guest: Guest) -> Iterable[tuple[int, int]]:
    start = guest.symbols["__start_static_call_tramp_key"]
    end = guest.symbols["__stop_static_call_tramp_key"]
    raw = guest.read(start, end - start)
    for at, (trampoline, key) in zip(
        range(start, end, 8), struct.iter_unpack("<ii", raw), strict=True
    ):
        yield at + trampoline, at + 4 + key


def _states(
    guest: Guest, image: Image, *, changed: bool = False
) -> tuple[dict[str, int], dict[str, str | int]]:
    """Return the states of keys and the functions of static calls, all or those that changed."""
    memory = image.memory
    keys: dict[str, int] = {}
    for key in {jump.key for jump in tables.jumps(image)}:
        (state,) = struct.unpack("<i", guest.read(key, 4))
        if not (changed and key in memory and (memory.s32(key) > 0) == (state > 0)):
            keys[hex(key)] = state
    calls: dict[str, str | int] = {}
    known = dict(_trampolines(guest))
    targets = {known.get(site.key, site.key) for site in tables.static_calls(image)}
    if changed:  # keys that nothing but trampolines follow
        names = guest.symbols.items()
        targets |= {address for name, address in names if name.startswith("__SCK__")}
    for key in targets:
        function = guest.u64(key)
        if not (changed and key in memory and memory.u64(key) == function):
            calls[hex(key)] = hex(function)
    return keys, calls


def _constants(guest: Guest, image: Image) -> dict[str, str | int]:
    found: dict[str, str | int] = {}
    for name, span in image.runtime_constants.items():
        _, kind, variable = name.split("_", 2)
        size = 8 if kind == "ptr" else 1
        for place in tables.constants(image, span)[:1]:
            found[variable] = hex(int.from_bytes(guest.read(place, size), "little"))
    return found


def _thunk_pages(guest: Guest, image: Image) -> list[int]:
    """Return the pages that indirect branches go by way of, in the order of their making."""
    array = guest.symbols["__x86_indirect_thunk_array"]
    pages: list[int] = []
    for address in tables.offsets(image, RETPOLINES):
        code = guest.read(address, 6)
        code = code[1:] if code[0] == 0x2E else code[:5]
        if code[0] not in (0xE8, 0xE9):
            continue
        end = address + (6 if guest.read(address, 1) == b"\x2e" else 5)
        page = align_down(end + int.from_bytes(code[1:], "little", signed=True), PTE.size)
        near = abs(page - array) < 8 * PTE.size
        if not near and page not in image.text and page not in pages and address in image.text:
            pages.append(page)
    return pages


def _describe_module(guest: Guest, module: Module) -> ModuleDocument:
    sections: dict[str, str | int] = {}
    for line in guest.told["sections"]:
        path, address = line.split()
        owner, _, section = path.split("/")
        if owner == module.name:
            sections[section] = address
    layout = Layout(module)
    number = next(n for n, spot in layout.places.items() if spot.area is Area.TEXT)
    name = module.elf.sections[number].name
    base = int(str(sections[name]), 16) - layout.places[number].offset
    size = layout.sizes[Area.TEXT]
    return ModuleDocument(
        sections=sections,
        percpu_base=hex(_percpu_base(guest, module)),
        imports=_imports(guest, module),
        text_base=hex(base),
        text_len=size,
        text_sha256=hashlib.sha256(guest.read(base, size)).hexdigest(),
    )


def _percpu_base(guest: Guest, module: Module) -> int:
    """Return where the module's variables lie in every CPU's area, told by one of them."""
    section = module.elf.by_name.get(PERCPU)
    values = {
        s.name: s.value for s in module.elf.symbols if section and s.section == section.number
    }
    for line in guest.told["kallsyms"]:
        address, _, name, *owner = line.split()
        if owner == [f"[{module.name}]"] and name in values:
            return int(address, 16) - values[name]
    return 0


def _imports(guest: Guest, module: Module) -> dict[str, str | int]:
    wanted = set(module.imports)
    found: dict[str, str | int] = {}
    for line in guest.told["kallsyms"]:
        address, kind, name = line.split()[:3]
        if name in wanted and (kind.isupper() or name not in found):
            found[name] = "0x" + address
    return found
