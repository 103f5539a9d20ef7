"""Where benchmarks keep their bytes: mounts and huge pages, taken away again whatever happens."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import click

from vfsmap.units import Level, format_size

_PATIENCE: Final = 300
"""Seconds; fuse2fs takes its time to write back what it has."""
_HUGE_PAGES: Final = Path("/sys/kernel/mm/hugepages")


def module(name: str, *arguments: object) -> list[str]:
    """Return the command line that runs a module of ours."""
    return [sys.executable, "-m", name, *map(str, arguments)]


def vfsmap(*arguments: object) -> None:
    """Run a command of vfsmap's and throw away what it prints."""
    command = module("vfsmap_tools.cli", *arguments)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Yield an empty directory."""
    with TemporaryDirectory(prefix="vfsmap-bench-") as name:
        yield Path(name)


@contextlib.contextmanager
def mounted(kind: str, source: str | Path, options: str) -> Iterator[Path]:
    """Mount something on a directory of its own."""
    with scratch() as directory:
        command = ["mount", "-t", kind, "-o", options, str(source), str(directory)]
        subprocess.run(command, check=True)
        try:
            yield directory
        finally:
            unmount(directory)


def unmount(directory: Path) -> None:
    """Unmount, with some patience: others look into new mounts."""
    deadline = time.monotonic() + _PATIENCE
    while subprocess.run(["umount", directory], stderr=subprocess.DEVNULL, check=False).returncode:
        if time.monotonic() > deadline:
            subprocess.run(["umount", directory], check=True)
        time.sleep(0.1)


def tmpfs(size: str, huge: str = "always") -> contextlib.AbstractContextManager[Path]:
    """Return a mounted tmpfs of a huge-page policy."""
    return mounted("tmpfs", "vfsmap-bench", f"huge={huge},size={size}")


@contextlib.contextmanager
def image(kind: str, file: Path, size: int, *options: str) -> Iterator[Path]:
    """Make a file system, ext4 or xfs, in a file and mount it by a loop device."""
    with file.open("wb") as made:
        made.truncate(size)
    quiet = {"ext4": ("-q", "-F", "-E", "lazy_itable_init=0"), "xfs": ("-q", "-f")}
    command = [f"mkfs.{kind}", *quiet[kind], *options, str(file)]
    made_it = subprocess.run(command, capture_output=True, text=True, check=False)
    if made_it.returncode:  # what it says otherwise are remarks
        raise click.ClickException(f"{' '.join(command)}: {made_it.stderr.strip()}")
    try:
        with mounted(kind, file, "loop") as directory:
            yield directory
    finally:
        file.unlink()


@contextlib.contextmanager
def huge_pages(level: Level, count: int) -> Iterator[None]:
    """Have the kernel keep huge pages of a level free for as long as the block lasts.

    Raises:
        click.ClickException: it found no room for so many.
    """
    stock = _HUGE_PAGES / f"hugepages-{level.size >> 10}kB" / "nr_hugepages"
    before = int(stock.read_text())
    stock.write_text(str(before + count))
    try:
        got = int(stock.read_text()) - before
        if got < count:
            raise click.ClickException(
                f"the kernel found {got} of {count} huge pages of {format_size(level.size)}"
            )
        yield
    finally:
        stock.write_text(str(before))


@contextlib.contextmanager
def running(command: list[str], mountpoint: Path) -> Iterator[int]:
    """Run a file system server until the block ends; yield its process id."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            deadline = time.monotonic() + _PATIENCE
            while not mountpoint.is_mount():
                if server.poll() is not None or time.monotonic() > deadline:
                    raise click.ClickException(f"no mount came of {' '.join(command)}")
                time.sleep(0.05)
            yield server.pid
        finally:
            if server.poll() is None or mountpoint.is_mount():
                unmount(mountpoint)
            server.wait(_PATIENCE)


@contextlib.contextmanager
def pool(medium: Path, size: str, *options: str) -> Iterator[Path]:
    """Format a pool on a medium and mount it; yield the mount."""
    path = medium / "pool"
    vfsmap("format", path, "--size", size)
    try:
        with scratch() as directory:
            command = ("mount", "--foreground", *options, path, directory)
            with running(module("vfsmap_tools.cli", *command), directory):
                yield directory
    finally:
        path.unlink()
