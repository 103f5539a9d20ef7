"""From a path to a window: by the daemon where there is one, else by the page cache."""

import errno
import operator
import os
import stat
from typing import Any, NamedTuple, SupportsIndex

from vfsmap.daemon.client import (
    SEAL_XATTR,
    Client,
    HeldTicket,
    clients,
    close_all,
    file_of,
    medium_of,
    mounter_of,
    why_no_daemon,
)
from vfsmap.daemon.ticket import Ticket
from vfsmap.daemon.varlink import INT_MAX
from vfsmap.errors import (
    Busy,
    DaemonUnreachable,
    Denied,
    Invalid,
    IsADirectory,
    MediumError,
    NameTooLong,
    NoMemory,
    NoSpace,
    NotADirectory,
    NotFound,
    ProtocolError,
    ReadOnly,
    Sealed,
    Unsupported,
    Untrusted,
    VfsmapError,
)
from vfsmap.mapping.overlay import PrivateWindow
from vfsmap.mapping.window import Grantor, Window
from vfsmap.pmem import Medium, detect
from vfsmap.units import PTE, Extent, Level, align_down, align_up, format_size


class _Request(NamedTuple):
    """What :func:`map` was asked for."""

    path: str
    writable: bool
    offset: int
    length: int | None
    level: Level | None
    populate: bool
    sealed: bool
    private: bool
    cow: Level | None

    def window(
        self,
        fd: int,
        extents: list[Extent],
        length: int,
        medium: Medium,
        grantor: Grantor | None = None,
    ) -> Window:
        """Map extents of ``fd`` as it was asked for."""
        direct = grantor is not None
        if self.private:
            return PrivateWindow(
                fd,
                extents,
                length,
                medium,
                cow=self.cow or medium.level,
                offset=self.offset,
                level=self.level,
                populate=self.populate,
                direct=direct,
                grantor=grantor,
            )
        return Window(
            fd,
            extents,
            length,
            medium,
            offset=self.offset,
            writable=self.writable,
            level=self.level,
            populate=self.populate,
            sealed=self.sealed,
            direct=direct,
            grantor=grantor,
        )


class _Leased:
    """The daemon that has granted a lease, by the connection that holds it."""

    __slots__ = ("_client", "_forks", "_lease")

    def __init__(self, client: Client, lease: int) -> None:
        self._client = client
        self._lease = lease
        self._forks = clients.forks

    @property
    def _alone(self) -> bool:
        return clients.forks == self._forks

    def closed(self) -> None:
        self._client.release(self._lease, alone=self._alone)

    def dropped(self) -> None:
        self._client.drop(self._lease, alone=self._alone)

    def publish(self) -> None:
        self._client.call("Publish", lease=self._lease)

    def report(self, offset: int, length: int, detail: str) -> None:
        self._client.call(
            "Violation", lease=self._lease, offset=offset, length=length, detail=detail
        )


def map(
    path: str | os.PathLike[str],
    *,
    writable: bool = False,
    offset: SupportsIndex = 0,
    length: SupportsIndex | None = None,
    level: Level | None = None,
    populate: bool = False,
    direct: bool | None = None,
    sealed: bool = False,
    private: bool = False,
    cow: Level | None = None,
) -> Window:
    """Map a range of a file; the file's own pool bytes where that can be had.

    Args:
        path: a file; on a mounted pool its daemon is asked, elsewhere the page cache is mapped.
        writable: map for reading and writing.
        offset: where the range starts, bytes.
        length: bytes; None: up to the file's end.
        level: the smallest page-table entries to accept.
        populate: touch every page first.
        direct: True demands the pool itself, False the page cache; None takes what can be had.
        sealed: nobody can unmap, remap or unprotect the window before the process ends.
        private: stores stay in this process; returns a :class:`PrivateWindow`.
        cow: the size of the blocks that a private window copies.

    Raises:
        Unsupported: ``level`` or ``direct`` can't be had; the message says why.
        NotFound, Denied, Invalid, Busy, NoSpace, Sealed: as the file system or the daemon says.
    """
    wanted = _Request(
        os.fspath(path),
        writable,
        operator.index(offset),
        None if length is None else operator.index(length),
        level,
        populate,
        sealed,
        private,
        cow,
    )
    _check(wanted)
    try:
        return _map(wanted, direct=direct)
    except OSError as exc:
        if exc.errno is None:  # a signal's handler raised it
            raise
        raise _refused(exc, wanted.path) from exc


