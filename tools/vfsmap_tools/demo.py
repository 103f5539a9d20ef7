"""The command ``demo``: the main job, on real parts, in under a minute.

A pool on the hugest medium that can be had, mounted; a real tree and a large file copied in; the
file mapped, and its page sizes compared with those of an ordinary mmap; a store through a window
read back through the mount; the server killed with SIGKILL; everything found again.
"""

import filecmp
import mmap
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import click

import vfsmap
from vfsmap.errors import VfsmapError
from vfsmap.pmem import lock_holder
from vfsmap.pmem.libc import address_of
from vfsmap.pmem.pages import page_sizes
from vfsmap.units import MIB, format_size
from vfsmap_tools.console import errors_exit, page_sizes_text, print_line
from vfsmap_tools.mounts import find_mount

_BIG = 256 * MIB
_POOL = 1024 * MIB
_TREES = ("/usr/share/doc", "/usr/lib/python3", "/usr/share/perl5", "/etc")
_MOST_FILES = 3000


@click.command("demo")
@errors_exit
def demo() -> None:
    """Format, mount, copy, map, kill and compare: the main job in under a minute."""
    began = time.monotonic()
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vfsmap-demo-")))
        medium = stack.enter_context(_medium(work))
        pool, mountpoint = medium / "demo.pmem", work / "mnt"
        mountpoint.mkdir()
        source = _tree(work / "tree")
        big = mountpoint / "big.bin"
        pattern = os.urandom(MIB)

        _say("format and mount a pool", f"{format_size(_POOL)}, {medium}")
        _vfsmap("format", pool, "--size", str(_POOL))
        stack.callback(_unmount, mountpoint)
        _vfsmap("mount", pool, mountpoint)

        files = sum(1 for path in source.rglob("*") if path.is_file())
        _say("copy a tree and a large file in", f"{files} files, {format_size(_BIG)}")
        _vfsmap("cp", "--quiet", source, mountpoint)
        with big.open("wb", buffering=0) as file:
            for _ in range(_BIG // MIB):
                file.write(pattern)

        _say("map the large file, every page touched")
        with vfsmap.map(big, populate=True) as window:
            print_line(f"      from the pool:       {page_sizes_text(window.page_sizes())} pages")
        print_line(f"      through the mount:   {page_sizes_text(_mmap_page_sizes(big))} pages")

        _say("store through a window, read through the mount")
        with vfsmap.map(big, writable=True, length=4096) as window:
            window.view()[:5] = b"hello"
            window.persist(0, 5)
            window.publish()
        with big.open("rb") as file:
            _require(file.read(5) == b"hello", "the mount shows what the window stored")

        _say("kill the server with SIGKILL, mount again")
        _sync(mountpoint)
        _kill_server(pool)
        _vfsmap("umount", mountpoint, check=False)
        _vfsmap("mount", pool, mountpoint)

        _say("compare every byte")
        _require_equal(source, mountpoint / source.name)
        with big.open("rb") as file:
            for number in range(_BIG // MIB):
                expected = b"hello" + pattern[5:] if number == 0 else pattern
                _require(file.read(MIB) == expected, f"MiB {number} of the large file")
        _vfsmap("umount", mountpoint)
        _vfsmap("check", pool)
    print_line(f"done in {time.monotonic() - began:.1f} seconds")


def _say(what: str, detail: str = "") -> None:
    print_line(f"  *   {what}" + (f" ({detail})" if detail else ""), flush=True)


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise VfsmapError(f"the demo failed: {what}")


def _vfsmap(*arguments: object, check: bool = True) -> None:
    command = [sys.executable, "-m", "vfsmap_tools.cli", *map(str, arguments)]
    result = subprocess.run(command, check=False, capture_output=not check)
    _require(result.returncode == 0 or not check, " ".join(["vfsmap", *map(str, arguments)]))


@contextmanager
def _medium(work: Path) -> Iterator[Path]:
    """Yield a directory on a tmpfs with huge pages for root, else the working directory."""
    if os.geteuid() != 0:
        yield work
        return
    place = work / "pmem"
    place.mkdir()
    options = f"size={_POOL + 64 * MIB},huge=always"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "vfsmap-demo", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def _tree(target: Path) -> Path:
    """Copy a few thousand real files aside, so that they can't change while we compare."""
    target.mkdir()
    left = _MOST_FILES
    for tree in map(Path, _TREES):
        for source in sorted(tree.rglob("*")) if tree.is_dir() else ():
            if left and source.is_file() and not source.is_symlink() and os.access(source, os.R_OK):
                copy = target / source.relative_to("/")
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(source.read_bytes())
                left -= 1
    return target


def _mmap_page_sizes(path: Path) -> dict[int, int]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        mapped.madvise(mmap.MADV_POPULATE_READ if hasattr(mmap, "MADV_POPULATE_READ") else 22)
        return page_sizes(address_of(mapped), len(mapped))


def _sync(mountpoint: Path) -> None:
    """Wait until all is durable: on a disk, the last seconds would be lost with the server."""
    with (mountpoint / "big.bin").open("rb") as file:
        os.fsync(file.fileno())


def _kill_server(pool: Path) -> None:
    pid = lock_holder(pool)
    if pid is None:
        raise VfsmapError(f"the demo failed: nobody serves {pool}")
    pidfd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    select.select([pidfd], [], [])
    os.close(pidfd)


def _require_equal(one: Path, other: Path) -> None:
    for path in sorted(one.rglob("*")):
        twin = other / path.relative_to(one)
        same = filecmp.cmp(path, twin, shallow=False) if path.is_file() else twin.is_dir()
        _require(same, f"{twin} differs from {path}")


def _unmount(mountpoint: Path) -> None:
    if find_mount(mountpoint):
        _vfsmap("umount", mountpoint, check=False)
