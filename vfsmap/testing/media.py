"""Real media for tests: a tmpfs, a hugetlbfs or an ext4, mounted for as long as a block lasts.

Each context manager yields the directory, needs root, and undoes all it did: the mount, the huge
pages it had the kernel set aside, the image file.  Several processes may use them at once.
"""

import fcntl
import os
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from vfsmap.errors import Denied, NoMemory, Unsupported
from vfsmap.units import KIB, PTE, format_size, parse_size

_HUGE_PAGES: Final = Path("/sys/kernel/mm/hugepages")
_VM: Final = Path("/proc/sys/vm")
_LOOP_SET_STATUS64, _LOOP_GET_STATUS64 = 0x4C04, 0x4C05
_LOOP_STATUS_SIZE, _LOOP_SIZELIMIT = 232, 32
"""Of struct loop_info64 (include/uapi/linux/loop.h), and where its lo_sizelimit lies."""


@contextmanager
def tmpfs(huge: str = "always", size: int | str = "1G") -> Iterator[Path]:
    """Mount a tmpfs of ``size`` with the huge-page policy ``huge``.

    Raises:
        Denied: the caller is not root.
    """
    with _mounted("tmpfs", "vfsmap-test", f"huge={huge},size={parse_size(size)}") as path:
        yield path


@contextmanager
def hugetlbfs(page_size: int | str = "2M", pages: int = 64) -> Iterator[Path]:
    """Set ``pages`` huge pages aside and mount a hugetlbfs that has them to itself.

    Raises:
        Denied: the caller is not root.
        NoMemory: the kernel finds no room for that many.
        Unsupported: the machine has no pages of that size.
    """
    page_size = parse_size(page_size)
    _require_root("a hugetlbfs")
    with _set_aside(page_size, pages):
        size = page_size * pages
        options = f"pagesize={page_size},size={size},min_size={size}"
        with _mounted("hugetlbfs", "vfsmap-test", options) as path:
            yield path


@contextmanager
def ext4_loop(size: int | str = "256M") -> Iterator[Path]:
    """Make an ext4 of ``size`` in an image file and mount it over a loop device.

    Raises:
        Denied: the caller is not root.
    """
    _require_root("an ext4")
    with tempfile.NamedTemporaryFile(prefix="vfsmap-", suffix=".ext4") as image:
        image.truncate(parse_size(size))
        _run("mkfs.ext4", "-q", "-F", "-b", "4096", image.name)
        with _mounted("ext4", image.name, "loop") as path:
            yield path


class Disk:
    """An ext4 whose disk can fail, or run out of room below it, and then refuses to write back."""

    def __init__(self, image: Path, directory: Path) -> None:
        self.directory = directory
        """Where it is mounted."""
        self._image = image
        self._filler = image.with_name("filler")

    def fill(self) -> None:
        """Have the disk fail every write to a block that was never written before."""
        os.sync()
        with self._filler.open("wb", buffering=0) as filler, suppress(OSError):
            while filler.write(bytes(4 * KIB)):
                pass

    def fail(self) -> None:
        """Have the disk fail whatever is read or written, with EIO."""
        os.sync()
        self._limit(PTE.size)

    def mend(self) -> None:
        """Have the disk work again, and mount it anew; it must not be in use."""
        self._filler.unlink(missing_ok=True)
        self._limit(0)
        _run("umount", str(self.directory))
        _run("mount", "-o", "loop", str(self._image), str(self.directory))

    def _limit(self, size: int) -> None:
        """Have the loop device end after so many bytes; 0: with its image."""
        lines = map(str.split, Path("/proc/self/mounts").read_text().splitlines())
        device = next(line[0] for line in lines if line[1] == str(self.directory))
        with Path(device).open("rb") as file:
            status = bytearray(fcntl.ioctl(file, _LOOP_GET_STATUS64, bytes(_LOOP_STATUS_SIZE)))
            struct.pack_into("=Q", status, _LOOP_SIZELIMIT, size)
            fcntl.ioctl(file, _LOOP_SET_STATUS64, bytes(status))


@contextmanager
def full_disk(size: int | str = "64M") -> Iterator[Disk]:
    """Make an ext4 of ``size`` on a disk that can be made to fail.

    Raises:
        Denied: the caller is not root.
    """
    size = parse_size(size)
    with tmpfs(huge="never", size=size) as below, tempfile.TemporaryDirectory() as name:
        image = below / "disk"
        image.touch()
        os.truncate(image, size)
        _run("mkfs.ext4", "-q", "-F", "-b", "4096", str(image))
        _run("mount", "-o", "loop", str(image), name)
        try:
            yield Disk(image, Path(name))
        finally:
            _unmount(name)


@contextmanager
def _mounted(kind: str, source: str, options: str) -> Iterator[Path]:
    _require_root(f"a {kind}")
    with tempfile.TemporaryDirectory(prefix="vfsmap-") as name:
        _run("mount", "-t", kind, "-o", options, source, name)
        try:
            yield Path(name)
        finally:
            _unmount(name)


def _unmount(name: str) -> None:
    # a window that a failed test left behind keeps the mount busy: then it goes with the process
    if subprocess.run(("umount", name), capture_output=True, check=False).returncode:
        _run("umount", "--lazy", name)


@contextmanager
def _set_aside(page_size: int, pages: int) -> Iterator[None]:
    control = _HUGE_PAGES / f"hugepages-{page_size // KIB}kB" / "nr_hugepages"
    if not control.exists():
        raise Unsupported(f"this machine has no huge pages of {format_size(page_size)}")
    available = _available()
    if page_size * pages > available:
        raise NoMemory(
            f"{pages} huge pages of {format_size(page_size)} do not fit into the "
            f"{format_size(available)} that are free; ask for fewer"
        )
    gained = _adjust(control, pages)
    if gained < pages:  # free memory lies in pieces: the page cache is in the way
        for name, word in (("drop_caches", "3"), ("compact_memory", "1")):
            (_VM / name).write_text(word)
        gained += _adjust(control, pages - gained)
    try:
        if gained < pages:
            raise NoMemory(
                f"the kernel found {gained} of {pages} free pages of {format_size(page_size)}; "
                "free some memory, or ask for fewer"
            )
        yield
    finally:
        _adjust(control, -gained)


def _available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * KIB
    raise Unsupported("/proc/meminfo has no MemAvailable")


def _adjust(control: Path, change: int) -> int:
    """Add to a counter of huge pages; return by how much it really grew."""
    with control.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before = int(control.read_text())
        control.write_text(str(max(before + change, 0)))
        return int(control.read_text()) - before


def _require_root(what: str) -> None:
    if os.geteuid() != 0:
        raise Denied(f"mounting {what} needs root; run this test as root")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unsupported(f"{' '.join(command)}: {done.stderr.strip()}")
