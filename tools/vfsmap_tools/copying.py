"""The command ``cp``: real files into a pool, with hints and seals."""

import errno
import math
import os
import stat
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import click
from rich.progress import Progress, TaskID

from vfsmap.daemon.client import SEAL_XATTR, mounter_of
from vfsmap.errors import Exists, Invalid, NotFound, Sealed
from vfsmap.units import Level, format_size
from vfsmap_tools.console import LEVEL, errors_exit, interruptible, progress
from vfsmap_tools.fiemap import data_ranges

PATH = click.Path(path_type=Path)
ALIGN_XATTR = "user.vfsmap.align"
SEALING_XATTR = "user.vfsmap.sealing"
_PIECE = 1 << 20
_NOT_COPIED = (errno.ENOTSUP, errno.EPERM, errno.EACCES, errno.ENODATA)


@click.command("cp")
@click.argument("sources", type=PATH, nargs=-1, required=True, metavar="SRC...")
@click.argument("destination", type=PATH, metavar="DST")
@click.option(
    "--align", type=LEVEL, help="Lay files out in units of 2M or 1G, whatever their size."
)
@click.option("--seal", is_flag=True, help="Seal each file when it is there.")
@click.option("--quiet", "-q", is_flag=True, help="No progress bar.")
@errors_exit
def cp(
    sources: tuple[Path, ...], destination: Path, align: Level | None, seal: bool, quiet: bool
) -> None:
    """Copy files and directories, with modes, times, links and extended attributes.

    Works as cp -a does; DST must be a directory when there are several sources.
    """
    for source in sources:
        if not os.path.lexists(source):
            raise NotFound(f"{source} does not exist")
    inside = destination.is_dir()
    if seal or align is not None:
        require_on_pool(destination if inside else destination.parent)
    if len(sources) > 1 and not inside:
        raise Invalid(f"{destination} must be a directory to take {len(sources)} sources")
    pairs = [(s, destination / s.name if inside else destination) for s in sources]
    with interruptible(), progress(hidden=quiet) as bar:
        copier = Copier(bar, align, seal=seal)
        copier.total(sum(size for source, _ in pairs for size in _sizes(source)))
        for source, target in pairs:
            copier.copy(source, target)


def require_on_pool(path: Path) -> None:
    """Do nothing when a file or directory is on a mounted pool.

    Elsewhere the attributes that seal and align would be stored, and mean nothing.

    Raises:
        Invalid: it is not.
        OSError: it is not there, or can't be asked.
    """
    device = path.stat().st_dev
    if mounter_of(device) is None:
        raise Invalid(f"{path} is not on a mounted pool; only files there can be sealed or aligned")


def _sizes(source: Path) -> Iterator[int]:
    status = source.lstat()
    if stat.S_ISREG(status.st_mode):
        yield status.st_size
    elif stat.S_ISDIR(status.st_mode):
        for entry in source.iterdir():
            yield from _sizes(entry)


def _require_other(source: Path, status: os.stat_result, target: Path) -> None:
    """Do nothing when a copy does not go onto, or into, what it is made of."""
    if os.path.lexists(target) and os.path.samestat(status, target.lstat()):
        raise Invalid(f"{source} and {target} are the same file")
    if stat.S_ISDIR(status.st_mode) and source.resolve() in target.resolve().parents:
        raise Invalid(f"{target} is inside {source}; copy it to another place")


def _require_unsealed(target: Path) -> None:
    try:
        os.getxattr(target, SEAL_XATTR, follow_symlinks=False)
    except OSError:  # most often there is no such file, or no seal
        return
    raise Sealed(f"{target} is sealed; to have another file of that name, delete it first")


