"""Archives: whatever is in a tree comes back; whatever is not whole or means harm is refused."""

import hashlib
import io
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from vfsmap.errors import Damaged, VfsmapError
from vfsmap.testing.commands import Server, served_pool, vfsmap
from vfsmap.testing.media import tmpfs
from vfsmap.units import MIB
from vfsmap_tools import archive
from vfsmap_tools.archive_reader import Reader, members, tar_errors

NOT_EQUAL = ("st_ino", "st_dev", "st_ctime_ns", "st_atime_ns")
LATIN = os.fsdecode(b"not utf-8: \xff\xfe")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with tmpfs(huge="always", size="600M") as place, served_pool(place, "512M") as served:
        yield served


@pytest.fixture
def tree(server: Server, request: pytest.FixtureRequest) -> Path:
    return server.make_directory(request.node.name)


@pytest.fixture
def back(server: Server, request: pytest.FixtureRequest) -> Path:
    return server.make_directory(f"back-{request.node.name}")


def fill(tree: Path) -> None:
    """Make one of everything."""
    (tree / "sub/empty").mkdir(parents=True)
    os.setxattr(tree / "sub", "user.vfsmap.align", b"2M")
    (tree / "sub/model").write_bytes(os.urandom(MIB) * 3)
    (tree / "empty file").touch()
    (tree / LATIN).write_bytes(b"name")
    (tree / ("long" * 60)).write_bytes(b"x")
    deep = tree / "d"
    for _ in range(40):
        deep /= "directory"
    deep.mkdir(parents=True)
    (deep / "file").write_bytes(b"deep")
    (tree / "sub/hard").hardlink_to(tree / "sub/model")
    (tree / "link").symlink_to("sub/model")
    (tree / "dangling").symlink_to("/nowhere/" + "x" * 200)
    (tree / "link too").hardlink_to(tree / "dangling")
    os.mkfifo(tree / "fifo", 0o640)
    os.mknod(tree / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(tree / "disk", stat.S_IFBLK | 0o600, os.makedev(259, 70_000))
    (tree / "program").write_bytes(b"#!/bin/sh\n")
    os.chown(tree / "program", 1000, 3_000_000)
    (tree / "program").chmod(0o6755)
    os.setxattr(tree / "program", "user.binary", bytes(range(256)))
    os.setxattr(tree / "program", "user.a=b%3D", b"=\n=")
    os.setxattr(tree / "program", "trusted.root", b"")
    os.setxattr(tree / "sub/empty", "user.text", "Straße".encode())
    with (tree / "sparse").open("wb") as file:
        for offset in (5 * MIB + 17, 64 * MIB):
            file.seek(offset)
            file.write(b"data at %d" % offset)
        file.truncate(1 << 40)
    with (tree / "only a hole").open("wb") as file:
        file.truncate(123_456_789)
    for name, options in (("sealed", ()), ("salted", ("--hash-alg", "sha512", "--salt", "00ff"))):
        (tree / name).write_bytes(os.urandom(100_000))
        vfsmap("seal", tree / name, *options)
    times = [1, -1_500_000_000, 1_234_567_890_123_456_789, (1 << 62) + 7, -1]
    paths = sorted(path for path in tree.rglob("*") if not path.is_symlink())
    for number, path in enumerate(paths):
        os.utime(path, ns=(times[number % 5], times[(number + 1) % 5]))
    os.utime(tree / "link", ns=(5, 6), follow_symlinks=False)
    tree.chmod(0o711)


def facts(tree: Path) -> dict[str, dict[str, Any]]:
    """All there is to know of a tree, but for the times that reading and restoring change."""
    found, numbers = {}, dict[int, int]()
    for path in (tree, *sorted(tree.rglob("*"))):
        status = path.lstat()
        known: dict[str, Any] = {
            name: getattr(status, name)
            for name in ("st_mode", "st_nlink", "st_uid", "st_gid", "st_rdev", "st_mtime_ns")
        }
        known["same as"] = numbers.setdefault(status.st_ino, len(numbers))
        known["xattrs"] = {
            name: os.getxattr(path, name, follow_symlinks=False)
            for name in os.listxattr(path, follow_symlinks=False)
        }
        if path.is_symlink():
            known["target"] = os.readlink(path)
        elif path.is_file():
            known |= file_facts(path, status)
        found[str(path.relative_to(tree))] = known
    return found


def file_facts(path: Path, status: os.stat_result) -> dict[str, Any]:
    known: dict[str, Any] = {"size": status.st_size, "blocks": status.st_blocks}
    for name in ("align", "seal", "sealing"):
        try:
            known[name] = os.getxattr(path, f"user.vfsmap.{name}")
        except OSError:
            known[name] = None
    lines = os.getxattr(path, "user.vfsmap.extents").decode().splitlines()
    known["data"] = []
    with path.open("rb") as file:
        for line in lines:
            offset, _, length = map(int, line.split())
            file.seek(offset)
            known["data"].append((offset, hashlib.sha256(file.read(length)).hexdigest()))
    return known


def export(tree: Path, path: Path, *options: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(vfsmap("export", *options, "--json", tree, path).stdout)
    return found


def import_(back: Path, path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(vfsmap("import", "--json", back, path).stdout)
    return found


def test_one_of_everything_comes_back_equal(tree: Path, back: Path, tmp_path: Path) -> None:
    fill(tree)
    wanted = facts(tree)
    told = export(tree, tmp_path / "a.tar")
    assert told == {"members": len(wanted) - 1, "resumed_at": 0, "sockets_left_out": []}
    assert (tmp_path / "a.tar").stat().st_size < 10 * MIB  # holes take no room
    assert import_(back, tmp_path / "a.tar")["left_out"] == []
    assert facts(back) == wanted
    told = import_(back, tmp_path / "a.tar")  # and once more, over itself
    assert told["there_already"] == sum("size" in known for known in wanted.values()) - 1
    assert facts(back) == wanted


def test_gnu_tar_and_bsdtar_style_readers_unpack_it(tree: Path, tmp_path: Path) -> None:
    fill(tree)
    export(tree, tmp_path / "a.tar")
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    command = ["tar", "-C", str(unpacked), "--xattrs", "--xattrs-include=*", "--sparse", "-xpf"]
    subprocess.run([*command, tmp_path / "a.tar"], check=True, capture_output=True)
    for path in sorted(tree.rglob("*")):
        other = unpacked / path.relative_to(tree)
        mine, theirs = path.lstat(), other.lstat()
        assert mine.st_mode == theirs.st_mode, path
        if path.is_file() and mine.st_size < 1 << 30:
            assert other.read_bytes() == path.read_bytes()
    assert os.getxattr(unpacked / "program", "user.binary") == bytes(range(256))
    assert os.getxattr(unpacked / "program", "user.a=b%3D") == b"=\n="
    assert (unpacked / "sparse").stat().st_blocks * 512 < MIB


def test_it_goes_through_a_pipe(tree: Path, back: Path) -> None:
    fill(tree)
    command = [sys.executable, "-m", "vfsmap_tools.cli"]
    with subprocess.Popen([*command, "export", str(tree), "-"], stdout=subprocess.PIPE) as writer:
        subprocess.run([*command, "import", str(back), "-"], stdin=writer.stdout, check=True)
    assert writer.returncode == 0
    assert facts(back) == facts(tree)


def test_a_tree_that_no_pool_holds_comes_into_a_pool_and_out_again(
    back: Path, tmp_path: Path
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    (source / "sub").mkdir(parents=True)
    (source / "sub/file").write_bytes(b"content")
    with (source / "sparse").open("wb") as file:
        file.seek(50 * MIB)
        file.write(b"end")
    out.mkdir()
    export(source, tmp_path / "a.tar")
    assert (tmp_path / "a.tar").stat().st_size < MIB
    import_(back, tmp_path / "a.tar")
    vfsmap("seal", back / "sub/file")
    export(back, tmp_path / "b.tar")
    told = import_(out, tmp_path / "b.tar")
    assert told["left_out"] == ["sub/file: seal"]
    assert (out / "sub/file").read_bytes() == b"content"
    assert (out / "sparse").read_bytes() == (source / "sparse").read_bytes()
    assert os.listxattr(out / "sub/file") == []


def test_a_socket_is_left_out_and_named(tree: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tree / "socket"))
    assert export(tree, tmp_path / "a.tar")["sockets_left_out"] == ["socket"]
    done = vfsmap("export", tree, tmp_path / "b.tar")
    assert "1 sockets left out, among them socket" in done.stderr


# interrupted


def killed(condition: Callable[[], bool], *arguments: object) -> None:
    """Run a command, and kill it when a condition holds."""
    command = [sys.executable, "-m", "vfsmap_tools.cli", *map(str, arguments)]
    with subprocess.Popen(command) as process:
        while process.poll() is None and not condition():
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"


def many(tree: Path) -> None:
    for number in range(60):
        (tree / f"{number:03}").write_bytes(os.urandom(MIB))
    vfsmap("seal", tree / "002", tree / "058")
    (tree / "059").hardlink_to(tree / "000") if not (tree / "059").exists() else None


def test_an_export_that_was_killed_goes_on_where_it_was(
    tree: Path, back: Path, tmp_path: Path
) -> None:
    many(tree)
    path, part = tmp_path / "a.tar", tmp_path / "a.tar.part"
    killed(lambda: part.exists() and part.stat().st_size > 10 * MIB, "export", "-q", tree, path)
    assert not path.exists()
    (tree / "050").write_bytes(b"changed meanwhile")
    told = export(tree, path)
    assert 5 < told["resumed_at"] < 50
    import_(back, path)
    assert facts(back) == facts(tree)


def test_an_export_does_not_go_on_with_what_has_changed_or_is_damaged(
    tree: Path, back: Path, tmp_path: Path
) -> None:
    many(tree)
    path, part = tmp_path / "a.tar", tmp_path / "a.tar.part"
    killed(lambda: part.exists() and part.stat().st_size > 10 * MIB, "export", "-q", tree, path)
    with part.open("r+b") as file:
        file.seek(5 * MIB)
        file.write(b"damage")
    (tree / "003").chmod(0o600)
    assert export(tree, path)["resumed_at"] == 3
    import_(back, path)
    assert facts(back) == facts(tree)


def test_an_import_that_was_killed_goes_on_where_it_was(
    tree: Path, back: Path, tmp_path: Path
) -> None:
    many(tree)
    export(tree, tmp_path / "a.tar")
    killed(lambda: (back / "015").exists(), "import", "-q", back, tmp_path / "a.tar")
    assert import_(back, tmp_path / "a.tar")["there_already"] >= 10
    assert facts(back) == facts(tree)


# what is wrong with an archive


def refused(back: Path, path: Path, code: int) -> str:
    before = sorted(back.parent.parent.rglob("*outside*"))
    done = vfsmap("import", "-q", back, path, check=False)
    assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert sorted(back.parent.parent.rglob("*outside*")) == before
    return done.stderr


def unpack(back: Path, path: Path) -> None:
    with path.open("rb") as file, tar_errors():
        reader = Reader(back, lambda _: None)
        for tar, info in members(file):
            reader.unpack(tar, info)
        reader.finish()


@pytest.fixture
def small(tmp_path: Path) -> Path:
    source = tmp_path / "small"
    (source / "sub").mkdir(parents=True)
    for name in ("a", "b", "sub/c"):
        (source / name).write_bytes(name.encode() * 1000)
    with (source / "holes").open("wb") as file:
        file.seek(MIB)
        file.write(b"x" * 5000)
    export(source, tmp_path / "small.tar")
    return tmp_path / "small.tar"


def test_a_truncated_archive_is_not_whole(tmp_path: Path, small: Path) -> None:
    content = small.read_bytes()
    short, back = tmp_path / "short.tar", tmp_path / "back"
    back.mkdir()
    for length in range(0, len(content) - len(archive.END), 1024):
        short.write_bytes(content[:length])
        with pytest.raises(Damaged, match="archive"):
            unpack(back, short)
    assert "archive" in refused(back, short, 3)


def test_a_damaged_archive_is_found_out(tmp_path: Path, small: Path) -> None:
    content = bytearray(small.read_bytes())
    hurt, back = tmp_path / "hurt.tar", tmp_path / "back"
    back.mkdir()
    with tarfile.open(small) as tar:
        infos = [info for info in tar.getmembers() if info.isreg()]
    for info in infos:
        damaged = bytearray(content)
        damaged[info.offset_data + 100] ^= 1
        hurt.write_bytes(damaged)
        with pytest.raises(Damaged, match="its digest is another one"):
            unpack(back, hurt)
        assert not (back / info.name).exists()
    for at in range(0, len(content) - len(archive.END), 512):
        damaged = bytearray(content)
        damaged[at + 200] ^= 0x40
        hurt.write_bytes(damaged)
        with suppress(VfsmapError, OSError):
            unpack(back, hurt)


def hostile(path: Path, *contents: tuple[tarfile.TarInfo, bytes]) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for info, content in contents:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, link, 0o777
    return info


@pytest.mark.parametrize(
    ("infos", "words"),
    [
        ([member("../outside")], "leads out of the directory"),
        ([member("sub/../../outside")], "leads out of the directory"),
        ([member("/tmp/outside")], "leads out of the directory"),
        ([member("link", tarfile.SYMTYPE, ".."), member("link/outside")], "symbolic link"),
        (
            [member("link", tarfile.SYMTYPE, ".."), member("link", tarfile.DIRTYPE)],
            "symbolic link",
        ),
        ([member("hard", tarfile.LNKTYPE, "../outside")], "leads out of the directory"),
        ([member("hard", tarfile.LNKTYPE, "/etc/passwd")], "leads out of the directory"),
        (
            [member("link", tarfile.SYMTYPE, "/etc"), member("x", tarfile.LNKTYPE, "link/passwd")],
            "symbolic link",
        ),
        ([member(".", tarfile.SYMTYPE, "/etc")], "in the place of the directory"),
        ([member("file", b"Z")], "a type that is not known"),
        ([member("d", tarfile.DIRTYPE), member("d")], "is a directory"),
    ],
)
def test_what_would_reach_outside_is_refused(
    tmp_path: Path, infos: list[tarfile.TarInfo], words: str
) -> None:
    back = tmp_path / "back"
    back.mkdir()
    before = tmp_path.stat().st_mode
    hostile(tmp_path / "h.tar", *((info, b"") for info in infos))
    assert words in refused(back, tmp_path / "h.tar", 2)
    assert tmp_path.stat().st_mode == before


def test_a_link_to_what_is_not_there_is_damage(tmp_path: Path) -> None:
    (tmp_path / "back").mkdir()
    hostile(tmp_path / "h.tar", (member("hard", tarfile.LNKTYPE, "missing"), b""))
    assert "is not there" in refused(tmp_path / "back", tmp_path / "h.tar", 3)


def test_a_symbolic_link_that_stands_in_the_way_is_replaced_and_not_followed(
    tmp_path: Path,
) -> None:
    back, precious = tmp_path / "back", tmp_path / "precious"
    back.mkdir()
    precious.write_bytes(b"precious")
    hostile(
        tmp_path / "h.tar",
        (member("link", tarfile.SYMTYPE, str(precious)), b""),
        (member("link"), b"overwritten"),
    )
    vfsmap("import", "-q", back, tmp_path / "h.tar")
    assert precious.read_bytes() == b"precious"
    assert (back / "link").read_bytes() == b"overwritten"


def test_a_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "back").mkdir()
    for content in (b"", b"hello", os.urandom(100_000), bytes(100_000)):
        (tmp_path / "x").write_bytes(content)
        assert "archive" in refused(tmp_path / "back", tmp_path / "x", 3)


def test_what_is_no_regular_file_is_not_replaced_by_an_archive(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    os.mkfifo(tmp_path / "fifo")
    for target in (tmp_path / "fifo", Path("/dev/full")):
        refused = vfsmap("export", tmp_path / "tree", target, check=False)
        assert refused.returncode == 2
        assert "is not a regular file; - writes to standard output" in refused.stderr
    assert Path("/dev/full").is_char_device()
    (tmp_path / "link").symlink_to("archive")
    vfsmap("export", tmp_path / "tree", tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "archive").is_file()


def test_an_archive_inside_the_tree_that_it_is_to_hold_is_refused(tmp_path: Path) -> None:
    done = vfsmap("export", tmp_path, tmp_path / "a.tar", check=False)
    assert done.returncode == 2
    assert "lies inside" in done.stderr
