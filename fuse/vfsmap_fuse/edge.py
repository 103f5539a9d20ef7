"""The one place where an error becomes an errno for the kernel.

A handler is written as a plain method of something that has a ``fs``; the decorators here make it
what pyfuse3 calls.  Each request is counted under its handler's name.  A VfsmapError is answered
with its errno, and a want of memory or descriptors with that, when the pool is known to be as it
was.  Anything else is a bug of ours: it is logged with its traceback and answered with EIO, and the
pool turns read-only, since nobody knows what the bug has left behind; the mount lives on.
"""

import logging
import os
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from functools import wraps
from typing import Any, Protocol, TypeVar, TypeVarTuple

from pyfuse3 import FUSEError

from vfsmap.errors import MediumError, ReadOnly, VfsmapError, shortage
from vfsmap.fs import FileSystem
from vfsmap.tally import Tallies, clock

log = logging.getLogger("vfsmap.fuse")


class HasFs(Protocol):
    """What a handler belongs to."""

    fs: FileSystem
    tallies: Tallies


S = TypeVar("S", bound=HasFs)
Ts = TypeVarTuple("Ts")
R = TypeVar("R")


def answered(
    handler: Callable[[S, *Ts], R],
) -> Callable[[S, *Ts], Coroutine[Any, Any, R]]:
    """Make a method that never waits a request handler."""
    name = handler.__name__

    @wraps(handler)
    async def answer(self: S, *args: *Ts) -> R:
        began = clock()
        doubts = self.fs.pool.journal.doubts
        try:
            return handler(self, *args)
        except Exception as exc:
            self.tallies[name].errors += 1
            raise _answer(self.fs, name, exc, doubts) from exc
        finally:
            self.tallies[name].note(clock() - began)

    return answer


def answered_later(
    handler: Callable[[S, *Ts], Awaitable[R]],
) -> Callable[[S, *Ts], Coroutine[Any, Any, R]]:
    """Make a method that may wait a request handler."""
    name = handler.__name__

    @wraps(handler)
    async def answer(self: S, *args: *Ts) -> R:
        began = clock()
        doubts = self.fs.pool.journal.doubts
        try:
            return await handler(self, *args)
        except Exception as exc:
            self.tallies[name].errors += 1
            raise _answer(self.fs, name, exc, doubts) from exc
        finally:
            self.tallies[name].note(clock() - began)

    return answer


def _answer(fs: FileSystem, name: str, exc: Exception, doubts: int) -> FUSEError:
    if isinstance(exc, FUSEError):
        return exc
    if isinstance(exc, VfsmapError):
        if isinstance(exc, MediumError):
            state = "; the pool is read-only from now on" if fs.pool.failed else ""
            log.error("%s: %s%s", name, exc, state)
        return FUSEError(exc.errno)
    short_of = shortage(exc)
    if short_of and fs.pool.journal.doubts == doubts:
        with suppress(MemoryError):
            log.error("%s: %s", name, os.strerror(short_of))
        return FUSEError(short_of)
    log.error("%s failed on a bug of vfsmap; the mount is read-only now", name, exc_info=exc)
    fs.pool.fail(ReadOnly(f"{name} failed on a bug of vfsmap: {exc!r}; the log says more"))
    return FUSEError(MediumError.errno)
