"""Files as clients name them: a descriptor of the mount, or a path where there is no mount."""

import fcntl
import os
import stat

from vfsmap.errors import Busy, Denied, Exists, Invalid, NotFound
from vfsmap.fs import ROOT, FileSystem, Inode
from vfsmap.pmem.libc import statx_nosync

_MOST_LINKS = 40  # as the kernel has it
_UNCACHED = os.O_DIRECT | os.O_DSYNC


def file_of_descriptor(fd: int, device: int, *, writing: bool) -> tuple[int, bool]:
    """Return the inode number of a file that a client has opened on our own mount.

    Also tells whether the descriptor may have dirty pages in the mount's cache: O_DIRECT alone does
    not keep it from being mapped, together with O_DSYNC the mount makes it an uncached one.

    Asks the kernel only what it knows itself: the file's server is the loop that is asking.

    Raises:
        Denied: the descriptor is not one of this mount's, or does not allow what is asked for.
        Invalid: it is no regular file.
    """
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if flags & os.O_PATH:
        raise Denied("a descriptor opened with O_PATH gives no right to the file's bytes")
    status = statx_nosync(fd)
    if status.dev != device:
        raise Denied("the descriptor is not of a file on this daemon's mount")
    if not stat.S_ISREG(status.mode):
        raise Invalid("the descriptor is not of a regular file")
    mode = flags & os.O_ACCMODE
    if writing and mode != os.O_RDWR:
        raise Denied("the file was not opened for reading and writing (O_RDWR)")
    if mode == os.O_WRONLY:
        raise Denied("the file was not opened for reading")
    return status.ino, mode != os.O_RDONLY and flags & _UNCACHED != _UNCACHED


def file_of_path(fs: FileSystem, path: str) -> Inode:
    """Return the file of a path in the pool; links are followed, ``..`` above the root is the root.

    Raises:
        NotFound, NotADirectory, NameTooLong: there is no such file.
        Invalid: too many symbolic links, or the path can't be one.
    """
    parent, name = _walk(fs, path)
    return fs.lookup(parent, name) if name else fs.get(parent)


def create_file(fs: FileSystem, path: str) -> Inode:
    """Return the file of a path in the pool, made if it is missing.

    Raises:
        NotFound, NotADirectory, NameTooLong: there is no such directory.
        Exists: something else has the name.
        Invalid: as :func:`file_of_path`.

    Crash: the file is there, or not.
    """
    parent, name = _walk(fs, path)
    if not name:
        raise Exists(f"{path} is a directory")
    try:
        return fs.lookup(parent, name)
    except NotFound:
        return fs.create(parent, name, 0o600, os.geteuid(), os.getegid())


def _walk(fs: FileSystem, path: str) -> tuple[int, bytes]:
    """Return the directory and the last component, which is no link; b"" for the root itself."""
    if "\0" in path:
        raise Invalid("a path can't hold a NUL character")
    parts = _parts(os.fsencode(path))
    at, links = ROOT, 0
    while parts:
        name = parts.pop(0)
        if name == b"..":
            at = fs.parent(at)
            continue
        try:
            inode = fs.lookup(at, name)
        except NotFound:
            if parts:
                raise
            return at, name
        if stat.S_ISLNK(inode.mode):
            links += 1
            if links > _MOST_LINKS:
                raise Invalid(f"{path}: too many symbolic links")
            target = fs.readlink(inode.ino)
            parts = _parts(target) + parts
            at = ROOT if target.startswith(b"/") else at
        elif not parts:
            return at, name
        else:
            at = inode.ino
    return at, b""


def _parts(path: bytes) -> list[bytes]:
    return [part for part in path.split(b"/") if part and part != b"."]


def require_uncached(fs: FileSystem, ino: int) -> None:
    """Do nothing when nobody can have dirty pages of the file in the mount's cache.

    Raises:
        Busy: the file is open for writing through the cache.
    """
    if fs.has_cached_writer(ino):
        raise Busy(
            "the file is open for writing through the mount's cache: close it first, or open it "
            "with O_DIRECT and O_DSYNC"
        )
