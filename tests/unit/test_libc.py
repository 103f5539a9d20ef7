import errno
import os
from pathlib import Path

import pytest

from vfsmap.pmem import libc

PAGE = 4096
ANONYMOUS = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS


def test_statx_agrees_with_fstat(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(5000))
    with path.open("rb") as file:
        found, real = libc.statx_nosync(file.fileno()), os.fstat(file.fileno())
    assert found == (
        real.st_dev,
        real.st_ino,
        real.st_mode,
        real.st_size,
        real.st_uid,
        real.st_gid,
        real.st_nlink,
        real.st_blocks,
    )


def test_the_address_of_a_buffer_is_where_its_bytes_are() -> None:
    data = bytearray(b"some bytes")
    view = memoryview(data)
    assert libc.address_of(view[3:]) == libc.address_of(data) + 3
    assert libc.address_of(b"read-only")


def test_what_has_no_buffer_has_no_address() -> None:
    with pytest.raises(TypeError, match="bytes-like"):
        libc.address_of(3)


@pytest.mark.parametrize(
    ("call", "number"),
    [
        (lambda: libc.mmap(1, PAGE, libc.PROT_READ, ANONYMOUS | libc.MAP_FIXED), errno.EINVAL),
        (lambda: libc.munmap(1, PAGE), errno.EINVAL),
        (lambda: libc.mprotect(PAGE, PAGE, libc.PROT_READ), errno.ENOMEM),
        (lambda: libc.mremap(PAGE, PAGE, PAGE, libc.MREMAP_MAYMOVE), errno.EFAULT),
        (lambda: libc.madvise(1, PAGE, libc.MADV_DONTNEED), errno.EINVAL),
        (lambda: libc.msync(PAGE, PAGE), errno.ENOMEM),
        (lambda: libc.mseal(1, PAGE), errno.EINVAL),
        (lambda: libc.fallocate(-1, 0, 0, PAGE), errno.EBADF),
        (lambda: libc.statx_nosync(-1), errno.EBADF),
    ],
    ids=["mmap", "munmap", "mprotect", "mremap", "madvise", "msync", "mseal", "fallocate", "statx"],
)
# any call
def test_a_failed_call_raises_the_kernels_error(call, number: int) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(OSError) as failed:  # noqa: PT011  # the number is what is checked
        call()
    assert failed.value.errno == number


def test_mremap_moves_a_page_with_its_bytes() -> None:
    old = libc.mmap(0, PAGE, libc.PROT_READ | libc.PROT_WRITE, ANONYMOUS)
    new = libc.mmap(0, PAGE, libc.PROT_NONE, ANONYMOUS)
    flags = libc.MREMAP_MAYMOVE | libc.MREMAP_FIXED
    assert libc.mremap(old, PAGE, PAGE, flags, new) == new
    libc.munmap(new, PAGE)


def test_an_advice_that_the_kernel_refuses_is_false() -> None:
    assert not libc.try_collapse(PAGE, 2 << 20)
