"""A mutex in shared memory that dies with its holder: no system call unless somebody waits.

A POSIX process-shared, robust, error-checking mutex of the C library (pthread_mutexattr_setrobust,
POSIX.1-2008).  Whoever can write its bytes can crash a process that uses it: share it only among
processes of one user.
"""

import ctypes
import errno
import os
import time
from enum import Enum
from typing import Final

from vfsmap.errors import MediumError
from vfsmap.pmem.libc import address_of

SIZE: Final = 64
"""Bytes to set aside, 8-byte aligned; a pthread_mutex_t has 40 on x86-64, 48 on arm64."""

_SHARED: Final = 1  # PTHREAD_PROCESS_SHARED
_ROBUST: Final = 1  # PTHREAD_MUTEX_ROBUST
_ERRORCHECK: Final = 2  # PTHREAD_MUTEX_ERRORCHECK, all three from glibc's pthread.h
_PATIENCE: Final = 0.1  # seconds that a wait lasts before Python's signal handlers get a chance

_fast = ctypes.PyDLL(None)  # keeps the interpreter lock: for what never blocks
_slow = ctypes.CDLL(None)


class _Timespec(ctypes.Structure):
    _fields_ = (("sec", ctypes.c_long), ("nsec", ctypes.c_long))


class Grip(Enum):
    """How a mutex was got."""

    CLEAN = "clean"
    ORPHANED = "orphaned"
    """The last holder died with it: what it guards may be half done."""
    REENTERED = "reentered"
    """This thread holds it already; there is nothing to unlock."""


class Mutex:
    """A mutex in ``memory``, which stays mapped as long as anybody uses it.

    For a path that can't afford a method call, ``try_lock(handle)`` and ``unlock(handle)`` are the
    bare functions: 0 from ``try_lock`` is a clean grip, anything else is handed to :meth:`wait`.
    """

    try_lock = _fast.pthread_mutex_trylock
    unlock = _fast.pthread_mutex_unlock

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self.handle = ctypes.c_void_p(address_of(memory))

    def create(self) -> None:
        """Make a fresh, unlocked mutex of the memory; before anybody else uses it."""
        attributes = ctypes.create_string_buffer(64)
        _require(_slow.pthread_mutexattr_init(attributes))
        _require(_slow.pthread_mutexattr_setpshared(attributes, _SHARED))
        _require(_slow.pthread_mutexattr_setrobust(attributes, _ROBUST))
        _require(_slow.pthread_mutexattr_settype(attributes, _ERRORCHECK))
        _require(_slow.pthread_mutex_init(self.handle, attributes))

    def lock(self) -> Grip:
        """Lock, waiting as long as it takes; signals are handled meanwhile."""
        result = _fast.pthread_mutex_trylock(self.handle)
        return Grip.CLEAN if result == 0 else self.wait(result)

    def wait(self, result: int) -> Grip:
        """Go on from where ``try_lock`` failed with ``result``.

        After an orphaned grip the caller mends what is guarded, then calls :meth:`mend`; should it
        die before that, the next one gets the mutex orphaned as well.

        Raises:
            MediumError: the mutex was overwritten.
        """
        while result in (errno.EBUSY, errno.ETIMEDOUT):
            until = time.time() + _PATIENCE
            limit = _Timespec(int(until), int(until % 1 * 1e9))
            result = _slow.pthread_mutex_timedlock(self.handle, ctypes.byref(limit))
        if result == errno.EDEADLK:
            return Grip.REENTERED
        if result == errno.EOWNERDEAD:
            return Grip.ORPHANED
        _require(result)
        return Grip.CLEAN

    def mend(self) -> None:
        """Say that what the mutex guards is whole again; without it nobody can lock any more."""
        _require(_fast.pthread_mutex_consistent(self.handle))

    def release(self) -> None:
        """Unlock."""
        _require(_fast.pthread_mutex_unlock(self.handle))


def _require(result: int) -> None:
    if result:
        raise MediumError(f"a shared mutex can't be used: {os.strerror(result)}")
