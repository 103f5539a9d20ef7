"""Files as clients name them: a descriptor of the mount, or a path where there is no mount."""

import fcntl
import os
import stat

from vfsmap.errors import Denied, Invalid
from vfsmap.fs import ROOT, FileSystem
from vfsmap.pmem.libc import statx_nosync

_MOST_LINKS = 40  # as the kernel has it


def file_of_descriptor(fd: int, device: int | None, *, writing: bool) -> int:
    """Return the inode number of a file that a client has opened on our own mount.

    Asks the kernel only what it knows itself: the file's server is the loop that is asking.

    Raises:
        Denied: the descriptor is not one of this mount's, or does not allow what is asked for.
    """
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if flags & os.O_PATH:
        raise Denied("a descriptor opened with O_PATH gives no right to the file's bytes")
    status = statx_nosync(fd)
    if device is None or status.dev != device:
        raise Denied("the descriptor is not of a file on this daemon's mount")
    if not stat.S_ISREG(status.mode):
        raise Invalid("only regular files can be mapped")
    if writing and flags & os.O_ACCMODE != os.O_RDWR:
        raise Denied("the file was not opened for reading and writing (O_RDWR)")
    if flags & os.O_ACCMODE == os.O_WRONLY:
        raise Denied("the file was not opened for reading")
    return status.ino


def file_of_path(fs: FileSystem, path: str) -> int:
    """Return the inode number of a file by its path in the pool; links are followed.

    Raises:
        NotFound, NotADirectory: there is no such file.
        Invalid: too many symbolic links.
    """
    parts = _parts(os.fsencode(path))
    at, links = ROOT, 0
    while parts:
        name = parts.pop(0)
        inode = fs.lookup(at, name)
        if stat.S_ISLNK(inode.mode):
            links += 1
            if links > _MOST_LINKS:
                raise Invalid(f"{path}: too many symbolic links")
            target = fs.readlink(inode.ino)
            parts = _parts(target) + parts
            at = ROOT if target.startswith(b"/") else at
        else:
            at = inode.ino
    return at


def _parts(path: bytes) -> list[bytes]:
    return [part for part in path.split(b"/") if part and part != b"."]
