"""What a process says when its pool is taken from under it.

A store to mapped bytes that are not there any more (somebody has truncated the file, or the medium
has failed) raises SIGBUS, which ends the process without a word.  Here it gets some.
"""

import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, NoReturn

from vfsmap.errors import MediumError
from vfsmap.pmem import libc
from vfsmap.pmem.pmem import Pmem
from vfsmap.units import format_size

_ADDRESS_AT: Final = 16
"""Where siginfo_t has si_addr on 64-bit machines."""


def require_whole(pmem: Pmem) -> None:
    """Do nothing when a pool's file is as long as what is mapped of it.

    Raises:
        MediumError: it is not; the next touch of the missing bytes would be SIGBUS.
    """
    if pmem.medium.can_punch and os.fstat(pmem.fd).st_size < pmem.size:
        size = format_size(os.fstat(pmem.fd).st_size)
        raise MediumError(
            f"{pmem.path} was truncated to {size} while {format_size(pmem.size)} of it were in "
            f"use; restore it from a copy"
        )


@contextmanager
def bus_errors_told(pmem: Pmem, end: Callable[[str], NoReturn]) -> Iterator[None]:
    """Have a bus error in the pool's mapping call ``end`` with what is wrong, not just end us.

    The call comes in the middle of whatever touched the pool, in any thread, so ``end`` must not
    return, and must not touch the pool.

    Crash: as the death of the process, at any store.
    """

    def on_bus_error(_number: int, info: int, _context: Any) -> None:
        address = ctypes.c_void_p.from_address(info + _ADDRESS_AT).value or 0
        offset = address - start
        if 0 <= offset < pmem.size:
            try:
                require_whole(pmem)
                end(f"{pmem.path} can't be read or written at {offset:#x}: the medium has failed")
            except MediumError as exc:
                end(str(exc))
        libc.sigaction(signal.SIGBUS, old)  # not ours: it comes again, to whoever was there before

    start = libc.address_of(pmem.view)
    action = libc.SigAction(libc.SignalHandler(on_bus_error), flags=libc.SA_SIGINFO)
    old = libc.sigaction(signal.SIGBUS, action)
    try:
        yield
    finally:
        libc.sigaction(signal.SIGBUS, old)
