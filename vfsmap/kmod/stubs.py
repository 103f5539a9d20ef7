"""Stand-ins for what modules import from a kernel, so that their functions run in a process.

Most are the C library's functions of the same meaning; many do nothing, since there is nobody else
in the process; the rest end the process and name themselves.
"""

import ctypes
import os
import struct
from collections.abc import Callable, Iterable
from typing import Any, Final

from vfsmap.kmod.native import address_of
from vfsmap.kmod.userspace import FIXED, PER_CPU, PER_CPU_SIZE, SLOT, STUBS, VARIABLE, VARIABLES
from vfsmap.pmem import libc
from vfsmap.units import PTE, align_up

_RETURN: Final = b"\xc3"
_RETURN_0: Final = bytes.fromhex("31c0c3")
_RETURN_1: Final = bytes.fromhex("b801000000c3")
_ENTER: Final = bytes.fromhex("554889e54883e4f0")  # the kernel aligns stacks to 8, C to 16
_CALL: Final = bytes.fromhex("48b8")  # mov $..., %rax
_LEAVE: Final = bytes.fromhex("ffd0c9c3")
_ZEROED: Final = bytes.fromhex("be01000000")  # the second argument is 1: calloc(size, 1)
_THIRD_SIZE: Final = bytes.fromhex("4889d7")  # the first argument is the third

_SAME: Final = frozenset(
    (
        "memcpy",
        "memmove",
        "memset",
        "memcmp",
        "memchr",
        "strlen",
        "strnlen",
        "strcmp",
        "strncmp",
        "strcpy",
        "strncpy",
        "strchr",
        "strrchr",
        "strstr",
        "strcat",
        "strncat",
        "strspn",
        "strcspn",
        "strpbrk",
        "strcasecmp",
        "strncasecmp",
    )
)
_OTHER_NAMES: Final = {
    "__memcpy": "memcpy",
    "__memmove": "memmove",
    "__memset": "memset",
    "kfree": "free",
    "kvfree": "free",
    "vfree": "free",
    "kfree_sensitive": "free",
    "bcmp": "memcmp",
}
_BY_FIRST: Final = frozenset(
    (
        "__kmalloc",
        "__kmalloc_noprof",
        "vmalloc",
        "vzalloc",
        "vmalloc_noprof",
        "vzalloc_noprof",
        "kvmalloc_node",
        "__kvmalloc_node_noprof",
        "__vmalloc",
        "__vmalloc_noprof",
        "__kmalloc_large_noprof",
        "kmalloc_large",
        "__kmalloc_node",
        "__kmalloc_node_noprof",
    )
)
_BY_THIRD: Final = frozenset(("kmalloc_trace", "__kmalloc_cache_noprof"))
_NOTHING: Final = frozenset(
    (
        "mutex_lock",
        "mutex_unlock",
        "__mutex_init",
        "_raw_spin_lock",
        "_raw_spin_unlock",
        "_raw_spin_lock_bh",
        "_raw_spin_unlock_bh",
        "_raw_spin_lock_irq",
        "_raw_spin_unlock_irq",
        "_raw_spin_unlock_irqrestore",
        "kernel_fpu_begin_mask",
        "kernel_fpu_end",
        "__local_bh_enable_ip",
        "__rcu_read_lock",
        "__rcu_read_unlock",
        "synchronize_rcu",
        "preempt_schedule",
        "preempt_schedule_notrace",
        "__SCT__preempt_schedule",
        "__SCT__preempt_schedule_notrace",
        "_printk",
        "__warn_printk",
        "__dynamic_pr_debug",
        "module_put",
        "__module_get",
        "call_rcu",
        "rcu_barrier",
        "kmsan_unpoison_memory",
        "add_taint",
    )
)
_ZERO: Final = frozenset(
    (
        "__SCT__cond_resched",
        "__SCT__might_resched",
        "__cond_resched",
        "_raw_spin_lock_irqsave",
        "_raw_spin_trylock",
        "_copy_to_user",
        "_copy_from_user",
    )
)
_ONE: Final = frozenset(
    (
        "__list_add_valid",
        "__list_del_entry_valid",
        "__list_add_valid_or_report",
        "irq_fpu_usable",
        "__list_del_entry_valid_or_report",
        "try_module_get",
        "mutex_trylock",
    )
)
_BIT_COUNTS: Final = {
    "__sw_hweight32": bytes.fromhex("f30fb8c7c3"),
    "__sw_hweight64": bytes.fromhex("f3480fb8c7c3"),
}
_CAPABILITY_OFFSETS: Final = (40, 48)  # in struct cpuinfo_x86: of 6.1, of 6.12


