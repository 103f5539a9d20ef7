"""Writing an archive: members in the order of their names, each with its digest in front.

A file is read twice, to be summed and to be written; one that changes in between is tried again.
"""

import errno
import os
import stat
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Final, NamedTuple

from vfsmap.daemon.client import SEAL_XATTR
from vfsmap.errors import Busy
from vfsmap_tools import archive
from vfsmap_tools.copying import ALIGN_XATTR

_TRIES: Final = 3
_ABSENT: Final = (errno.ENODATA, errno.ENOTSUP)
_NOT_COMPARED: Final = (
    *("atime", "path", "linkpath", "size", "uid", "gid"),
    archive.SHA256,
)
_SPARSE: Final = "GNU.sparse."
_TYPES: Final = {
    stat.S_IFREG: tarfile.REGTYPE,
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
}


class Source(NamedTuple):
    """Something to be stored."""

    path: Path
    name: str
    status: os.stat_result


class Member(NamedTuple):
    """What an archive holds already, whole."""

    info: tarfile.TarInfo
    end: int


def sources(root: Path) -> Iterator[Source]:
    """Yield all that is below a directory, ordered by name, each directory before its entries."""
    stack = [(path, path.name) for path in sorted(root.iterdir(), reverse=True)]
    while stack:
        path, name = stack.pop()
        status = path.lstat()
        yield Source(path, name, status)
        if stat.S_ISDIR(status.st_mode):
            entries = sorted(path.iterdir(), reverse=True)
            stack += ((entry, f"{name}/{entry.name}") for entry in entries)


class Writer:
    """Writes members to a file that is open for it."""

    def __init__(self, file: IO[bytes], advance: Callable[[int], None]) -> None:
        self._file = file
        self._advance = advance
        self._links: dict[tuple[int, int], str] = {}
        self.members = 0
        self.skipped: list[str] = []
        """Names of sockets, which tar has no type for."""

    def begin(self) -> None:
        """Write the global header."""
        headers = {archive.FORMAT: archive.VERSION}
        self._file.write(tarfile.TarInfo.create_pax_global_header(headers))

    def take_over(self, source: Source, member: Member) -> bool:
        """Tell whether a member of the archive is what :meth:`add` would write; count it then."""
        info = self.describe(source)
        if info is None or not _same(info, member.info):
            return False
        self._note(source)
        return True

    def add(self, source: Source) -> None:
        """Write a member.

        Raises:
            Busy: a file changes all the time.
        """
        info = self.describe(source)
        if info is None:
            self.skipped.append(source.name)
            return
        if info.isreg():
            for _ in range(_TRIES):
                if self._add_file(info, source):
                    break
                source = source._replace(status=source.path.lstat())
                info = self.describe(source) or info
            else:
                raise Busy(f"{source.path} changes while it is read: stop whoever writes it")
        else:
            self._file.write(_encoded(info))
        self._note(source)

    def _note(self, source: Source) -> None:
        status = source.status
        if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
            self._links.setdefault((status.st_dev, status.st_ino), source.name)
        self.members += 1

    def end(self, root: Path) -> None:
        """Write the directory itself, and the end."""
        info = self.describe(Source(root, archive.ROOT, root.stat()))
        assert info is not None
        info.pax_headers = {**info.pax_headers, archive.MEMBERS: str(self.members)}
        self._file.write(_encoded(info))
        self._file.write(archive.END)

    def describe(self, source: Source) -> tarfile.TarInfo | None:
        """Return a member's header, but for what takes reading the file; None for a socket."""
        path, name, status = source
        kind = _TYPES.get(stat.S_IFMT(status.st_mode))
        if kind is None:
            return None
        info = tarfile.TarInfo(name)
        info.type = kind
        info.mode = stat.S_IMODE(status.st_mode)
        info.uid, info.gid = status.st_uid, status.st_gid
        first = self._links.get((status.st_dev, status.st_ino))
        if first is not None:
            info.type, info.linkname = tarfile.LNKTYPE, first
            return info
        headers = {t: archive.seconds(getattr(status, f"st_{t}_ns")) for t in archive.TIMES}
        for xattr in sorted(os.listxattr(path, follow_symlinks=False)):
            if not xattr.startswith(archive.VIRTUAL):
                raw = os.getxattr(path, xattr, follow_symlinks=False)
                headers[archive.xattr_header(xattr)] = raw.decode("utf-8", "surrogateescape")
        if kind == tarfile.SYMTYPE:
            info.linkname = os.readlink(path)
        elif kind in (tarfile.CHRTYPE, tarfile.BLKTYPE):
            info.devmajor, info.devminor = os.major(status.st_rdev), os.minor(status.st_rdev)
        elif kind in (tarfile.REGTYPE, tarfile.DIRTYPE):
            headers |= _own_headers(path)
        if kind == tarfile.REGTYPE:
            info.size = status.st_size
        info.pax_headers = headers
        return info

    def _add_file(self, info: tarfile.TarInfo, source: Source) -> bool:
        """Write a regular file; tell whether it was the same from beginning to end."""
        start = self._file.tell() if self._file.seekable() else None
        with source.path.open("rb", buffering=0) as file:
            runs = _runs(file.fileno(), info.size)
            digest = archive.digest_of(file, runs, info.size)
            info.pax_headers = {**info.pax_headers, archive.SHA256: digest}
            if _changed(file, source):
                return False
            head = _make_sparse(info, runs) if archive.is_sparse(runs, info.size) else b""
            self._file.write(_encoded(info) + head)
            stored = len(head)
            for offset, length in runs:
                for piece in archive.pieces(file, offset, length):
                    self._file.write(piece)
                    stored += len(piece)
                    self._advance(len(piece))
            if stored == info.size and not _changed(file, source):
                self._file.write(bytes(-stored % archive.BLOCK))
                return True
        if start is None:
            raise Busy(f"{source.path} has changed while it was written: stop whoever writes it")
        self._file.seek(start)
        self._file.truncate()
        return False


