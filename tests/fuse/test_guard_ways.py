"""Every way to write to sealed text that is mapped: each is refused, or the digest tells."""

import ctypes
import errno
import fcntl
import itertools
import mmap
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import vfsmap
from vfsmap.daemon.client import Client, connect
from vfsmap.errors import Denied, Exists, Sealed
from vfsmap.kmod.host import Host
from vfsmap.kmod.module import Module
from vfsmap.kmod.store import Store
from vfsmap.kmod.userspace import user_host
from vfsmap.mapping.window import Window
from vfsmap.pmem import libc
from vfsmap.testing.commands import Server, served_pool
from vfsmap.testing.commands import vfsmap as command
from vfsmap.testing.kernels import modules
from vfsmap.testing.media import tmpfs
from vfsmap.testing.users import as_user
from vfsmap.units import MIB, PTE

STRANGER = 65534
_PKEY_MPROTECT = 329
_USERFAULTFD = 323
_UFFDIO_API, _UFFDIO_REGISTER = 0xC018AA3F, 0xC020AA00
_MADV_REMOVE = 9


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with tmpfs(huge="always", size="300M") as place, served_pool(place, "256M") as served:
        yield served


@pytest.fixture(scope="module")
def text(server: Server) -> Path:
    store = Store(server.directory / "store")
    names = ("reed_solomon", "crc7", "lz4_compress")
    store.add([Module.open(modules("61")[name]) for name in names], Host(user_host()))
    (pack,) = store.index.packs
    return store.file(pack, "text")


@pytest.fixture(autouse=True)
def unchanged(text: Path) -> Iterator[None]:
    """Whatever a test tried: the file is what was sealed."""
    before = text.read_bytes()
    yield
    assert text.read_bytes() == before
    command("verify", text)


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    made = connect(server.directory)
    yield made
    made.close()


# a sealed window stays until the process ends, so all tests share one
_windows: dict[Path, Window] = {}


@pytest.fixture
def window(text: Path) -> Window:
    if text not in _windows:
        _windows[text] = vfsmap.map(text, sealed=True, populate=True)
    return _windows[text]


def errno_of(function: Callable[..., Any], *arguments: Any) -> int:
    try:
        function(*arguments)
    except OSError as exc:
        return exc.errno or 0
    return 0


def test_the_window_cannot_be_made_writable_unmapped_or_mapped_over(window: Window) -> None:
    base, length = window.mapped
    both = libc.PROT_READ | libc.PROT_WRITE
    assert errno_of(libc.mprotect, base, length, both) in (errno.EPERM, errno.EACCES)
    assert errno_of(libc.munmap, base, length) == errno.EPERM
    flags = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS | libc.MAP_FIXED
    assert errno_of(libc.mmap, base, PTE.size, both, flags) == errno.EPERM
    moved = libc.MREMAP_MAYMOVE
    assert errno_of(libc.mremap, base, length, 2 * length, moved) == errno.EPERM


def test_its_view_is_read_only(window: Window) -> None:
    with window.view() as view, pytest.raises(TypeError, match="read-only"):
        view[0] = 0


def test_its_memory_cannot_be_written_through_proc(window: Window) -> None:
    fd = os.open("/proc/self/mem", os.O_RDWR)
    try:
        assert errno_of(os.pwrite, fd, b"\xcc", window.address) == errno.EIO
    finally:
        os.close(fd)


def test_another_process_cannot_write_it_either(window: Window) -> None:
    class Vector(ctypes.Structure):
        _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))

    data = ctypes.create_string_buffer(b"\xcc")
    source = Vector(ctypes.addressof(data), 1)
    target = Vector(window.address, 1)
    write = ctypes.CDLL(None, use_errno=True).process_vm_writev
    vectors = ctypes.POINTER(Vector), ctypes.c_ulong
    write.argtypes = (ctypes.c_int, *vectors, *vectors, ctypes.c_ulong)
    write.restype = ctypes.c_ssize_t
    done = write(os.getpid(), source, 1, target, 1, 0)
    assert (done, ctypes.get_errno()) == (-1, errno.EFAULT)


def test_a_hole_cannot_be_punched_through_the_window(window: Window) -> None:
    base, length = window.mapped
    assert errno_of(libc.madvise, base, length, _MADV_REMOVE) in (errno.EACCES, errno.EPERM)


def test_no_other_call_gets_at_its_pages(window: Window) -> None:
    base, length = window.mapped
    wrong = (errno.EACCES, errno.EPERM, errno.EINVAL, errno.EFAULT)
    assert errno_of(libc.madvise, base, length, libc.MADV_POPULATE_WRITE) in wrong
    library = ctypes.CDLL(None, use_errno=True)

    def failed(*arguments: Any) -> int:
        done = library.syscall(*arguments)
        return ctypes.get_errno() if done == -1 else 0

    span = ctypes.c_ulong(base), ctypes.c_ulong(length)
    assert failed(_PKEY_MPROTECT, *span, libc.PROT_READ | libc.PROT_WRITE, -1) in wrong
    fd = library.syscall(_USERFAULTFD, os.O_CLOEXEC)
    assert fd >= 0
    try:
        api = struct.pack("<QQQ", 0xAA, 0, 0)
        fcntl.ioctl(fd, _UFFDIO_API, api)
        for mode in (1, 2, 4):  # missing pages, write protection, minor faults
            wanted = struct.pack("<QQQQ", base, length, mode, 0)
            with pytest.raises(OSError, match=r"not permitted|Invalid"):
                fcntl.ioctl(fd, _UFFDIO_REGISTER, wanted)
    finally:
        os.close(fd)


