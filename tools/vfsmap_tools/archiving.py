"""The commands ``export`` and ``import``: a tree as a tar archive, with all that vfsmap knows.

The archive is POSIX pax.  Extended attributes are ``SCHILY.xattr.NAME`` headers, as GNU tar and
bsdtar write them, so either can unpack it; alignment hints and digests of sealed files are headers
of our own, ``VFSMAP.align``, ``VFSMAP.seal`` and ``VFSMAP.sealing``, which they ignore.
"""

import errno
import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import click
from rich.progress import Progress, TaskID

from vfsmap.errors import Damaged, Invalid, NotFound
from vfsmap_tools.console import errors_exit, progress
from vfsmap_tools.copying import ALIGN_XATTR, SEAL_XATTR, SEALING_XATTR

PATH = click.Path(path_type=Path)
_XATTR = "SCHILY.xattr."
_ALIGN = "VFSMAP.align"
_SEAL = "VFSMAP.seal"
_SEALING = "VFSMAP.sealing"
_TIMES = ("atime", "mtime")
_ABSENT = (errno.ENODATA, errno.ENOTSUP)


@click.command("export")
@click.argument("directory", type=PATH)
@click.argument("archive", type=PATH)
@click.option("--quiet", "-q", is_flag=True, help="No progress bar.")
@errors_exit
def export(directory: Path, archive: Path, quiet: bool) -> None:
    """Write a mounted tree into a tar archive, with attributes, hints and seals.

    Written beside the archive's name first, and renamed when it is whole.
    """
    if not directory.is_dir():
        raise NotFound(f"{directory} is not a directory")
    unfinished = archive.with_name(archive.name + ".part")
    with progress(hidden=quiet) as bar, unfinished.open("wb") as file:
        writer = _Writer(file, bar, directory)
        writer.write()
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(archive)


@click.command("import")
@click.argument("directory", type=PATH)
@click.argument("archive", type=PATH)
@click.option("--quiet", "-q", is_flag=True, help="No progress bar.")
@errors_exit
def import_command(directory: Path, archive: Path, quiet: bool) -> None:
    """Unpack an archive that export wrote into a directory; check the digests of sealed files.

    What is there already, with the same size and time, is left alone: an import that was
    interrupted goes on where it was.
    """
    if not directory.is_dir():
        raise NotFound(f"{directory} is not a directory; make it first")
    with progress(hidden=quiet) as bar, archive.open("rb") as file:
        _Reader(file, bar, directory).read()


def _value(path: Path, name: str) -> str | None:
    try:
        return os.getxattr(path, name, follow_symlinks=False).decode()
    except OSError as exc:
        if exc.errno in _ABSENT:
            return None
        raise


class _Writer:
    """Writes one archive."""

    def __init__(self, file: IO[bytes], bar: Progress, root: Path) -> None:
        self._tar = tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        self._bar = bar
        self._root = root
        self._task: TaskID = bar.add_task("exporting", total=None)

    def write(self) -> None:
        """Write everything below the root."""
        paths = list(_walk(self._root))
        self._bar.update(self._task, total=sum(p.lstat().st_size for p in paths if p.is_file()))
        with self._tar:
            for path in paths:
                self._add(path)

    def _add(self, path: Path) -> None:
        name = str(path.relative_to(self._root))
        info = self._tar.gettarinfo(path, arcname=name)
        if info is None:  # a socket; tar has no type for it
            return
        status = path.lstat()
        headers = {time: _seconds(getattr(status, f"st_{time}_ns")) for time in _TIMES}
        for xattr in os.listxattr(path, follow_symlinks=False):
            raw = os.getxattr(path, xattr, follow_symlinks=False)
            headers[_XATTR + xattr] = raw.decode("utf-8", "surrogateescape")
        if info.isreg() or info.isdir():
            if align := _value(path, ALIGN_XATTR):
                headers[_ALIGN] = align
            if info.isreg() and (seal := _value(path, SEAL_XATTR)):
                headers[_SEAL] = seal
                headers[_SEALING] = _value(path, SEALING_XATTR) or ""
        info.pax_headers = headers
        if info.isreg():
            with path.open("rb") as content:
                self._tar.addfile(info, content)
            self._bar.advance(self._task, info.size)
        else:
            self._tar.addfile(info)


