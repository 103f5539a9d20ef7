"""The flight recorder: a line is a few stores into the region, and survives what kills the program.

No line makes a system call: the lock that keeps processes apart is a mutex in shared memory, and
storing to a mapped file needs none.  What was stored is there after SIGKILL; what the machine's
power has to survive, :meth:`Recorder.persist` (and every dmesg record by itself) makes durable.
"""

import os
from collections import deque
from types import TracebackType
from typing import Final, Self

from vfsmap.errors import Invalid
from vfsmap.pmem.mutex import Grip, Mutex
from vfsmap.pstore.backing import Buffer
from vfsmap.pstore.crash import CrashWatch
from vfsmap.pstore.geometry import Geometry, Kind
from vfsmap.pstore.record import Compression, Reason
from vfsmap.pstore.region import Region
from vfsmap.pstore.zone import Zone

Text = bytes | bytearray | memoryview | str

_try_lock: Final = Mutex.try_lock
_unlock: Final = Mutex.unlock


class Recorder:
    """A writer's hold on a region: a file, by its path, or a buffer.

    Any number of threads and processes may record into one file; their lines don't tear each
    other.  A buffer is for this process and its forks.  Unless ``watch`` is false, a crash record
    is left when this program ends badly: see :class:`~vfsmap.pstore.crash.CrashWatch`.

    Raises:
        NotFound, Denied, Invalid, Damaged, Busy: as :meth:`Region.open`.
    """

    def __init__(
        self,
        target: str | os.PathLike[str] | Buffer,
        geometry: Geometry | None = None,
        *,
        compression: Compression = "deflate",
        watch: bool = True,
    ) -> None:
        if isinstance(target, str | os.PathLike):
            self.region = Region.open(target, geometry, writable=True)
        else:
            self.region = Region.over(target, geometry)
        try:
            self._start(compression, watch=watch)
        except BaseException:
            self.region.close()
            raise

    def console(self, text: Text) -> None:
        """Append ``text`` to the console zone, as it is: end a line with a newline.

        Raises:
            Invalid: the region has no console zone.

        Crash: a power cut can lose what was not persisted; a killed process loses nothing, and at
            most the ``text`` being stored is torn.
        """
        if self._console is None:
            raise Invalid("the region has no console zone; format it with a console size")
        self._append(self._console, text)

    def pmsg(self, text: Text) -> None:
        """Append ``text`` to the pmsg zone, as it is: end a line with a newline.

        Raises:
            Invalid: the region has no pmsg zone.

        Crash: as :meth:`console`.
        """
        if self._pmsg is None:
            raise Invalid("the region has no pmsg zone; format it with a pmsg size")
        self._append(self._pmsg, text)

    def dmesg(self, reason: Reason, text: Text) -> str:
        """Leave a crash record: the tail of the console (else of pmsg), then ``text``.

        It begins ``Oops#n Part1``, after its reason and the region's own count, and is durable when
        this returns.  Returns the name of the file that shows it.

        Raises:
            NoSpace: every record is unread, and the region's policy is to keep them.
            NotFound, Invalid: the region has no dmesg zones, or too small ones.
            MediumError: the medium could not be written.

        Crash: the record is there whole, or not at all.
        """
        return self.region.put(reason, _encode(text), self._compression)

    def persist(self) -> None:
        """Make every line so far as durable as the medium promises.

        Raises:
            MediumError: the medium could not be written.
        """
        self.region.persist()

    def close(self) -> None:
        """Let go of the region, and end the watch over this program."""
        if self._watch:
            self._watch.stop()
        self.region.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self, compression: Compression, *, watch: bool) -> None:
        companion = self.region.companion
        if companion is None:
            raise Invalid("a recorder needs a buffer that can be written")
        self._compression: Compression = compression
        self._companion = companion
        self._mutex = companion.mutex.handle
        self._writing = False  # true only in the thread that holds the mutex
        self._late: deque[tuple[Zone, bytes]] = deque()
        with self.region.locked():
            self._console = self._attach("console")
            self._pmsg = self._attach("pmsg")
        wanted = watch and self.region.zone("dmesg") and not self.region.entered
        self._watch = CrashWatch(self.region, compression) if wanted else None
        self._noted = bool(self.region.geometry.ecc)

    def _append(self, zone: Zone, text: Text) -> None:
        # The hot path: a call costs a line more than the stores do.
        data = text if type(text) is bytes else _encode(text)
        result = _try_lock(self._mutex)
        if result and not self._take(result):
            self._late.append((zone, data))
            return
        try:
            self._writing = True
            if self._noted:
                self._note(zone, len(data))
            zone.write(data)
            if self._noted:
                self._companion.flight[0] = 0
        finally:
            self._writing = False
            _unlock(self._mutex)
        if self._late:
            self._catch_up()

    def _take(self, result: int) -> bool:
        """Get the mutex after all; false: this thread is in the midst of a write already."""
        mutex = self._companion.mutex
        grip = mutex.wait(result)
        if grip is Grip.REENTERED:
            # An exception between locking and writing leaves the mutex locked and nothing written.
            return not self._writing
        try:
            self._companion.settle(grip, self.region.recover)
        except BaseException:
            mutex.release()
            raise
        return True

    def _catch_up(self) -> None:
        """Append what a signal handler or a finalizer said in the midst of another write."""
        while self._late:
            self._append(*self._late.popleft())

    def _note(self, zone: Zone, count: int) -> None:
        # Should this process die between data and parity, the next one knows where.
        flight = self._companion.flight
        flight[1] = zone.start
        flight[2] = min(count, zone.capacity)
        flight[0] = self.region.zones.index(zone) + 1

    def _attach(self, kind: Kind) -> Zone | None:
        zone = self.region.zone(kind)
        if zone:
            zone.attach_header()
            zone.survey()
        return zone


def _encode(text: Text) -> bytes:
    return text.encode(errors="backslashreplace") if isinstance(text, str) else bytes(text)