def test_the_descriptor_that_a_reader_gets_is_read_only(client: Client, text: Path) -> None:
    with text.open("rb") as file:
        answer, descriptors = client.call("Map", (file.fileno(),), file=0)
    try:
        fd = descriptors[answer["pool"]]
        start = answer["extents"][0]["start"]
        assert errno_of(os.pwrite, fd, b"\xcc", start) == errno.EBADF
        assert errno_of(os.ftruncate, fd, 0) == errno.EINVAL
        assert errno_of(os.posix_fallocate, fd, start, 4096) == errno.EBADF
        with pytest.raises(PermissionError):
            mmap.mmap(fd, 2 * MIB, mmap.MAP_SHARED, mmap.PROT_WRITE, offset=start)
    finally:
        for fd in descriptors:
            os.close(fd)


def reopen(fd: int) -> int:
    try:
        os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDWR))
    except OSError as exc:
        return exc.errno or 0
    return 0


def test_nobody_but_its_owner_can_open_the_descriptor_anew(
    client: Client, text: Path, server: Server
) -> None:
    with text.open("rb") as file:
        answer, descriptors = client.call("Map", (file.fileno(),), file=0)
    try:
        fd = descriptors[answer["pool"]]
        assert as_user(STRANGER, reopen, fd) == errno.EACCES
        assert server.pool.stat().st_mode & 0o077 == 0
    finally:
        for fd in descriptors:
            os.close(fd)


def test_the_mount_refuses_what_would_change_it_and_allows_the_rest(text: Path) -> None:
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC, os.O_WRONLY | os.O_APPEND):
        assert errno_of(os.open, text, flags) == errno.EPERM
    assert errno_of(os.truncate, text, 0) == errno.EPERM
    assert errno_of(os.setxattr, text, "user.vfsmap.seal", b"") == errno.EEXIST
    assert errno_of(os.removexattr, text, "user.vfsmap.seal") != 0
    other = text.with_name("other.img")
    text.rename(other)
    other.chmod(0o400)
    other.chmod(0o444)
    other.rename(text)


def test_a_descriptor_opened_before_is_of_no_use(server: Server) -> None:
    path = server.directory / "early"
    path.write_bytes(bytes(8192))
    with path.open("r+b") as early:
        assert errno_of(os.setxattr, path, "user.vfsmap.seal", b"1") in (
            errno.ETXTBSY,
            errno.EBUSY,
        )
        early.write(b"\1")


def test_the_daemon_refuses_to_map_it_for_writing_to_grow_it_and_to_unseal_it(
    client: Client, text: Path
) -> None:
    with text.open("rb") as file:
        fds = (file.fileno(),)
        with pytest.raises((Sealed, Denied)):
            client.call("Allocate", fds, file=0, length=8 * MIB)
        with pytest.raises(Exists):
            client.call("Seal", fds, file=0)
        with pytest.raises((Sealed, Denied)):
            client.call("Map", fds, file=0, writable=True)


def test_refused_pokes_are_events_of_the_daemon_and_lines_of_pmsg(
    client: Client, text: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    command("pstore", "format", log)
    events = client.events()
    assert next(events)["kind"] == "ready"

    store = text.parents[2]
    refuse = ("--policy", "refuse", "--pmsg", log)
    done = command("module", "trace", store, "lz4_compress", "on", *refuse, check=False)

    assert done.returncode == 1
    assert "is persistent text and is never written" in done.stderr
    lines = command("pstore", "show", log, "pmsg-ramoops-0").stdout.splitlines()
    assert len(lines) > 3
    assert all("refused to write 5 bytes at 0x4" in line for line in lines)
    told = [event for event in itertools.islice(events, 12) if event["kind"] == "violation"]
    assert [event["detail"] for event in told] == lines[: len(told)]
    assert all(event["length"] == 5 for event in told)
    events.close()  # type: ignore[attr-defined]  # it is a generator


def test_what_root_does_to_the_medium_behind_all_backs_is_told_by_the_digest(
    server: Server, client: Client, text: Path
) -> None:
    with text.open("rb") as file:
        answer, _ = client.call("Extents", (file.fileno(),), file=0)
    at = answer["extents"][0]["start"] + 5 * 4096 + 17
    with server.pool.open("r+b", buffering=0) as pool:
        pool.seek(at)
        old = pool.read(1)
        pool.seek(at)
        pool.write(bytes([old[0] ^ 1]))
        try:
            done = command("verify", text, check=False)
            assert done.returncode == 3
            assert "1 blocks of 4096 bytes are damaged: 5" in done.stderr
            store = text.parents[2]
            done = command("module", "verify", store, check=False)
            assert done.returncode == 3
            assert "damaged blocks 5" in done.stderr
            done = command("module", "load", store, "crc7", check=False)
            assert done.returncode == 3
            assert "is not what was sealed: blocks 5 differ" in done.stderr
        finally:
            pool.seek(at)
            pool.write(old)
