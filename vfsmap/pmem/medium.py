"""What a pool's file is made of, and what that promises.

Detection reads the mount table for the file's device: the file-system type and its options tell a
tmpfs from a hugetlbfs; a file mapped with MAP_SYNC is on a DAX file system; a character device
under /sys/class/dax is device-dax.
"""

import mmap
import os
import stat
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from vfsmap.errors import Unsupported
from vfsmap.pmem.mountinfo import mount_of
from vfsmap.units import KIB, LEVELS, MIB, Level, parse_size

MAP_SHARED_VALIDATE = 0x03
MAP_SYNC = 0x80000  # include/uapi/asm-generic/mman-common.h
_SYS_CHAR = Path("/sys/dev/char")
_THP_SHMEM = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


class Promise(Enum):
    """What a finished operation survives."""

    PROCESS = "process"
    """The death of every process, but not of the machine."""
    POWER = "power"
    """Power loss."""

    def covers(self, wanted: "Promise") -> bool:
        """Tell whether this promise is at least as strong as ``wanted``."""
        return self is Promise.POWER or wanted is Promise.PROCESS


class Commit(Enum):
    """How a store becomes what the medium promises."""

    STORE = "store"
    """By itself."""
    FLUSH = "flush"
    """By flushing CPU caches."""
    SYNC = "sync"
    """By writing back the page cache; slow, so transactions commit in groups."""


class Medium(NamedTuple):
    """The facts about a pool's file that the layers above depend on."""

    name: str
    """``tmpfs``, ``hugetlbfs``, ``dax``, ``device-dax`` or ``page cache``."""
    commit: Commit
    page_size: int
    """The smallest piece that can be mapped, reserved or punched, bytes."""
    huge: str = ""
    """The huge-page policy of a tmpfs (``always``, ``within_size``, ``advise``, ``never``)."""
    kept: int = 0
    """Bytes of huge pages that the kernel keeps for this hugetlbfs (its option ``min_size``)."""

    @property
    def level(self) -> Level:
        """The smallest page-table entries that can map it."""
        return next(level for level in LEVELS if level.size >= self.page_size)

    @property
    def promise(self) -> Promise:
        """What a finished operation survives on this medium."""
        return Promise.PROCESS if self.commit is Commit.STORE else Promise.POWER

    @property
    def can_punch(self) -> bool:
        """Tell whether ranges can be reserved and given back to the file system below."""
        return self.name != "device-dax"


def detect(fd: int) -> Medium:
    """Return what the open file ``fd`` is made of.

    Raises:
        Unsupported: it is neither a regular file nor a DAX device.
    """
    status = os.fstat(fd)
    if stat.S_ISCHR(status.st_mode):
        return _device_dax(fd, status)
    if not stat.S_ISREG(status.st_mode):
        raise _unsuitable(fd, _kind(status))
    mount = mount_of(status.st_dev)
    kind, options = (mount.kind, mount.options) if mount else ("", "")
    if kind == "hugetlbfs":
        kept = parse_size(_option(options, "min_size") or 0)
        return Medium("hugetlbfs", Commit.STORE, os.fstatvfs(fd).f_bsize, kept=kept)
    if kind in ("tmpfs", "ramfs", "devtmpfs"):
        return Medium("tmpfs", Commit.STORE, 4 * KIB, _tmpfs_policy(options))
    if _maps_synchronously(fd, status.st_size):
        return Medium("dax", Commit.FLUSH, 4 * KIB)
    return Medium("page cache", Commit.SYNC, 4 * KIB)


def _unsuitable(fd: int, kind: str) -> Unsupported:
    path = os.readlink(f"/proc/self/fd/{fd}")
    return Unsupported(f"{path} is {kind}; a pool is a regular file or a DAX device")


def _kind(status: os.stat_result) -> str:
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFBLK: "a block device", stat.S_IFIFO: "a FIFO"}
    return kinds.get(stat.S_IFMT(status.st_mode), "a socket")


def size_of(fd: int) -> int:
    """Return the bytes of a file or of a DAX device."""
    status = os.fstat(fd)
    if stat.S_ISCHR(status.st_mode):
        return int((_char_device(status) / "size").read_text())
    return status.st_size


def _char_device(status: os.stat_result) -> Path:
    return _SYS_CHAR / f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"


def _device_dax(fd: int, status: os.stat_result) -> Medium:
    device = _char_device(status)
    if not (device / "subsystem").resolve().name == "dax":
        raise _unsuitable(fd, "another device")
    align = device / "align"
    page_size = int(align.read_text()) if align.exists() else 2 * MIB
    return Medium("device-dax", Commit.FLUSH, page_size)


def _tmpfs_policy(options: str) -> str:
    """Return the policy that holds: the global override, else the mount's option."""
    chosen = ""
    if _THP_SHMEM.exists():
        text = _THP_SHMEM.read_text()
        chosen = text[text.index("[") + 1 : text.index("]")]
    override = {"force": "always", "deny": "never"}.get(chosen)
    return override or _option(options, "huge") or "never"


def _option(options: str, name: str) -> str:
    """Return the value of a mount option, or nothing."""
    pairs = (option.partition("=") for option in options.split(","))
    return next((value for key, _, value in pairs if key == name), "")


def _maps_synchronously(fd: int, size: int) -> bool:
    if size == 0:
        return False
    try:
        probe = mmap.mmap(fd, 1, MAP_SHARED_VALIDATE | MAP_SYNC, mmap.PROT_READ)
    except OSError:
        return False
    probe.close()
    return True