class _Reader:
    """Unpacks one archive."""

    def __init__(self, file: IO[bytes], bar: Progress, root: Path) -> None:
        self._file = file
        self._bar = bar
        self._root = root
        self._task: TaskID = bar.add_task("importing", total=os.fstat(file.fileno()).st_size)
        self._directories: list[tuple[Path, tarfile.TarInfo]] = []

    def read(self) -> None:
        """Unpack everything.

        Raises:
            Damaged: it is no tar archive, or a sealed file's digest is another now.
            Invalid: a name leads out of the directory.
        """
        try:
            with tarfile.open(fileobj=self._file, mode="r|") as tar:
                for info in tar:
                    self._unpack(tar, info)
                    self._bar.update(self._task, completed=self._file.tell())
        except tarfile.TarError as exc:
            raise Damaged(f"not a whole tar archive: {exc}") from exc
        for path, info in reversed(self._directories):
            _set_attributes(path, info)

    def _unpack(self, tar: tarfile.TarFile, info: tarfile.TarInfo) -> None:
        target = self._inside(info.name)
        if info.isdir():
            target.mkdir(exist_ok=True)
            _hint(target, info)
            self._directories.append((target, info))
            return
        if _is_there(target, info):
            return
        if os.path.lexists(target):
            target.unlink()
        if info.islnk():
            target.hardlink_to(self._inside(info.linkname))
            return
        if info.issym():
            target.symlink_to(info.linkname)
        elif info.isreg():
            self._write(tar, info, target)
        else:
            kind = stat.S_IFIFO if info.isfifo() else stat.S_IFCHR if info.ischr() else stat.S_IFBLK
            os.mknod(target, kind | info.mode, os.makedev(info.devmajor, info.devminor))
        _set_attributes(target, info)
        if expected := info.pax_headers.get(_SEAL):
            os.setxattr(target, SEAL_XATTR, info.pax_headers.get(_SEALING, "1").encode())
            if _value(target, SEAL_XATTR) != expected:
                raise Damaged(f"{target} differs from what was sealed as {expected}")

    def _write(self, tar: tarfile.TarFile, info: tarfile.TarInfo, target: Path) -> None:
        content = tar.extractfile(info)
        assert content is not None
        with target.open("xb", buffering=0) as file:
            _hint(target, info)
            while piece := content.read(1 << 20):
                view = memoryview(piece)
                while view:
                    view = view[file.write(view) :]

    def _inside(self, name: str) -> Path:
        parts = Path(name).parts
        if Path(name).is_absolute() or ".." in parts:
            raise Invalid(f"the archive's name {name!r} leads out of the directory")
        at = self._root
        for part in parts[:-1]:
            at /= part
            if at.is_symlink():
                raise Invalid(f"the archive's name {name!r} goes through a symbolic link")
        return self._root / name


def _walk(root: Path) -> Iterator[Path]:
    for path in sorted(root.iterdir()):
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)


def _is_there(target: Path, info: tarfile.TarInfo) -> bool:
    """Tell whether an interrupted import has unpacked this already; the time is set last."""
    if not (info.isreg() and target.is_file() and not target.is_symlink()):
        return False
    status = target.lstat()
    same_time = _seconds(status.st_mtime_ns) == info.pax_headers.get("mtime")
    return same_time and status.st_size == info.size and not info.pax_headers.get(_SEAL)


def _hint(target: Path, info: tarfile.TarInfo) -> None:
    if align := info.pax_headers.get(_ALIGN):
        try:
            os.setxattr(target, ALIGN_XATTR, align.encode())
        except OSError as exc:
            if exc.errno != errno.ENOTSUP:  # not a vfsmap mount: there is nothing to hint at
                raise


def _set_attributes(target: Path, info: tarfile.TarInfo) -> None:
    if os.geteuid() == 0:
        os.chown(target, info.uid, info.gid, follow_symlinks=False)
    for header, value in info.pax_headers.items():
        if header.startswith(_XATTR):
            raw = value.encode("utf-8", "surrogateescape")
            os.setxattr(target, header.removeprefix(_XATTR), raw, follow_symlinks=False)
    if not info.issym():
        target.chmod(info.mode)
    times = tuple(_nanoseconds(info.pax_headers.get(t, str(info.mtime))) for t in _TIMES)
    os.utime(target, ns=(times[0], times[1]), follow_symlinks=False)


def _seconds(nanoseconds: int) -> str:
    return f"{nanoseconds // 10**9}.{nanoseconds % 10**9:09d}"


def _nanoseconds(seconds: str) -> int:
    whole, _, fraction = seconds.partition(".")
    return int(whole) * 10**9 + int(fraction[:9].ljust(9, "0"))
