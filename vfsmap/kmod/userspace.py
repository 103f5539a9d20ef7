"""A host that is an ordinary process: modules below 2 GiB, their imports bound to stubs.

Kernel code reaches addresses by 32 bits with a sign, so all it names must lie in the lowest (or
the highest) 2 GiB.  Variables of a CPU are reached by way of the register GS, which an ordinary
process has to itself.  What only a kernel may do is patched away: the host claims to be a guest of
Xen whose paravirtual operations do nothing, without SMAP, without thunks.
"""

from typing import Final

from vfsmap.kmod.branches import RETHUNK, RETPOLINE, RETPOLINE_LFENCE
from vfsmap.kmod.derive import ALWAYS
from vfsmap.kmod.host import Document
from vfsmap.kmod.native import cpu_words
from vfsmap.units import KIB, MIB

STUBS: Final = 0x1000_0000
"""Code: first the thunks, then one slot for each function that a module imports."""
VARIABLES: Final = 0x1800_0000
"""Data: one slot for each variable that a module imports."""
PER_CPU: Final = 0x1C00_0000
"""What GS points to."""
IMAGES: Final = 0x4000_0000
IMAGES_END: Final = 0x7FE0_0000

SLOT: Final = 64
VARIABLE: Final = 16 * KIB
SLOTS_MAX: Final = (VARIABLES - STUBS) // SLOT
VARIABLES_MAX: Final = (PER_CPU - VARIABLES) // VARIABLE
PER_CPU_SIZE: Final = MIB

_THUNK: Final = 32
_LOW: Final = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi")
_REGISTERS: Final = (*_LOW, *(f"r{number}" for number in range(8, 16)))
FIRST_SLOT: Final = 16
"""Slots before it hold the thunks and what :data:`FIXED` names."""
FIXED: Final = {
    "__x86_indirect_thunk_array": STUBS,
    "__x86_return_thunk": STUBS + 8 * SLOT,
    "__fentry__": STUBS + 9 * SLOT,
    "_paravirt_nop": STUBS + 10 * SLOT,
    "nop_func": STUBS + 10 * SLOT,
    "BUG_func": STUBS + 11 * SLOT,
    "paravirt_BUG": STUBS + 11 * SLOT,
    "__static_call_return0": STUBS + 12 * SLOT,
    "__static_call_return": STUBS + 13 * SLOT,
    **{f"__x86_indirect_thunk_{r}": STUBS + _THUNK * i for i, r in enumerate(_REGISTERS)},
    # offsets from GS
    "fixed_percpu_data": 0,
    "__preempt_count": 0x100,
    "pcpu_hot": 0x200,
    "const_pcpu_hot": 0x200,
    "current_task": 0x200,
    "cpu_number": 0x300,
    "this_cpu_off": 0x308,
    "cpu_info": 0x400,
    # read at bind time only: every operation is patched to nothing
    "pv_ops": VARIABLES,
}
"""Symbols that have their places in every such host."""
FIRST_VARIABLE: Final = 1

_XENPV: Final = 8 * 32 + 16
_LA57: Final = 16 * 32 + 16
_REP_GOOD: Final = 3 * 32 + 16
_PV_SLOTS: Final = 128
_MASKED: Final = (RETPOLINE, RETPOLINE_LFENCE, RETHUNK, 9 * 32 + 20, _LA57)


def user_host(words: list[int] | None = None) -> Document:
    """Return the document of a process on this machine, or on one with other CPU features."""
    words = list(cpu_words() if words is None else words)
    for bit in _MASKED:
        words[bit >> 5] &= ~(1 << (bit & 31))
    for bit in (ALWAYS, _REP_GOOD, _XENPV):
        words[bit >> 5] |= 1 << (bit & 31)
    return Document(
        kernel="user space",
        x86_capability=words,
        kernel_text_va=hex(STUBS),
        vmlinux_text_len=VARIABLES - STUBS,
        kernel_symbols={name: hex(address) for name, address in FIXED.items()},
        pv_ops=[hex(FIXED["_paravirt_nop"])] * _PV_SLOTS,
        x86_return_thunk=hex(FIXED["__x86_return_thunk"]),
        user_space=True,
    )
