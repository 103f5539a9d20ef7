"""A pool with its mount and its mapping daemon, served by a real server process, for a test."""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vfsmap.pmem import lock_holder
from vfsmap.testing.media import tmpfs
from vfsmap_tools.mounting import wait_until_free
from vfsmap_tools.mounts import find_mount


def vfsmap(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the command ``vfsmap`` as a person would; complain with its own words."""
    command = [sys.executable, "-m", "vfsmap_tools.cli", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and result.returncode:
        raise AssertionError(f"vfsmap {' '.join(command[3:])}: {result.stderr or result.stdout}")
    return result


class Server:
    """A mounted pool."""

    def __init__(self, pool: Path, directory: Path, options: tuple[object, ...]) -> None:
        self.pool = pool
        self.directory = directory
        self.log = pool.with_suffix(".log")
        self._options = options

    def mount(self) -> None:
        """Mount, and start the daemon."""
        vfsmap("mount", self.pool, self.directory, "--log", self.log, *self._options)

    def unmount(self) -> None:
        """Unmount, and wait for the server's end."""
        if find_mount(self.directory):
            vfsmap("umount", self.directory)

    def make_directory(self, test: str) -> Path:
        """Make a directory for a test, named after it, on the mount."""
        path = self.directory / test.replace("[", "-").strip("]")
        path.mkdir()
        return path

    @property
    def pid(self) -> int:
        """The server's process."""
        pid = lock_holder(self.pool)
        assert pid is not None, f"nobody serves {self.pool}"
        return pid

    def kill(self) -> None:
        """Kill the server with SIGKILL, and wait until it and its mount are gone."""
        pid = self.pid
        pidfd = os.pidfd_open(pid)
        try:
            os.kill(pid, signal.SIGKILL)
            select.select([pidfd], [], [])
        finally:
            os.close(pidfd)
        if find_mount(self.directory):
            # its keeper may be just about to do it
            subprocess.run(["umount", "-l", self.directory], capture_output=True, check=False)
        wait_until_free(self.pool)


@contextmanager
def served_pool(directory: Path, size: str = "256M", *options: object) -> Iterator[Server]:
    """Yield a fresh pool in ``directory``, mounted on a directory beside it."""
    pool, mountpoint = directory / "test.pmem", directory / "mnt"
    mountpoint.mkdir()
    vfsmap("format", pool, "--size", size)
    server = Server(pool, mountpoint, options)
    server.mount()
    try:
        yield server
    finally:
        server.unmount()


@contextmanager
def pool_for_all() -> Iterator[Server]:
    """Yield a pool of huge pages where all may write, and the group daemon is trusted."""
    with tmpfs(huge="always", size="300M") as place:
        place.chmod(0o755)
        with served_pool(place, "256M", "--group", "daemon") as served:
            served.directory.chmod(0o777)
            yield served
