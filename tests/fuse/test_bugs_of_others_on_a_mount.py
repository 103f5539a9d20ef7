"""Two of the bugs that others shipped, on a real mount; the others are in tests/crash."""

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vfsmap
from vfsmap.daemon.client import close_all, connect
from vfsmap.errors import Denied, VfsmapError
from vfsmap.testing.commands import served_pool
from vfsmap.testing.commands import vfsmap as vfsmap_command
from vfsmap.testing.media import tmpfs
from vfsmap.testing.posix import as_user
from vfsmap.units import MIB
from vfsmap_tools.mounts import find_mount

TRUSTED = ("daemon", 1)
"""A group that every Debian has."""
PATIENCE = 25
"""Seconds in which a command that can't do its work has to say so."""


def require_read_only(descriptor: int) -> None:
    """Try every way from a descriptor for reading to a store."""
    with pytest.raises(PermissionError):
        mmap.mmap(descriptor, MIB, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(PermissionError):
        os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(descriptor, b"x", 0)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    shown = libc.mmap(None, MIB, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    assert libc.mprotect(ctypes.c_void_p(shown), MIB, mmap.PROT_READ | mmap.PROT_WRITE) == -1


def try_to_write(path: Path) -> None:
    """Try, as somebody who may only read a file, to get hold of its writer's window."""
    with path.open("rb") as file, connect(path.parent) as client:
        with pytest.raises(PermissionError):
            os.open(path, os.O_RDWR)
        with pytest.raises(Denied):
            client.call("Map", (file.fileno(),), file=0, writable=True)
        leases = [one["lease"] for one in client.call("Leases")[0]["leases"] if one["writable"]]
        assert leases
        for lease in leases:
            for method in ("Publish", "Release"):
                with pytest.raises(VfsmapError):
                    client.call(method, lease=lease)
        _, descriptors = client.call("Map", (file.fileno(),), file=0)
        for descriptor in descriptors:
            require_read_only(descriptor)
        close_all(descriptors)


def test_one_user_s_write_window_is_not_open_for_another_who_may_read() -> None:
    with tmpfs() as place, served_pool(place, "64M", "--group", TRUSTED[0]) as server:
        place.chmod(0o755)
        path = server.directory / "file"
        path.write_bytes(bytes(2 * MIB))
        path.chmod(0o644)
        with vfsmap.map(path, writable=True, direct=True) as window:
            window.view()[:5] = b"first"
            as_user(lambda: try_to_write(path), groups=[TRUSTED[1]])
            window.view()[5:11] = b"second"  # nobody has released it, either
            window.publish()
        assert path.read_bytes()[:12] == b"firstsecond\0"


NO_DEVICE = "mount -t tmpfs none /dev; mknod /dev/null c 1 3; mknod /dev/urandom c 1 9"
OTHER_DEVICE = "mount --bind /dev/null /dev/fuse"
NO_DRIVER = f"{NO_DEVICE}; mknod /dev/fuse c 10 253"
PLAIN_FILE = f"{NO_DEVICE}; touch /dev/fuse"


@pytest.mark.parametrize("foreground", [False, True])
@pytest.mark.parametrize(
    ("prepare", "arguments", "reason"),
    [
        (NO_DEVICE, [], "/dev/fuse is missing"),
        (OTHER_DEVICE, [], "can't mount"),
        (NO_DRIVER, [], "can't mount"),
        (PLAIN_FILE, [], "can't mount"),
        ("true", ["-o", "dax=always"], "dax=always"),
        ("true", ["--promise", "power"], "power"),
        ("true", ["--group", "nobody-is-in-there"], "nobody-is-in-there"),
        ("true", ["--socket", "/proc/socket"], "/proc/socket"),
    ],
)
def test_a_mount_fails_rather_than_hangs_when_something_is_unsupported(
    prepare: str, arguments: list[str], reason: str, foreground: bool
) -> None:
    with tmpfs(size="64M") as place:
        pool, directory = place / "pool", place / "mnt"
        directory.mkdir()
        vfsmap_command("format", pool, "--size", "32M")
        mount = [sys.executable, "-m", "vfsmap_tools.cli", "mount", str(pool), str(directory)]
        mount += [*arguments, *["--foreground"] * foreground]
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-ec", f'{prepare}; exec "$@"', "sh", *mount],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode in (1, 2)
        assert reason in done.stderr
        assert "Traceback" not in done.stderr
        assert find_mount(directory) is None
        assert "clean" in vfsmap_command("check", pool).stdout
        assert not left_over(directory)


def left_over(directory: Path) -> list[Path]:
    """Return the processes that name a directory."""
    name = os.fsencode(directory)
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if name in (process / "cmdline").read_bytes():
                found.append(process)
        except OSError:
            continue
    return found
