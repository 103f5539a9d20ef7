"""What newcomers are told when something is wrong: one line, what to do, the exit code, no change.

tests/whole/test_commands.py has more of them, for pools, mounts and sockets.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfsmap.testing.commands import Server, served_pool, vfsmap
from vfsmap.testing.media import tmpfs
from vfsmap.units import MIB


def complaint(*arguments: object, code: int) -> str:
    """Run a command that must fail with this exit code; return its one line."""
    result = vfsmap(*arguments, check=False)
    assert result.returncode == code, result
    assert result.stderr.startswith("vfsmap: "), result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr.removeprefix("vfsmap: ").rstrip()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with tmpfs(size="100M") as place, served_pool(place, "32M") as served:
        yield served


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    vfsmap("format", tmp_path / "pool", "--size", "16M")
    return tmp_path / "pool"


# usage


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["frobnicate"], "No such command 'frobnicate'; see: "),
        (["pstore", "frobnicate"], "pstore --help"),
        (["mount"], "Missing argument 'POOL'; see: "),
        (["mount", "pool"], "Missing argument 'DIRECTORY'"),
        (["/pool", "/dir", "--what"], "No such option '--what'"),
        (["format", "new"], "Missing option '--size'"),
        (["format", "new", "--size"], "requires an argument"),
        (["format", "new", "--size", "lots"], "write it like 4096, 64K, 512M or 8G"),
        (["format", "new", "--size", "8G", "--align", "3"], "use 4K, 2M or 1G"),
        (["format", "new", "--size", "8G", "--promise", "ever"], "'process', 'power'"),
        (["map", "file", "--level", "3M"], "use 4K, 2M or 1G"),
        (["cp", "-z", "a", "b"], "No such option '-z'"),
        (["completion", "tcsh"], "'bash', 'zsh', 'fish'"),
        (["serve", "pool", "--socket"], "requires an argument"),
    ],
)
def test_wrong_usage_is_told_in_one_line(arguments: list[str], said: str) -> None:
    assert said in complaint(*arguments, code=2)


def test_without_a_command_the_help_is_shown() -> None:
    for group in ("", "pstore", "system"):
        result = vfsmap(*group.split(), check=False)
        assert result.returncode == 2
        assert "Commands:" in result.stdout + result.stderr


# what is no pool


@pytest.mark.parametrize("command", ["info", "check", "dump", "serve", "mount", "resize"])
@pytest.mark.parametrize("kind", ["missing", "directory", "FIFO", "device", "empty"])
def test_what_can_be_no_pool_is_named_with_its_kind(
    tmp_path: Path, command: str, kind: str
) -> None:
    path = tmp_path / kind
    (tmp_path / "mnt").mkdir()
    match kind:
        case "directory":
            path.mkdir()
        case "FIFO":
            os.mkfifo(path)
        case "device":
            path = Path("/dev/null")
        case "empty":
            path.touch()
    extra = {"mount": [str(tmp_path / "mnt")], "resize": ["32M"]}.get(command, [])
    result = vfsmap(command, path, *extra, check=False)
    assert result.returncode == (2 if kind in ("directory", "empty") else 1)
    assert result.stderr.count("\n") == 1
    assert str(path) in result.stderr
    cure = {"missing": "vfsmap format", "empty": "vfsmap format"}.get(kind, "a pool is")
    assert cure in result.stderr or "where no pool is mounted" in result.stderr
    assert path.exists() == (kind != "missing")


def test_a_pool_that_was_cut_short_is_told_once_with_the_way_out(pool: Path) -> None:
    os.truncate(pool, 8 * MIB)
    text = complaint("info", pool, code=3)
    assert text.count("bytes long") == 1
    assert "restore the pool from a whole copy" in text
    assert pool.stat().st_size == 8 * MIB


def test_a_pool_in_a_directory_that_is_missing_names_the_directory(tmp_path: Path) -> None:
    text = complaint("format", tmp_path / "a/b/pool", "--size", "16M", code=1)
    assert f"mkdir -p {tmp_path}/a/b" in text
    assert not (tmp_path / "a").exists()


# servers


def test_a_log_that_can_not_be_written_is_named(pool: Path, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    for extra in ("--verbose", "--foreground"):
        log = tmp_path / "missing/log"
        text = complaint("mount", pool, tmp_path / "mnt", "--log", log, extra, code=1)
        assert text == f"{log}: No such file or directory"


def test_a_file_as_mount_point_is_called_one(pool: Path) -> None:
    assert complaint("mount", pool, pool, code=1).endswith("a pool is mounted on one")
    assert complaint("mount", pool, pool.with_name("new"), code=1).endswith(
        f"mkdir {pool.parent}/new"
    )


def test_unmounting_nothing_says_where_pools_are_mounted(tmp_path: Path) -> None:
    assert "findmnt -t fuse.vfsmap" in complaint("umount", tmp_path, code=2)


# copying


def test_a_mount_in_use_is_not_unmounted_and_the_way_to_its_users_is_told(server: Server) -> None:
    with (server.directory / "open").open("w"):
        assert f"fuser -vm {server.directory}" in complaint("umount", server.directory, code=1)


def test_a_file_is_not_copied_onto_itself(server: Server) -> None:
    path = server.directory / "itself"
    path.write_bytes(b"text")
    path.with_name("link").hardlink_to(path)
    for target in (path, path.with_name("link"), server.directory):
        assert "are the same file" in complaint("cp", path, target, code=2)
    assert path.read_bytes() == b"text"


def test_a_directory_is_not_copied_into_itself(server: Server) -> None:
    tree = server.directory / "tree"
    (tree / "below").mkdir(parents=True)
    for target in (tree, tree / "below", tree / "new"):
        assert f"is inside {tree}" in complaint("cp", tree, target, code=2)
    assert [path.name for path in tree.rglob("*")] == ["below"]


def test_a_copy_that_finds_no_room_leaves_what_was_there(server: Server, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(os.urandom(40 * MIB))
    target = server.directory / "kept"
    target.write_bytes(b"text")
    text = complaint("cp", tmp_path / "large", target, code=1)
    assert text.startswith(f"{target}: No space left on device; make room")
    assert target.read_bytes() == b"text"
    assert not [p for p in server.directory.iterdir() if p.name.startswith(".vfsmap")]
    assert "No space" in complaint("cp", tmp_path / "large", server.directory, code=1)
    assert not (server.directory / "large").exists()


# sealing


def test_only_files_on_a_mounted_pool_are_sealed(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"text")
    assert "not on a mounted pool" in complaint("seal", path, code=2)
    assert "not on a mounted pool" in complaint("cp", path, tmp_path / "new", "--seal", code=2)
    assert "not on a mounted pool" in complaint("cp", path, tmp_path, "--align", "2M", code=2)
    assert os.listxattr(path) == []
    assert os.listdir(tmp_path) == ["file"]
    assert "name files" in complaint("seal", server.directory, code=2)


def test_a_file_is_sealed_once_and_never_written_again(server: Server) -> None:
    path = server.directory / "final"
    path.write_bytes(b"text")
    vfsmap("seal", path)
    assert f"vfsmap verify {path}" in complaint("seal", path, code=1)
    assert f"{path} is sealed" in complaint("map", path, "--write", code=1)


@pytest.mark.parametrize("label", ["a\nb", "\x1b[31m", "\udcff"])
def test_a_label_that_can_not_be_printed_is_refused(tmp_path: Path, label: str) -> None:
    said = vfsmap("format", tmp_path / "p", "--size", "64M", "--label", label, check=False)
    assert said.returncode == 2
    assert "only characters that can be printed" in said.stderr
    assert not (tmp_path / "p").exists()


def test_a_standard_output_that_is_full_is_named() -> None:
    command = [sys.executable, "-m", "vfsmap_tools.cli", "--help"]
    with open("/dev/full", "w") as full:  # noqa: PTH123 as a shell does it
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
