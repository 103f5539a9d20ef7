"""A real tree of at least 20,000 files, copied in: every byte and attribute is there, and stays."""

import os
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from vfsmap.testing.commands import Server, served_pool
from vfsmap.testing.media import tmpfs
from vfsmap.units import MIB

FILES: Final = 20_000
NODES: Final = ("fifo", "zero", "disk", "socket")
pytestmark = pytest.mark.slow


def real_directories() -> list[Path]:
    """Return directories of this system with enough files, those with small ones first."""
    sizes: dict[Path, list[int]] = {}
    for path in (*Path("/usr/share").iterdir(), *Path("/usr/lib").iterdir()):
        sizes[path] = [entry.lstat().st_size for entry in (path, *path.rglob("*"))]
    chosen: dict[str, Path] = {}
    files = 0
    for path in sorted(sizes, key=lambda path: sum(sizes[path]) / len(sizes[path])):
        if path.name not in chosen:
            chosen[path.name] = path
            files += len(sizes[path])
        if files >= FILES:
            return list(chosen.values())
    raise AssertionError(f"this system has only {files} files")


def make_special(home: Path) -> Path:
    """Make what real trees have too little of."""
    home.mkdir()
    (home / "file").write_bytes(b"bytes" * 1000)
    for number in range(20):
        os.link(home / "file", home / f"link {number}")
    os.symlink("nowhere at all", home / "dangling")
    os.symlink("x/" * 2000, home / "long")
    os.mkfifo(home / "fifo")
    os.mknod(home / "zero", stat.S_IFCHR | 0o640, os.makedev(1, 5))
    os.mknod(home / "disk", stat.S_IFBLK | 0o640, os.makedev(300, 70_000))
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(home / "socket"))
    with (home / "sparse").open("wb") as file:
        file.write(b"start")
        file.seek(100 * MIB)
        file.write(b"end")
    (home / "xattrs").touch()
    for number in range(10):
        os.setxattr(home / "xattrs", f"user.number-{number}", bytes([number]) * number * 20)
    os.setxattr(home / "xattrs", "trusted.secret", b"\0\1\2")
    for name in (b"\xff\xfe", b"new\nline", "ä".encode(), b"x" * 255):
        (home / os.fsdecode(name)).touch()
    for mode in (0, 0o4755, 0o2755, 0o1777, 0o7777):
        (home / f"mode-{mode:o}").mkdir()
        (home / f"mode-{mode:o}.file").touch()
        for path in home.glob(f"mode-{mode:o}*"):
            os.chown(path, 1234, 5678)
            path.chmod(mode)
    for time_ns in (0, 1, 999_999_999, 2**32 * 10**9 + 7):
        (home / f"time-{time_ns}").touch()
        os.utime(home / f"time-{time_ns}", ns=(time_ns, time_ns))
    return home


def described(roots: list[Path]) -> dict[str, Any]:
    """Return what lstat and the attributes tell, name by name."""
    found: dict[str, Any] = {}
    first: dict[tuple[int, int], str] = {}
    for root in roots:
        for path in walk(root):
            status = path.lstat()
            name = str(path.relative_to(root.parent))
            directory = stat.S_ISDIR(status.st_mode)
            same_as = first.setdefault((status.st_dev, status.st_ino), name)
            found[name] = (
                status.st_mode,
                status.st_uid,
                status.st_gid,
                0 if directory else status.st_size,
                status.st_rdev,
                status.st_mtime_ns,
                same_as,
                os.readlink(path) if path.is_symlink() else "",
                {
                    key: os.getxattr(path, key, follow_symlinks=False)
                    for key in os.listxattr(path, follow_symlinks=False)
                },
            )
    return found


def walk(path: Path) -> Iterator[Path]:
    yield path
    if path.is_dir() and not path.is_symlink():
        for child in sorted(path.iterdir()):
            yield from walk(child)


def compare(sources: list[Path], copy: Path, wanted: dict[str, Any]) -> None:
    found = described([copy / source.name for source in sources])
    assert found.keys() == wanted.keys()
    different = {
        name: (wanted[name], found[name]) for name in wanted if wanted[name] != found[name]
    }
    assert not different
    for source in sources:  # diff has a complaint about every node
        excluded = [f"--exclude={name}" for name in NODES if source.name == "special"]
        run("diff", "-r", "--no-dereference", *excluded, source, copy / source.name)


def run(*command: object) -> str:
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command[0]}: {done.stdout[:2000]} {done.stderr[:2000]}"
    return done.stdout


def remount(server: Server, how: str) -> None:
    if how == "unmount":
        server.unmount()
    else:
        server.kill()
    server.mount()


@pytest.mark.parametrize("options", [(), ("-o", "writeback")], ids=["", "writeback"])
def test_a_real_tree_is_the_same_after_copying_unmounting_and_a_kill(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    real = tmp_path / "real"  # the system's own may change meanwhile
    real.mkdir()
    run("cp", "-a", *real_directories(), real)
    sources = [*sorted(real.iterdir()), make_special(tmp_path / "special")]
    wanted = described(sources)
    assert len(wanted) > FILES
    with tmpfs(size="3G") as medium, served_pool(medium, "2500M", *options) as server:
        copy = server.directory / "copy"
        copy.mkdir()
        run("cp", "-a", *sources, copy)
        compare(sources, copy, wanted)
        for how in ("unmount", "kill"):
            if how == "kill":
                os.sync()
            remount(server, how)
            compare(sources, copy, wanted)
        # nothing is left for rsync to do where cp has been, nor where it has been itself
        synced = server.directory / "synced"
        synced.mkdir()
        command = ("rsync", "-aHAX", "--itemize-changes", *sources)
        assert run(*command, f"{copy}/") == ""
        assert len(run(*command, f"{synced}/").splitlines()) > FILES
        assert run(*command, f"{synced}/") == ""
        compare(sources, synced, wanted)
