"""Reading an archive: nothing in it is believed, and nothing outside the directory is touched."""

import os
import stat
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

from vfsmap.daemon.client import SEAL_XATTR, mounter_of
from vfsmap.errors import Damaged, Invalid
from vfsmap_tools import archive
from vfsmap_tools.copying import ALIGN_XATTR

_TRUSTED: Final = ("trusted.", "security.", "system.")
_NODES: Final = {
    tarfile.FIFOTYPE: stat.S_IFIFO,
    tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK,
}


def members(file: IO[bytes]) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Yield the members of an archive that is read from its beginning on.

    Raises:
        Damaged: it is an archive that ends too early.
        TarError and others: it is none; see :func:`tar_errors`.
    """
    with tarfile.open(fileobj=file, mode="r|") as tar:
        count, ended = 0, False
        for info in tar:
            if ended:
                raise Damaged("the archive goes on behind its end")
            if archive.MEMBERS in info.pax_headers:
                ended = True
                if info.pax_headers[archive.MEMBERS] != str(count):
                    raise Damaged(
                        f"{count} members of {info.pax_headers[archive.MEMBERS]} are there"
                    )
            yield tar, info
            count += 1
            tar.members.clear()  # type: ignore[attr-defined]  # else it keeps them all
        if not ended and (count == 0 or archive.FORMAT in tar.pax_headers):
            raise Damaged("the archive ends too early: it is not whole")


@contextmanager
def tar_errors() -> Iterator[None]:
    """Turn what the reading of archives raises into :class:`Damaged`."""
    try:
        yield
    except (tarfile.TarError, EOFError, UnicodeDecodeError, ValueError, OverflowError) as exc:
        if isinstance(exc, Invalid):
            raise
        raise Damaged(f"not a whole tar archive: {exc}") from exc


class Reader:
    """Unpacks members below a directory."""

    def __init__(self, root: Path, advance: Callable[[int], None]) -> None:
        self._root = root
        self._advance = advance
        self._in_pool = mounter_of(root.stat().st_dev) is not None
        self._root_user = os.geteuid() == 0
        self._directories: list[tuple[Path, tarfile.TarInfo]] = []
        self.files = 0
        self.kept = 0
        """Files that were there already."""
        self.left_out: list[str] = []
        """What this user, or this file system, can't have: attributes and seals, by file."""

    def unpack(self, tar: tarfile.TarFile, info: tarfile.TarInfo) -> None:
        """Unpack one member.

        Raises:
            Damaged: its content is not what was stored.
            Invalid: its name leads out of the directory, or it is of an unknown type.
        """
        target = self._inside(info.name)
        if info.isdir():
            self._make_directory(target, info)
            return
        if target == self._root:
            raise Invalid(f"the archive has a file in the place of the directory: {info.name!r}")
        self.files += 1
        if info.isreg() and self._is_there(target, info):
            self.kept += 1
            self._advance(sum(length for _, length in archive.data_runs(info)))
            return
        if target.is_dir() and not target.is_symlink():
            raise Invalid(f"{target} is a directory, and a file in the archive")
        target.unlink(missing_ok=True)
        if info.islnk():
            first = self._inside(info.linkname)
            if not os.path.lexists(first) or (first.is_dir() and not first.is_symlink()):
                raise Damaged(f"{info.name!r} is a link to {info.linkname!r}, which is not there")
            os.link(first, target, follow_symlinks=False)
            return
        if info.isreg():
            self._write(tar, info, target)
        elif info.issym():
            target.symlink_to(info.linkname)
        elif kind := _NODES.get(info.type):
            os.mknod(target, kind | 0o600, os.makedev(info.devmajor, info.devminor))
        else:
            raise Invalid(f"{info.name!r} is of a type that is not known here: {info.type!r}")
        self._set_attributes(target, info)
        if info.isreg():
            self._seal(target, info)

    def finish(self) -> None:
        """Give directories their attributes, which making files in them has changed."""
        for path, info in reversed(self._directories):
            self._set_attributes(path, info)

    def _make_directory(self, target: Path, info: tarfile.TarInfo) -> None:
        if target.is_symlink():
            raise Invalid(f"{target} is a symbolic link, and a directory in the archive")
        if not target.is_dir():
            target.mkdir(mode=0o700)
        self._hint(target, info)
        self._directories.append((target, info))

    def _write(self, tar: tarfile.TarFile, info: tarfile.TarInfo, target: Path) -> None:
        content = archive.content_of(tar, info)
        runs = archive.data_runs(info)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        digest = archive.start_digest(runs, info.size)
        # of a descriptor
        with open(os.open(target, flags, 0o600), "wb", buffering=0) as file:  # noqa: PTH123
            self._hint(target, info)
            for offset, length in runs:
                os.lseek(file.fileno(), offset, os.SEEK_SET)
                for piece in archive.pieces(content, offset, length):
                    digest.update(piece)
                    view = memoryview(piece)
                    while view:
                        view = view[file.write(view) :]
                    self._advance(len(piece))
            file.truncate(info.size)
        expected = info.pax_headers.get(archive.SHA256)
        if expected not in (None, digest.hexdigest()):
            target.unlink()
            raise Damaged(f"{info.name!r} is damaged in the archive: its digest is another one")

    def _is_there(self, target: Path, info: tarfile.TarInfo) -> bool:
        """Tell whether an import that was interrupted has done this; the time is set last."""
        if target.is_symlink() or not target.is_file() or archive.SHA256 not in info.pax_headers:
            return False
        status, headers = target.lstat(), info.pax_headers
        if (status.st_size, status.st_mtime_ns) != (info.size, _time(info, "mtime")):
            return False
        if self._in_pool and _seal_of(target) != headers.get(archive.SEAL):
            return False
        with target.open("rb", buffering=0) as file:
            found = archive.digest_of(file, archive.data_runs(info), info.size)
        return found == headers[archive.SHA256]

    def _inside(self, name: str) -> Path:
        path = Path(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name:
            raise Invalid(f"the archive's name {name!r} leads out of the directory")
        at = self._root
        for part in path.parts[:-1]:
            at /= part
            if at.is_symlink():
                raise Invalid(f"the archive's name {name!r} goes through a symbolic link")
        return self._root / path

    # attributes

    def _hint(self, target: Path, info: tarfile.TarInfo) -> None:
        align = info.pax_headers.get(archive.ALIGN)
        if align and self._in_pool:
            os.setxattr(target, ALIGN_XATTR, align.encode())

    def _seal(self, target: Path, info: tarfile.TarInfo) -> None:
        expected = info.pax_headers.get(archive.SEAL)
        if expected is None:
            return
        if not self._in_pool:
            self.left_out.append(f"{info.name}: seal")
            return
        wanted = info.pax_headers.get(archive.SEALING, "1")
        os.setxattr(target, SEAL_XATTR, wanted.encode())
        found = _seal_of(target)
        if found != expected:
            raise Damaged(f"{target} was sealed as {expected}, and is {found} now")

    def _set_attributes(self, target: Path, info: tarfile.TarInfo) -> None:
        if self._root_user:
            os.chown(target, info.uid, info.gid, follow_symlinks=False)
        for header, value in info.pax_headers.items():
            if header.startswith(archive.XATTR):
                self._set_xattr(target, info, archive.xattr_name(header), value)
        if not info.issym():
            target.chmod(stat.S_IMODE(info.mode))
        times = (_time(info, "atime"), _time(info, "mtime"))
        os.utime(target, ns=times, follow_symlinks=False)

    def _set_xattr(self, target: Path, info: tarfile.TarInfo, name: str, value: str) -> None:
        if name.startswith(archive.VIRTUAL):
            raise Invalid(f"{info.name!r} has an attribute that no file can have: {name!r}")
        raw = value.encode("utf-8", "surrogateescape")
        try:
            os.setxattr(target, name, raw, follow_symlinks=False)
        except OSError:
            if self._root_user and self._in_pool and not name.startswith("system."):
                raise
            self.left_out.append(f"{info.name}: {name}")


def _time(info: tarfile.TarInfo, name: str) -> int:
    return archive.nanoseconds(info.pax_headers.get(name, str(int(info.mtime))))


def _seal_of(path: Path) -> str | None:
    try:
        return os.getxattr(path, SEAL_XATTR).decode()
    except OSError:
        return None