def _map(wanted: _Request, *, direct: bool | None) -> Window:
    """Map as :func:`map` was asked to.

    Raises:
        VfsmapError: as :func:`map`.
        OSError: the file can't be looked at or opened.
    """
    device = _device_of(wanted.path)
    found: Window | str = "direct=False was given"
    if direct is not False:
        try:
            found = _map_direct(wanted, device)
        except NoSpace as exc:
            if wanted.writable or direct:
                raise
            found = str(exc)  # the page cache shows zeros without having them allocated
        if isinstance(found, Window):
            return found
        if direct:
            raise Unsupported(f"{wanted.path} can't be mapped directly: {found}")
    if wanted.level not in (None, PTE) and mounter_of(device) is not None:
        raise Unsupported(
            f"{wanted.path} can't be mapped by entries of {format_size(wanted.level.size)}: "
            f"through a mount they have 4K, and {found}"
        )
    return _map_cached(wanted)


def _check(wanted: _Request) -> None:
    """Refuse what can't be meant."""
    offset, length = wanted.offset, wanted.length
    if wanted.sealed and (wanted.writable or wanted.private):
        raise Invalid("sealed=True takes a shared read window: leave writable and private out")
    if wanted.writable and wanted.private:
        raise Invalid("private=True has a window of its own kind: leave writable out")
    if wanted.cow is not None and not wanted.private:
        raise Invalid("cow is about private windows: give private=True as well")
    if offset < 0 or (length is not None and length < 0):
        raise Invalid(f"can't map {length} bytes at {offset}: neither can be negative")
    if offset + (length or 0) > INT_MAX:
        raise Invalid(f"can't map {length or 0} bytes at {offset}: no file is so long")


def _device_of(path: str) -> int:
    """Return the device number of a regular file.

    Raises:
        IsADirectory, Invalid: it is none.
        OSError: it can't be looked at.
    """
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectory(f"{path} is a directory")
    if not stat.S_ISREG(status.st_mode):
        raise Invalid(f"{path} is not a regular file")
    return status.st_dev


def _map_direct(wanted: _Request, device: int) -> Window | str:
    """Map by the daemon; return the window, or why it can't be had.

    Raises:
        VfsmapError: as :func:`map`.
        OSError: the file can't be opened.
    """
    for last in (False, True):
        client = clients.get(wanted.path, device)
        if client is None:
            return why_no_daemon(device)
        if isinstance(client, str):
            return client
        try:
            return _granted(client, wanted)
        except Untrusted as exc:
            clients.distrust(client, device, str(exc))
            return str(exc)
        except DaemonUnreachable:  # the connection may have been to one that has gone meanwhile
            clients.drop(client)
            if last:
                raise
    raise AssertionError("the second time either returns or raises")


def _granted(client: Client, wanted: _Request) -> Window:
    """Take a lease and map its extents."""
    if client.ticket is not None and not wanted.writable:
        window = _granted_at_once(client, client.ticket, wanted)
        if window is not None:
            return window
    parameters: dict[str, Any] = {"file": 0, "offset": wanted.offset}
    if wanted.length is not None:
        parameters["length"] = wanted.length
    if wanted.level is not None:
        parameters["level"] = wanted.level.size
    flags = os.O_RDONLY
    if wanted.writable:
        parameters["writable"] = True
        flags = os.O_RDWR | os.O_DIRECT | os.O_DSYNC  # these two tell the mount not to cache
    elif client.may_ask_for_ticket():
        parameters["ticket"] = True
    fd = os.open(wanted.path, flags | os.O_CLOEXEC)
    try:
        answer, descriptors = client.call("Map", (fd,), **parameters)
    finally:
        os.close(fd)
    grantor = None
    try:
        grantor = _Leased(client, answer["lease"])
        medium = medium_of(answer["medium"])
        pool = descriptors[answer["pool"]]
        extents = [Extent(**extent) for extent in answer["extents"]]
        if (told := answer.get("ticket")) is not None:
            ticket = Ticket(told["name"], bytes.fromhex(told["secret"]))
            client.ticket = HeldTicket(ticket, medium, told["pool"], file_of(pool))
        window = wanted.window(pool, extents, answer["length"], medium, grantor)
    except BaseException as exc:
        if grantor is not None:
            grantor.closed()
        if isinstance(exc, LookupError | TypeError | ValueError):
            raise ProtocolError(f"the daemon's answer makes no sense: {exc!r}") from exc
        raise
    finally:
        close_all(descriptors)
    return _kept(window, client)


