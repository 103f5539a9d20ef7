"""Leave a crash record when this program ends badly.

An unhandled exception of the main thread is a ``Panic``, one of another thread, which the program
survives, an ``Oops``.  A fatal signal, SIGKILL, os._exit() or a power cut leaves no time to say
anything: so a program enters itself in the region while it runs, and whoever opens the region next
finds that it is gone and writes its ``Panic``, with what faulthandler noted of the fatal signal.
"""

import atexit
import faulthandler
import os
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import IO, Any

from vfsmap.errors import NoSpace, VfsmapError
from vfsmap.pstore.record import Compression, Reason
from vfsmap.pstore.region import Region

_Hook = Callable[[type[BaseException], BaseException, TracebackType | None], Any]


class CrashWatch:
    """Watches over this process from here until :meth:`stop`, or to its good end.

    A child that is forked keeps the hooks, but its end is its own affair: for that it opens the
    region itself.  faulthandler is pointed at the region only if nobody has enabled it before;
    the record of a fatal signal then lacks the Python traceback, which went where it was sent.
    Where the region has no room for one more program, only exceptions are recorded.
    """

    def __init__(self, region: Region, compression: Compression) -> None:
        self._region = region
        self._compression: Compression = compression
        self._pid = os.getpid()
        self._over = False
        self._leave: Callable[[], None] | None = None
        with suppress(NoSpace):
            self._leave = region.enter()
        self._old_hook: _Hook = sys.excepthook
        self._old_thread_hook = threading.excepthook
        # bound methods are made anew each time; stop() has to know these again
        self._hook: _Hook = self._note_exception
        self._thread_hook = self._note_thread
        sys.excepthook = self._hook
        threading.excepthook = self._thread_hook
        self._faults = self._watch_faults()
        atexit.register(self.stop)

    def stop(self) -> None:
        """End the watch: this program ends well, or needs it no more."""
        if self._over or os.getpid() != self._pid:
            return
        self._over = True
        atexit.unregister(self.stop)
        if sys.excepthook is self._hook:
            sys.excepthook = self._old_hook
        if threading.excepthook is self._thread_hook:
            threading.excepthook = self._old_thread_hook
        if self._leave:
            self._leave()
        if self._faults:
            faulthandler.disable()
            self._faults.close()
            self._region.fault_file(self._pid, remove=True)

    def _watch_faults(self) -> IO[bytes] | None:
        path = self._region.fault_file(self._pid)
        if path is None or faulthandler.is_enabled():
            return None
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        except OSError:
            return None  # there will be a record, but without a traceback
        faults = os.fdopen(fd, "wb", buffering=0)
        faulthandler.enable(faults)
        return faults

    def _note_exception(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        if issubclass(kind, Exception):  # KeyboardInterrupt is how a program is told to end
            self._record("Panic", error)
        self._old_hook(kind, error, trace)

    def _note_thread(self, args: threading.ExceptHookArgs) -> None:
        if isinstance(args.exc_value, Exception):
            self._record("Oops", args.exc_value)
        self._old_thread_hook(args)

    def _record(self, reason: Reason, error: BaseException) -> None:
        if not self._over:
            text = "".join(traceback.format_exception(error))
            with suppress(VfsmapError):  # refused and counted; the exception itself matters more
                self._region.put(reason, text.encode(errors="backslashreplace"), self._compression)
