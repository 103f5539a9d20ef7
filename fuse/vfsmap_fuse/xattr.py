"""The virtual attributes: what ioctl and fallocate would do, if pyfuse3 passed them on.

user.vfsmap.align     4K, 2M or 1G: the unit that a file's extents are laid out in; get, set, remove
user.vfsmap.seal      set to anything: seal the file; get: its digest, as the fsverity tool has it
user.vfsmap.sealing   get: how a sealed file was hashed, such as hash=sha512 block=4096 salt=00ff;
                      user.vfsmap.seal can be set to that, too
user.vfsmap.extents   get: one line for each extent, with file offset, pool offset and length
user.vfsmap.level     get: the largest level whose entries can map all of the file
user.vfsmap.socket    get: where the mapping daemon of this mount listens
user.vfsmap.lease.*   get: a lease, for one of the daemon's clients (vfsmap.daemon.ticket)

None of them is listed, so programs that copy attributes do not trip over them.
"""

import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from vfsmap.errors import Denied, Invalid, NoData, TooBig, Unsupported
from vfsmap.fs import FileSystem
from vfsmap.fs.xattrs import XATTR_SIZE_MAX
from vfsmap.mapping.layout import merge
from vfsmap.units import LEVELS, Extent, format_size, parse_level
from vfsmap.verity import DEFAULT, Descriptor, Parameters

_PREFIX = b"user.vfsmap."
_LEASE = _PREFIX + b"lease."
_NAMESPACES = (b"user.", b"trusted.", b"security.")
Seal = Callable[[int, Parameters], Awaitable[object]]
"""Seals a file of this inode number, hashed so; it reads the whole file, a slice at a time."""


class VirtualXattrs:
    """The attributes that are not stored as such."""

    def __init__(self, fs: FileSystem, seal: Seal, socket: Path | None) -> None:
        self._fs = fs
        self._seal = seal
        self._socket = socket
        self._getters: dict[bytes, Callable[[int], bytes]] = {
            _PREFIX + b"align": self._align,
            _PREFIX + b"seal": self._digest,
            _PREFIX + b"sealing": self._parameters,
            _PREFIX + b"extents": self._extents,
            _PREFIX + b"level": self._level,
            _PREFIX + b"socket": self._where,
        }

    def __contains__(self, name: bytes) -> bool:
        return name.startswith(_PREFIX)

    def get(self, ino: int, name: bytes, pid: int, uid: int) -> bytes:
        """Return a virtual attribute's value, to a thread and its user.

        Raises:
            NoData: there is no such attribute, or this file does not have it.
        """
        if name.startswith(_LEASE) and self._fs.lease_by_attribute is not None:
            return self._fs.lease_by_attribute(ino, name, pid, uid)
        getter = self._getters.get(name)
        if getter is None:
            raise NoData(f"there is no attribute {name.decode(errors='replace')}")
        return getter(ino)

    async def set(self, ino: int, name: bytes, value: bytes) -> None:
        """Set a virtual attribute: seal a file, or give it an alignment hint.

        Raises:
            Denied: the attribute can't be set.
            Invalid: the value is not an alignment, or no parameters of a seal.
            Others as FileSystem.seal and FileSystem.set_align.

        Crash: sealed, or not; the old hint or the new one.
        """
        if name == _PREFIX + b"align":
            level = parse_level(value.rstrip(b"\0\n").decode(errors="replace"))
            self._fs.set_align(ino, level.shift)
        elif name == _PREFIX + b"seal":
            self._fs.require_sealable(ino)
            text = value.rstrip(b"\0\n").decode(errors="replace")
            await self._seal(ino, Parameters.decode(text) if "=" in text else DEFAULT)
        else:
            raise Denied(f"the attribute {name.decode(errors='replace')} can't be set")

    def remove(self, ino: int, name: bytes) -> None:
        """Remove an alignment hint.

        Raises:
            NoData: the file has none.
            Denied: the attribute can't be removed.

        Crash: the hint is there, or not.
        """
        if name != _PREFIX + b"align":
            raise Denied(f"the attribute {name.decode(errors='replace')} can't be removed")
        self._align(ino)
        self._fs.set_align(ino, 0)

    def _align(self, ino: int) -> bytes:
        shift = self._fs.get(ino).align
        if not shift:
            raise NoData(f"inode {ino} has no alignment hint")
        return format_size(1 << shift).encode()

    def _digest(self, ino: int) -> bytes:
        return str(self._descriptor(ino)).encode()

    def _parameters(self, ino: int) -> bytes:
        return self._descriptor(ino).parameters.encode().encode()

    def _descriptor(self, ino: int) -> Descriptor:
        descriptor = self._fs.seal_of(ino)
        if descriptor is None:
            raise NoData(f"inode {ino} is not sealed")
        return Descriptor.decode(descriptor)

    def _extents(self, ino: int) -> bytes:
        lines = (" ".join(map(str, extent)) for extent in self._allocated(ino))
        text = "\n".join(lines).encode()
        if len(text) > XATTR_SIZE_MAX:
            raise TooBig(f"the extents of inode {ino} don't fit into an attribute")
        return text

    def _level(self, ino: int) -> bytes:
        extents = self._allocated(ino)
        if not extents:
            raise NoData(f"inode {ino} has no extents")
        level = min(map(_level_of, extents))
        return format_size(level).encode()

    def _where(self, ino: int) -> bytes:
        if self._socket is None:
            raise NoData("this mount has no mapping daemon")
        return os.fsencode(self._socket)

    def _allocated(self, ino: int) -> list[Extent]:
        if not self._fs.get(ino).is_file:
            raise NoData(f"inode {ino} is not a regular file")
        return list(merge(self._fs.extents(ino)))


def _level_of(extent: Extent) -> int:
    """Return the size of the largest entries that can map the whole extent."""
    fits = (
        level.size
        for level in LEVELS
        if not (extent.offset | extent.start | extent.length) % level.size
    )
    return max(fits)


def require_namespace(name: bytes) -> None:
    """Do nothing when attributes of this name can be stored.

    POSIX ACLs (in ``system.``) are refused: stored without being obeyed they would be a lie.

    Raises:
        Unsupported: they can't.
        Invalid: nothing follows the namespace.
    """
    if not name.startswith(_NAMESPACES):
        raise Unsupported(f"attributes such as {name.decode(errors='replace')} can't be stored")
    if name in _NAMESPACES:
        raise Invalid("an attribute needs a name behind its namespace")