def code_of(name: str, trap: Callable[[str], int]) -> bytes:
    """Return the machine code of a stub; ``trap`` gives the address of what ends the process."""
    if name in _BIT_COUNTS:
        return _BIT_COUNTS[name]
    if name in _NOTHING:
        return _RETURN
    if name in _ZERO or name.startswith("__SCT__"):
        return _RETURN_0
    if name in _ONE:
        return _RETURN_1
    if name in _SAME or name in _OTHER_NAMES:
        return _into(address_of(_OTHER_NAMES.get(name, name)))
    if name in _BY_FIRST:
        return _into(address_of("calloc"), _ZEROED)
    if name in _BY_THIRD:
        return _into(address_of("calloc"), _THIRD_SIZE + _ZEROED)
    return _into(trap(name))


def _into(function: int, prepare: bytes = b"") -> bytes:
    """Return code that calls a function of the process on an aligned stack."""
    return prepare + _ENTER + _CALL + struct.pack("<Q", function) + _LEAVE


class Runtime:
    """The stubs of one process, in place; it lives as long as the process."""

    def __init__(
        self,
        functions: Iterable[tuple[str, int]],
        variables: Iterable[tuple[str, int]],
        capability: Iterable[int],
        on_trap: Callable[[str], None],
    ) -> None:
        """Install a stub at each function's address and room at each variable's; set GS.

        Raises:
            OSError: something else lies at those addresses.
        """
        self._on_trap = on_trap
        self._callbacks: list[Any] = []
        found = [*functions, *((n, a) for n, a in FIXED.items() if STUBS <= a < VARIABLES)]
        self._write_stubs(found)
        words = struct.pack("<24I", *capability)
        variables = list(variables)
        end = max([VARIABLES, *(address for _, address in variables)]) + VARIABLE
        _new_memory(VARIABLES, end - VARIABLES)
        _new_memory(PER_CPU, PER_CPU_SIZE)
        for name, address in [*variables, ("cpu_info", PER_CPU + FIXED["cpu_info"])]:
            if name in ("boot_cpu_data", "cpu_info"):
                for offset in _CAPABILITY_OFFSETS:
                    ctypes.memmove(address + offset, words, len(words))
        set_gs(PER_CPU)

    def _write_stubs(self, functions: list[tuple[str, int]]) -> None:
        end = max(address for _, address in functions) + SLOT
        length = align_up(end - STUBS, PTE.size)
        _new_memory(STUBS, length)
        for name, address in functions:
            code = _RETURN_0 if address < STUBS + 8 * SLOT else code_of(name, self._trap)
            if name in ("__fentry__", "__x86_return_thunk", "_paravirt_nop", "nop_func"):
                code = _RETURN
            ctypes.memmove(address, code, len(code))
        libc.mprotect(STUBS, length, libc.PROT_READ | libc.PROT_EXEC)

    def _trap(self, name: str) -> int:
        """Return the address of a function that reports a call of ``name`` and never returns."""

        def report() -> int:
            self._on_trap(name)
            os._exit(1)

        callback = ctypes.CFUNCTYPE(ctypes.c_uint64)(report)
        self._callbacks.append(callback)
        return int(ctypes.cast(callback, ctypes.c_void_p).value or 0)


def _new_memory(address: int, length: int) -> None:
    flags = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS | libc.MAP_FIXED_NOREPLACE
    libc.mmap(address, align_up(length, PTE.size), libc.PROT_READ | libc.PROT_WRITE, flags)


_ARCH_PRCTL, _ARCH_SET_GS = 158, 0x1001


def set_gs(address: int) -> None:
    """Let the register GS of this thread point to an address."""
    library = ctypes.CDLL(None, use_errno=True)
    if library.syscall(
        ctypes.c_long(_ARCH_PRCTL), ctypes.c_long(_ARCH_SET_GS), ctypes.c_ulong(address)
    ):
        raise OSError(ctypes.get_errno(), "arch_prctl")
