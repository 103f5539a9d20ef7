"""Huge pages for the memory that the bytes of a write pass through."""

import ctypes
from pathlib import Path
from typing import Final

from vfsmap.pmem import libc
from vfsmap.units import MIB, PMD, align_down, align_up

ROOM: Final = 8 * MIB
"""The buffers of some writes at the same time; of each, libfuse's and pyfuse3's."""
_M_TRIM_THRESHOLD: Final = -1  # glibc's malloc.h
_M_MMAP_THRESHOLD: Final = -3


def use_huge_pages() -> None:
    """Ask for huge pages for the C library's heap, and :data:`ROOM` more of it (decision 0025).

    What is not used of the room takes no memory.  From now on blocks of up to half of it come from
    the heap, and stay there when they are freed.  Where the C library is not glibc nothing happens,
    and the kernel may refuse.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        return
    library.sbrk.argtypes, library.sbrk.restype = (ctypes.c_ssize_t,), ctypes.c_void_p
    library.malloc.argtypes, library.malloc.restype = (ctypes.c_size_t,), ctypes.c_void_p
    library.free.argtypes = (ctypes.c_void_p,)
    used = library.sbrk(0)
    library.mallopt(_M_TRIM_THRESHOLD, 2 * ROOM)
    library.mallopt(_M_MMAP_THRESHOLD, 2 * ROOM)
    library.free(library.malloc(ROOM))
    library.mallopt(_M_MMAP_THRESHOLD, ROOM // 2)
    start, end = align_up(_start(), PMD.size), align_down(library.sbrk(0), PMD.size)
    if start < end and libc.try_madvise(start, end - start, libc.MADV_HUGEPAGE):
        libc.try_collapse(start, min(align_up(used, PMD.size), end) - start)


def _start() -> int:
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return int(fields[47 - 3])  # start_brk is the 47th, proc_pid_stat(5), and these begin with 3