def _encoded(info: tarfile.TarInfo) -> bytes:
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def _own_headers(path: Path) -> dict[str, str]:
    found = {}
    for header, name in (
        (archive.ALIGN, ALIGN_XATTR),
        (archive.SEAL, SEAL_XATTR),
        (archive.SEALING, archive.SEALING_XATTR),
    ):
        try:
            found[header] = os.getxattr(path, name, follow_symlinks=False).decode()
        except OSError as exc:
            if exc.errno not in _ABSENT:
                raise
    return found


def _same(wanted: tarfile.TarInfo, found: tarfile.TarInfo) -> bool:
    fields = ("name", "type", "mode", "uid", "gid", "size", "linkname", "devmajor", "devminor")
    return all(getattr(wanted, f) == getattr(found, f) for f in fields) and (
        _compared(wanted.pax_headers) == _compared(found.pax_headers)
    )


def _compared(headers: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in headers.items()
        if name not in _NOT_COMPARED and not name.startswith((_SPARSE, archive.FORMAT))
    }


def _changed(file: IO[bytes], source: Source) -> bool:
    now, then = os.fstat(file.fileno()), source.status
    return (now.st_size, now.st_mtime_ns) != (then.st_size, then.st_mtime_ns)


# holes


def _runs(fd: int, size: int) -> list[archive.Run]:
    """Return where a file may hold something but zeros."""
    try:
        os.getxattr(fd, archive.EXTENTS_XATTR)
        os.fsync(fd)  # what is in the mount's cache only has no extent yet
        text = os.getxattr(fd, archive.EXTENTS_XATTR).decode()
    except OSError:  # no pool is mounted there; or the file lies in too many pieces to tell
        return list(_sought_runs(fd, size))
    runs: list[archive.Run] = []
    for line in text.splitlines():
        offset, _, length = map(int, line.split())
        length = min(length, size - offset)
        if length > 0 and runs and sum(runs[-1]) == offset:
            runs[-1] = (runs[-1][0], runs[-1][1] + length)
        elif length > 0:
            runs.append((offset, length))
    return runs


def _sought_runs(fd: int, size: int) -> Iterator[archive.Run]:
    at = 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing but a hole is left
            return
        at = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        yield start, at - start


def _make_sparse(info: tarfile.TarInfo, runs: list[archive.Run]) -> bytes:
    """Make a header that of a sparse file; return the map that its data begins with."""
    head = archive.sparse_map(runs, info.size)
    info.pax_headers = {
        **info.pax_headers,
        f"{_SPARSE}major": "1",
        f"{_SPARSE}minor": "0",
        f"{_SPARSE}name": info.name,
        f"{_SPARSE}realsize": str(info.size),
    }
    directory, _, name = info.name.rpartition("/")
    info.name = f"{directory or '.'}/GNUSparseFile.0/{name}"
    info.size = len(head) + sum(length for _, length in runs)
    return head
