"""A host's document for the kernel that runs here, as far as it can be seen from outside.

Symbols come from ``/proc/kallsyms``, module addresses from ``/sys/module``, the CPU's features from
the CPU, mitigations from what the kernel says about vulnerabilities.  What only its memory would
tell (``pv_ops``, states of keys) is left out.

Source: arch/x86/include/asm/cpufeatures.h, arch/x86/kernel/cpu/bugs.c.
"""

import os
import re
from pathlib import Path
from typing import Final

from vfsmap.errors import Denied
from vfsmap.kmod.branches import CALL_DEPTH, RETHUNK, RETPOLINE, RETPOLINE_LFENCE
from vfsmap.kmod.host import KERNEL_TEXT, Document, ModuleDocument, Numbers
from vfsmap.kmod.image import NEW, OLD
from vfsmap.kmod.native import cpu_words

ALWAYS: Final = 3 * 32 + 21
UNRET: Final = 11 * 32 + 15
UP: Final = 3 * 32 + 9
_SMAP: Final = 9 * 32 + 20
_LINUX_FLAGS: Final = {
    "constant_tsc": 3 * 32 + 8,
    "up": UP,
    "rep_good": 3 * 32 + 16,
    "nopl": 3 * 32 + 20,
    "xtopology": 3 * 32 + 22,
    "tsc_reliable": 3 * 32 + 23,
    "nonstop_tsc": 3 * 32 + 24,
    "pti": 7 * 32 + 11,
    "ibrs": 7 * 32 + 25,
    "ibpb": 7 * 32 + 26,
    "stibp": 7 * 32 + 27,
    "vmmcall": 8 * 32 + 15,
}
"""Features that Linux defines and shows; the CPU knows nothing of them."""
_PREFIXES: Final = ("__start_", "__stop_", "__x86_", "__SCK__", "__SCT__")
_LINE: Final = re.compile(r"([0-9a-f]+) (\S) (\S+)(?:\t\[(\S+)\])?")


def running_host(root: Path = Path("/")) -> Document:
    """Return the document of the running kernel.

    Raises:
        Denied: the kernel hides its addresses from this user.
    """
    symbols, of_modules = _symbols(root / "proc/kallsyms")
    if not any(symbols.values()):
        raise Denied("/proc/kallsyms hides all addresses; run as root, with kernel.kptr_restrict=0")
    flags = _cpu_flags(root / "proc/cpuinfo")
    vulnerabilities = _vulnerabilities(root / "sys/devices/system/cpu/vulnerabilities")
    text = symbols.get("_text", KERNEL_TEXT)
    document = Document(
        kernel=_first_line(root / "proc/sys/kernel/osrelease"),
        x86_capability=capability(flags, vulnerabilities),
        kernel_text_va=hex(text),
        vmlinux_text_len=max(0, symbols.get("_etext", text) - text),
        kernel_symbols={name: hex(address) for name, address in symbols.items()},
        cpu_flags=sorted(flags),
        vulnerabilities=vulnerabilities,
        la57="la57" in flags,
        cmdline=_first_line(root / "proc/cmdline"),
        modules=_modules(root / "sys/module", of_modules),
    )
    thunk = return_thunk(vulnerabilities, symbols)
    if thunk is not None:
        document.x86_return_thunk = hex(thunk)
    document.call_depth = bool(document.x86_capability[CALL_DEPTH >> 5] >> (CALL_DEPTH & 31) & 1)
    document.uniproc_patched = "up" in flags or os.cpu_count() == 1
    return document


def capability(flags: set[str], vulnerabilities: list[str]) -> list[int]:
    """Return the words of features of this CPU under a kernel that says so about itself."""
    words = cpu_words()
    wanted = {ALWAYS, *(bit for name, bit in _LINUX_FLAGS.items() if name in flags)}
    wanted |= mitigations(vulnerabilities)
    for bit in wanted:
        words[bit >> 5] |= 1 << (bit & 31)
    if flags and "smap" not in flags:
        words[_SMAP >> 5] &= ~(1 << (_SMAP & 31))
    return words


def mitigations(vulnerabilities: list[str]) -> set[int]:
    """Return the features that stand for the mitigations in use."""
    states = dict(line.partition(":")[::2] for line in vulnerabilities if ":" in line)
    spectre, bleed = states.get("spectre_v2", ""), states.get("retbleed", "")
    found: set[int] = set()
    if "Retpolines" in spectre or "Retpoline" in spectre.partition(";")[0]:
        found.add(RETPOLINE)
    if "LFENCE" in spectre:
        found |= {RETPOLINE, RETPOLINE_LFENCE}
    if "untrained return thunk" in bleed:
        found |= {RETHUNK, UNRET}
    if "Stuffing" in bleed:
        found |= {RETHUNK, CALL_DEPTH}
    if "safe ret" in states.get("spec_rstack_overflow", "").lower():
        found.add(RETHUNK)
    if "Aligned branch/return thunks" in states.get("indirect_target_selection", ""):
        found.add(RETHUNK)
        if RETPOLINE not in found:  # they are safe by themselves
            found |= {OLD.its_feature, NEW.its_feature}
    return found


def return_thunk(vulnerabilities: list[str], symbols: dict[str, int]) -> int | None:
    """Return the return thunk that the mitigations in use call for, if it can be told."""
    states = dict(line.partition(":")[::2] for line in vulnerabilities if ":" in line)
    name = "__x86_return_thunk"
    if "safe ret" in states.get("spec_rstack_overflow", "").lower():
        name = "srso_return_thunk"
    elif "untrained return thunk" in states.get("retbleed", ""):
        name = "retbleed_return_thunk"
    elif "Stuffing" in states.get("retbleed", ""):
        name = "call_depth_return_thunk"
    elif "Aligned branch/return thunks" in states.get("indirect_target_selection", ""):
        name = "its_return_thunk"
    return symbols.get(name)


def _first_line(path: Path) -> str:
    return path.read_text().partition("\n")[0] if path.exists() else ""


def _cpu_flags(path: Path) -> set[str]:
    for line in path.read_text().splitlines() if path.exists() else []:
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return set(value.split())
    return set()


def _vulnerabilities(directory: Path) -> list[str]:
    return [f"{path.name}:{_first_line(path)}" for path in sorted(directory.glob("*"))]


def _symbols(path: Path) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """Return the kernel's symbols, and those of each module."""
    kernel: dict[str, int] = {}
    modules: dict[str, dict[str, int]] = {}
    for line in path.read_text().splitlines():
        match = _LINE.fullmatch(line)
        if match is None:
            continue
        address, kind, name, owner = match.groups()
        if owner:
            modules.setdefault(owner, {}).setdefault(name, int(address, 16))
        elif kind.isupper() or name.startswith(_PREFIXES):
            kernel.setdefault(name, int(address, 16))
    return kernel, modules


def _modules(directory: Path, symbols: dict[str, dict[str, int]]) -> dict[str, ModuleDocument]:
    found = {}
    for place in sorted(directory.glob("*/sections")):
        sections: Numbers = {
            path.name: _first_line(path) for path in sorted(place.iterdir()) if path.is_file()
        }
        name = place.parent.name
        text = str(sections.get(".text", 0))
        exported: Numbers = {
            symbol: hex(address) for symbol, address in symbols.get(name, {}).items()
        }
        # what it exports others may import; the key is how imports are looked up
        found[name] = ModuleDocument(sections=sections, text_base=text, imports=exported)
    return found
