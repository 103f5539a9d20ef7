"""What docs/posix.md says can't be had: refused as it says, and never half done."""

import array
import ctypes
import errno
import fcntl
import os
from pathlib import Path

import pytest

from vfsmap.pmem import libc
from vfsmap.testing.posix import refused

AT_FDCWD = -100
FS_IOC_GETFLAGS, FS_IOC_FIEMAP, FS_IOC_ENABLE_VERITY = 0x80086601, 0xC020660B, 0x40806685
C = ctypes.CDLL(None, use_errno=True)


@pytest.mark.parametrize("mode", [0, 1, 3, 0x10])
def test_fallocate_is_refused(here: Path, mode: int) -> None:
    with Path("it").open("wb") as file, refused(errno.EOPNOTSUPP):
        libc.fallocate(file.fileno(), mode, 0, 4096)
    assert os.stat("it").st_size == 0


def test_posix_fallocate_writes_zeros_instead(here: Path) -> None:
    with Path("it").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 100_000)
    assert Path("it").read_bytes() == bytes(100_000)
    assert os.stat("it").st_blocks * 512 >= 100_000


def test_a_file_without_a_name_can_not_be_opened(here: Path) -> None:
    with refused(errno.EOPNOTSUPP):
        os.close(os.open(".", os.O_TMPFILE | os.O_RDWR))


@pytest.mark.parametrize("request_", [FS_IOC_GETFLAGS, FS_IOC_FIEMAP, FS_IOC_ENABLE_VERITY])
def test_ioctls_are_refused(here: Path, request_: int) -> None:
    with Path("it").open("wb") as file, refused(errno.ENOTTY, errno.EOPNOTSUPP, errno.ENOSYS):
        fcntl.ioctl(file, request_, array.array("B", bytes(256)))


class _Handle(ctypes.Structure):
    _fields_ = (("size", ctypes.c_uint), ("type", ctypes.c_int), ("bytes", ctypes.c_ubyte * 128))


def test_a_file_handle_opens_its_file_and_is_stale_after_its_end(here: Path) -> None:
    Path("it").write_bytes(b"text")
    handle, mount = _Handle(size=128), ctypes.c_int()
    name = C.name_to_handle_at
    assert not name(AT_FDCWD, b"it", ctypes.byref(handle), ctypes.byref(mount), 0)
    root = os.open(".", os.O_RDONLY)
    fd = C.open_by_handle_at(root, ctypes.byref(handle), os.O_RDONLY)
    assert os.read(fd, 4) == b"text"
    os.close(fd)
    os.unlink("it")
    assert C.open_by_handle_at(root, ctypes.byref(handle), os.O_RDONLY) == -1
    assert ctypes.get_errno() == errno.ESTALE
    os.close(root)