class Copier:
    """Copies trees; remembers hard links."""

    def __init__(self, bar: Progress, align: Level | None, *, seal: bool) -> None:
        self._bar = bar
        self._task: TaskID = bar.add_task("copying", total=None)
        self._align = align
        self._seal = seal
        self._linked: dict[tuple[int, int], Path] = {}

    def total(self, size: int) -> None:
        """Say how many bytes there are to copy."""
        self._bar.update(self._task, total=size)

    def copy(self, source: Path, target: Path) -> None:
        """Copy one file of any kind, or a tree.

        Raises:
            Exists: a file of another kind has the target's name.
            Invalid: it would be copied onto, or into, itself.
            OSError: as the file systems say.
        """
        status = source.lstat()
        mode = status.st_mode
        _require_other(source, status, target)
        _require_unsealed(target)
        first = self._linked.get((status.st_dev, status.st_ino))
        if first is not None:
            target.unlink(missing_ok=True)
            target.hardlink_to(first)
            return
        if stat.S_ISDIR(mode):
            target.mkdir(exist_ok=True)
            for entry in sorted(source.iterdir()):
                self.copy(entry, target / entry.name)
            self._copy_attributes(source, target, status)
            return
        if target.is_dir() and not target.is_symlink():
            raise Exists(f"{target} is a directory")
        beside = target.with_name(f".vfsmap-cp-{os.getpid()}")
        try:
            self._copy_leaf(source, beside, status)
            self._copy_attributes(source, beside, status)
            if self._seal and stat.S_ISREG(mode):
                os.setxattr(beside, SEAL_XATTR, b"1")
            beside.rename(target)  # what was there is there until now
        except BaseException as exc:
            beside.unlink(missing_ok=True)
            if isinstance(exc, OSError) and str(exc.filename) != str(source):
                exc.filename = str(target)
            raise
        if status.st_nlink > 1:
            self._linked[status.st_dev, status.st_ino] = target

    def _copy_leaf(self, source: Path, target: Path, status: os.stat_result) -> None:
        mode = status.st_mode
        if stat.S_ISREG(mode):
            self._copy_bytes(source, target, status)
        elif stat.S_ISLNK(mode):
            target.symlink_to(source.readlink())
        else:
            os.mknod(target, mode, status.st_rdev)

    def _copy_bytes(self, source: Path, target: Path, status: os.stat_result) -> None:
        """Copy what a file holds; its holes stay holes, unless units are asked for."""
        with source.open("rb", buffering=0) as reader, target.open("xb", buffering=0) as writer:
            if self._align is not None:
                hint = format_size(self._align.size).encode()
                os.setxattr(writer.fileno(), ALIGN_XATTR, hint)
            size = status.st_size
            if self._align is not None or status.st_blocks * 512 >= size:
                self._copy_run(reader, writer, math.inf)
                return
            writer.truncate(size)
            at = 0
            for start, end in data_ranges(reader.fileno(), size):
                self._bar.advance(self._task, start - at)
                reader.seek(start)
                writer.seek(start)
                self._copy_run(reader, writer, end - start)
                at = end
            self._bar.advance(self._task, size - at)

    def _copy_run(self, reader: FileIO, writer: FileIO, length: float) -> None:
        """Copy so many bytes from where the files are, or all that are left."""
        buffer = memoryview(bytearray(_PIECE))
        while length > 0 and (got := reader.readinto(buffer[: int(min(length, _PIECE))])):
            done = 0
            while done < got:
                done += writer.write(buffer[done:got]) or 0
            self._bar.advance(self._task, got)
            length -= got

    def _copy_attributes(self, source: Path, target: Path, status: os.stat_result) -> None:
        if os.geteuid() == 0:
            os.chown(target, status.st_uid, status.st_gid, follow_symlinks=False)
        for name in os.listxattr(source, follow_symlinks=False):
            try:
                value = os.getxattr(source, name, follow_symlinks=False)
                os.setxattr(target, name, value, follow_symlinks=False)
            except OSError as exc:
                if exc.errno not in _NOT_COPIED:
                    raise
        if not stat.S_ISLNK(status.st_mode):
            target.chmod(stat.S_IMODE(status.st_mode))
        times = (status.st_atime_ns, status.st_mtime_ns)
        os.utime(target, ns=times, follow_symlinks=False)
