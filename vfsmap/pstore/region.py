"""A region: open it, list it, read it, erase from it, make it.

Reading needs no lock and never writes.  Everything that writes does so under the region's lock,
which the processes that have it open share and which dies with its holder.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final, Self

from vfsmap.errors import NoSpace, NotFound, ReadOnly
from vfsmap.pstore.backing import Backing, Buffer, over_buffer, over_file
from vfsmap.pstore.companion import Companion, fault_file
from vfsmap.pstore.detect import detect
from vfsmap.pstore.geometry import Geometry, Kind
from vfsmap.pstore.kallsyms import Symbols
from vfsmap.pstore.margin import Ledger, Session
from vfsmap.pstore.reader import File, read_files, require_size
from vfsmap.pstore.record import Compression, Reason
from vfsmap.pstore.sessions import Slot, enter, find_dead, leave, this_session
from vfsmap.pstore.shelf import Entry, Shelf
from vfsmap.pstore.zone import Zone

_MOST_FAULT: Final = 16384  # bytes of a fatal signal's traceback that go into a record


class Region:
    """A region in a buffer or a file; :meth:`open` and :meth:`over` make one.

    Without ``geometry`` it is detected.

    Raises:
        Damaged: there is no region.
        Invalid: the geometry does not fit the buffer.
    """

    def __init__(self, backing: Backing, geometry: Geometry | None = None) -> None:
        self._backing = backing
        view = self.view = backing.view
        """All bytes there are; the region's own are the first ``geometry.size``."""
        self.key = backing.key
        """Device and inode of the file; None: a buffer."""
        self.writable = not view.readonly
        self.geometry = geometry or detect(view)
        require_size(view, self.geometry)
        self.zones = tuple(
            Zone(place, view[place.offset : place.offset + place.size], self.geometry.ecc)
            for place in self.geometry.places
        )
        records = [zone for zone in self.zones if zone.place.kind == "dmesg"]
        self._shelf = Shelf(self.geometry, records, backing.persist)
        self.companion: Companion | None = None
        if self.writable:
            self.companion = Companion.beside(backing.key) if backing.key else Companion.alone()

    @classmethod
    def over(cls, buffer: Buffer, geometry: Geometry | None = None) -> Self:
        """Open a region in memory; only this process and its forks may write to it."""
        return cls(over_buffer(buffer), geometry)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        geometry: Geometry | None = None,
        *,
        writable: bool = False,
    ) -> Self:
        """Open a region file, in a mounted pool or anywhere else.

        A writable region first gets the records of programs that ended without a word.

        Raises:
            NotFound, Denied, Invalid: there is no such file, no right to it, or nothing in it.
            Damaged: there is no region in it.
            Busy: another user's processes have it open for writing.
        """
        backing = over_file(path, writable=writable)
        try:
            region = cls(backing, geometry)
        except BaseException:
            with suppress(BufferError):  # the error's traceback still has views
                backing.close()
            raise
        if writable:
            region.write_obituaries()
        return region

    def close(self) -> None:
        """Let go of the buffer, or unmap the file."""
        for zone in self.zones:
            zone.release()
        if self.companion:
            self.companion.close()
        self._backing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()

    def zone(self, kind: Kind) -> Zone | None:
        """Return the first zone of a kind; None: the region has none."""
        return next((zone for zone in self.zones if zone.place.kind == kind), None)

    def files(self, symbols: Symbols | None = None) -> list[File]:
        """Return what /sys/fs/pstore would show, in the kernel's order.

        Of a region that is open for reading only, a line that is being written may be torn.
        """
        return read_files(self._snapshot(), self.geometry, symbols)

    def _snapshot(self) -> memoryview:
        if self.companion is None:
            return self.view
        with self.locked():
            return memoryview(bytes(self.view[: self.geometry.size]))

    def file(self, name: str, symbols: Symbols | None = None) -> File:
        """Return one of the files.

        Raises:
            NotFound: the region does not show it.
        """
        files = self.files(symbols)
        found = next((file for file in files if file.name == name), None)
        if found is None:
            names = ", ".join(file.name for file in files) or "no file"
            raise NotFound(f"no file {name!r} in the region; it shows {names}")
        return found

    @property
    def ledger(self) -> Ledger:
        """Policy and counts."""
        return self._shelf.ledger

    def unread(self) -> set[str]:
        """Return the names of the dmesg files that nobody has marked as read."""
        return {_record(entry.number) for entry in self._shelf.entries() if not entry.read}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other writers out.

        Raises:
            ReadOnly: the region was opened for reading.
        """
        if self.companion is None:
            raise ReadOnly("the region is open for reading only")
        with self.companion.locked(self.recover):
            yield

    def recover(self) -> None:
        """Finish what a writer that died in the midst of a write left behind; the lock is held."""
        assert self.companion
        number, offset, count = self.companion.flight
        if 0 < number <= len(self.zones):
            zone = self.zones[number - 1]
            if offset <= zone.capacity and count <= zone.capacity:
                zone.reseal(offset, count)
        self.companion.flight[0] = 0

    def put(self, reason: Reason, text: bytes, compression: Compression = "deflate") -> str:
        """Leave a dmesg record: the tail of the log, then ``text``; return its file's name.

        Raises:
            NoSpace: every record is unread, and the policy is to keep them.
            NotFound, Invalid: the region has no dmesg zones, or too small ones.

        Crash: the record is there whole, or not at all.
        """
        with self.locked():
            return _record(self._shelf.put(reason, self._tail() + text, compression))

    def mark_read(self, *shown: str | File) -> None:
        """Note that dmesg records were read: from now on new ones may take their place.

        A name says it of whatever record is there, a file of the one that it shows: if another
        has taken its place meanwhile, that one stays unread.  In a region that only kernels have
        written, nothing is noted.

        Crash: noted or not.
        """
        names = {one for one in shown if isinstance(one, str)}
        files = {(one.name, one.time_ns) for one in shown if isinstance(one, File)}

        def seen(entry: Entry) -> bool:
            plain = _record(entry.number)
            return any(
                name in names or (name, entry.header.time_ns) in files
                for name in (plain, f"{plain}.enc.z")
            )

        with self.locked():
            self._shelf.mark_read(seen)

    def set_policy(self, *, overwrite: bool) -> None:
        """Say whether the oldest unread record makes room for a new one.

        Crash: the old policy or the new one.
        """
        with self.locked():
            self._shelf.set_policy(overwrite=overwrite)

    def erase(self, name: str) -> None:
        """Remove a file, as unlinking it in /sys/fs/pstore does.

        Raises:
            NotFound: the region does not show it.

        Crash: there or not; of the ftrace file, the part of some CPUs.
        """
        with self.locked():
            file = self.file(name)
            for zone in self.zones:
                kind, number, *_ = zone.place
                if kind == file.kind and (kind == "ftrace" or number == file.number):
                    zone.mend_header()  # else zapping would give a wrong signature its parity
                    zone.zap()
        self._backing.persist()

    def erase_all(self) -> None:
        """Remove everything, also what no file shows.

        Crash: each file is there or not.
        """
        with self.locked():
            for zone in self.zones:
                zone.mend_header()
                if zone.signed:
                    zone.zap()
        self._backing.persist()

    @property
    def entered(self) -> bool:
        """Whether this process has entered itself already."""
        session = this_session()
        sessions = (there for margin in self._shelf.margins for _, there in margin.read_sessions())
        return session in sessions

    def enter(self) -> Callable[[], None]:
        """Enter this process as one whose end is to be recorded; return what takes it out again.

        Raises:
            NoSpace: there is no room for one more.

        Crash: entered or not.
        """
        session = this_session()
        with self.locked():
            slot: Slot = enter(self._shelf.margins, session)

        def take_out() -> None:
            with self.locked():
                leave(slot, session)

        return take_out

    def write_obituaries(self) -> list[str]:
        """Leave a record for each program that ended without a word; return the files' names.

        Crash: a program's record may be written a second time.
        """
        names = []
        with self.locked():
            for slot, session in list(find_dead(self._shelf.margins)):
                with suppress(NoSpace):  # counted as refused
                    text = self._obituary(session)
                    names.append(_record(self._shelf.put("Panic", self._tail() + text)))
                leave(slot, session)
                self.fault_file(session.pid, remove=True)
        return names

    def fault_file(self, pid: int, *, remove: bool = False) -> str | None:
        """Return the path where a process notes its fatal signals; None: the region is no file."""
        if self.key is None:
            return None
        path = fault_file(self.key, pid)
        if remove:
            path.unlink(missing_ok=True)
        return str(path)

    def persist(self) -> None:
        """Make all stores as durable as the medium promises.

        Raises:
            MediumError: the medium could not be written.
        """
        self._backing.persist()

    def _tail(self) -> bytes:
        zones = (self.zone("console"), self.zone("pmsg"))
        return next((zone.read() for zone in zones if zone and zone.valid and zone.size), b"")

    def _obituary(self, session: Session) -> bytes:
        text = f"{session.name}[{session.pid}] ended without a word\n".encode()
        path = self.fault_file(session.pid)
        if path:
            with suppress(OSError):
                fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    if os.fstat(fd).st_uid == os.geteuid():
                        text += os.read(fd, _MOST_FAULT)
                finally:
                    os.close(fd)
        return text


def _record(number: int) -> str:
    return f"dmesg-ramoops-{number}"