def _granted_at_once(client: Client, held: HeldTicket, wanted: _Request) -> Window | None:
    """Take a lease by an attribute of the file, and map its extents; None: call for it."""
    pool = held.open()
    if pool is None:
        client.give_ticket_up()
        return None
    level = 0 if wanted.level is None else wanted.level.size
    name = held.ticket.attribute(wanted.offset, wanted.length, level)
    grantor = None
    try:
        try:
            value = os.getxattr(wanted.path, name)
        except OSError as exc:
            if exc.errno is None:  # a signal's handler raised it, and an answer may be lost
                raise
            return None
        found = held.ticket.lease_of(value)
        if found is None:
            return None
        lease, length, extents = found
        grantor = _Leased(client, lease)
        window = wanted.window(pool, extents, length, held.medium, grantor)
    except BaseException:
        if grantor is not None:
            grantor.closed()
        else:
            client.close()  # what was granted to nobody ends with the connection
        raise
    finally:
        os.close(pool)
    return _kept(window, client)


def _kept(window: Window, client: Client) -> Window:
    """Return a window whose lease is still held.

    Raises:
        DaemonUnreachable: it may not be: before the range was mapped, nothing kept it from reuse.
    """
    if not client.is_alive():
        window.close()
        raise DaemonUnreachable(f"the mapping daemon on {client.path} has gone away; mount again")
    return window


def _map_cached(wanted: _Request) -> Window:
    """Map through the page cache of the file's own file system.

    Raises:
        OSError: the file can't be opened.
    """
    flags = os.O_RDWR if wanted.writable else os.O_RDONLY
    fd = os.open(wanted.path, flags | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        offset = wanted.offset
        length = max(size - offset, 0) if wanted.length is None else wanted.length
        if offset + length > size:
            raise Invalid(
                f"{wanted.path}: the range {offset}+{length} is not inside the file, which has "
                f"{size} bytes; grow it first"
            )
        medium = detect(fd)
        start = align_down(offset, medium.page_size)
        extent = Extent(start, start, align_up(offset + length, medium.page_size) - start)
        return wanted.window(fd, [extent] if length else [], length, medium)
    finally:
        os.close(fd)


def _refused(exc: OSError, path: str) -> VfsmapError:
    kinds: dict[int, type[VfsmapError]] = {
        errno.ENOENT: NotFound,
        errno.EACCES: Denied,
        errno.EPERM: Denied,
        errno.ENOTDIR: NotADirectory,
        errno.EISDIR: IsADirectory,
        errno.ENAMETOOLONG: NameTooLong,
        errno.EROFS: ReadOnly,
        errno.EIO: MediumError,
        errno.EBUSY: Busy,
        errno.ENOSPC: NoSpace,
        errno.EMFILE: NoMemory,
        errno.ENFILE: NoMemory,
        errno.ENOMEM: NoMemory,
    }
    if exc.errno == errno.EPERM and _is_sealed(path):
        return Sealed(f"{path} is sealed: its content can't change any more")
    kind = kinds.get(exc.errno or 0, Invalid)
    return kind(f"{path}: {exc.strerror}")


def _is_sealed(path: str) -> bool:
    try:
        return bool(os.getxattr(path, SEAL_XATTR))
    except OSError:
        return False
