"""The commands, as a person types them: what they do, and what they say when they can't."""

import json
import os
import re
import select
import signal
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import vfsmap as library
from vfsmap.daemon.client import Client
from vfsmap.errors import Denied
from vfsmap.pool import Pool
from vfsmap.pool.layout import SUPERBLOCKS, Superblock
from vfsmap.testing.commands import Server, served_pool, vfsmap
from vfsmap.testing.media import ext4_loop, hugetlbfs, tmpfs
from vfsmap.testing.users import as_user
from vfsmap.units import KIB, MIB
from vfsmap_tools.cli import _COMMANDS
from vfsmap_tools.mounts import find_mount


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with tmpfs(huge="always", size="400M") as place, served_pool(place, "256M") as served:
        yield served


def complaint(*arguments: object, code: int) -> str:
    """Run a command that must fail with this exit code; return its one line."""
    result = vfsmap(*arguments, check=False)
    assert result.returncode == code, result
    lines = result.stderr.strip().splitlines()
    assert not any("Traceback" in line for line in lines), result.stderr
    if code != 2 or len(lines) == 1:
        assert len(lines) == 1, result.stderr
    return lines[-1]


@pytest.mark.parametrize("command", _COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    assert "Usage: " in vfsmap(command, "--help").stdout


def test_the_help_lists_every_command_and_the_exit_codes() -> None:
    text = vfsmap("--help").stdout
    assert all(re.search(rf"^  {command} +\S", text, re.MULTILINE) for command in _COMMANDS)
    assert "3 a damaged pool" in text


def test_a_formatted_pool_tells_what_it_is(tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    vfsmap("format", pool, "--size", "64M", "--label", "models", "--align", "1G")
    facts = json.loads(vfsmap("info", pool, "--json").stdout)
    assert (facts["label"], facts["size"], facts["align"]) == ("models", 64 * MIB, 1 << 30)
    assert facts["files"] == 1
    assert pool.stat().st_mode & 0o777 == 0o600


def test_resizing_makes_room(tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    vfsmap("format", pool, "--size", "16M")
    vfsmap("resize", pool, "64M")
    facts = json.loads(vfsmap("info", pool, "--json").stdout)
    assert facts["size"] == 64 * MIB
    assert facts["free"] > 60 * MIB
    assert "can't shrink" in complaint("resize", pool, "32M", code=2)


def test_formatting_twice_needs_force(tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    vfsmap("format", pool, "--size", "16M")
    before = pool.read_bytes()
    assert "--force" in complaint("format", pool, "--size", "16M", code=1)
    assert pool.read_bytes() == before
    vfsmap("format", pool, "--size", "16M", "--force")
    assert pool.read_bytes() != before


@pytest.mark.parametrize("size", ["", "8Q", "-1", "1.0001K", "lots", "0x10", "8GG"])
def test_wrong_sizes_are_refused_with_an_example(tmp_path: Path, size: str) -> None:
    result = vfsmap("format", tmp_path / "pool", f"--size={size}", check=False)
    assert result.returncode == 2
    assert "8G" in result.stderr or "whole number" in result.stderr
    assert not (tmp_path / "pool").exists()


def test_a_pool_too_small_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    assert "at least" in complaint("format", tmp_path / "pool", "--size", "1M", code=2)
    assert not (tmp_path / "pool").exists()


@pytest.mark.parametrize("command", ["info", "mount", "check", "dump"])
def test_what_is_no_pool_is_refused_and_left_alone(tmp_path: Path, command: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"not a pool" * 10_000)
    arguments = [command, path, *([tmp_path] if command == "mount" else [])]
    assert "not a vfsmap pool" in complaint(*arguments, code=3)
    assert path.read_bytes() == b"not a pool" * 10_000


def test_a_missing_pool_and_a_missing_directory_are_named(tmp_path: Path) -> None:
    assert "vfsmap format" in complaint("mount", tmp_path / "pool", tmp_path, code=1)
    vfsmap("format", tmp_path / "pool", "--size", "16M")
    assert "mkdir" in complaint("mount", tmp_path / "pool", tmp_path / "missing", code=1)
    assert "No such file" in complaint("info", tmp_path / "missing", code=1)


def test_a_truncated_pool_is_refused_with_both_lengths(tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    vfsmap("format", pool, "--size", "16M")
    os.truncate(pool, 8 * MIB)
    text = complaint("mount", pool, tmp_path, code=3)
    assert str(16 * MIB) in text
    assert str(8 * MIB) in text


def test_a_pool_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    vfsmap("format", pool, "--size", "16M")
    raw = bytearray(pool.read_bytes())
    for at in SUPERBLOCKS:
        sb = Superblock.from_buffer(raw, at)
        sb.version += 1
        sb.checksum = zlib.crc32(bytes(sb)[: Superblock.checksum.offset])
    pool.write_bytes(raw)
    assert "newer vfsmap" in complaint("info", pool, code=3)


def test_a_pool_in_use_names_the_process(server: Server, tmp_path: Path) -> None:
    text = complaint("mount", server.pool, tmp_path, code=1)
    assert f"process {server.pid}" in text
    assert "unmount" in text
    assert f"process {server.pid}" in complaint("resize", server.pool, "512M", code=1)
    assert f"process {server.pid}" in complaint(
        "format", server.pool, "--size", "64M", "--force", code=1
    )
    assert vfsmap("info", server.pool).stdout  # a reader may look


def test_a_directory_that_is_mounted_already_is_refused(server: Server, tmp_path: Path) -> None:
    vfsmap("format", tmp_path / "pool", "--size", "16M")
    text = complaint("mount", tmp_path / "pool", server.directory, code=1)
    assert "vfsmap umount" in text


def test_unmounting_what_is_not_mounted_says_so(tmp_path: Path) -> None:
    assert "no pool is mounted" in complaint("umount", tmp_path, code=2)


def test_unmounting_a_directory_in_use_says_so_and_goes_on_serving(server: Server) -> None:
    with (server.directory / "open").open("w"):
        assert "busy" in complaint("umount", server.directory, code=1)
    assert (server.directory / "open").exists()


def test_an_unknown_mount_option_is_refused(tmp_path: Path) -> None:
    vfsmap("format", tmp_path / "pool", "--size", "16M")
    text = complaint("mount", tmp_path / "pool", tmp_path, "-o", "speed=11", code=2)
    assert "speed=11" in text
    assert not find_mount(tmp_path)


def test_without_dev_fuse_mounting_says_what_to_do(tmp_path: Path) -> None:
    vfsmap("format", tmp_path / "pool", "--size", "16M")
    (tmp_path / "mnt").mkdir()
    script = 'mount -t tmpfs none /dev && exec "$@"'
    command = [sys.executable, "-m", "vfsmap_tools.cli", "mount", "--foreground"]
    result = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", *command, "pool", "mnt"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert result.returncode == 1
    assert "modprobe fuse" in result.stderr


def test_a_stale_socket_is_taken_over_and_a_live_one_is_not(tmp_path: Path) -> None:
    with tmpfs(size="200M") as place, served_pool(place, "64M", "--socket", place / "s") as served:
        served.kill()
        assert (place / "s").is_socket()
        served.mount()
        other = place / "other"
        vfsmap("format", other, "--size", "16M")
        text = complaint("mount", other, tmp_path, "--socket", place / "s", code=1)
        assert "another daemon" in text
        assert not find_mount(tmp_path)


def test_a_socket_name_taken_by_a_file_is_refused(tmp_path: Path) -> None:
    vfsmap("format", tmp_path / "pool", "--size", "16M")
    (tmp_path / "mnt").mkdir()
    (tmp_path / "file").write_text("precious")
    text = complaint(
        "mount", tmp_path / "pool", tmp_path / "mnt", "--socket", tmp_path / "file", code=2
    )
    assert "not a socket" in text
    assert (tmp_path / "file").read_text() == "precious"
    assert not find_mount(tmp_path / "mnt")


def test_no_room_below_is_said_before_anything_is_lost(tmp_path: Path) -> None:
    with tmpfs(size="256K") as place:
        assert "No space" in complaint("format", place / "pool", "--size", "64M", code=1)
        assert not (place / "pool").exists()


def test_hugetlbfs_without_free_pages_is_said(tmp_path: Path) -> None:
    with hugetlbfs(page_size="2M", pages=1) as place:
        (place / "taken").touch()
        os.truncate(place / "taken", 2 * MIB)
        with (place / "taken").open("r+b") as taken:
            os.posix_fallocate(taken.fileno(), 0, 2 * MIB)
        text = complaint("format", place / "pool", "--size", "64M", code=1)
        assert "free huge pages of 2M; have more: /sys/kernel/mm/hugepages" in text
        assert not (place / "pool").exists()


def test_a_pool_on_tmpfs_refuses_to_promise_power(tmp_path: Path) -> None:
    with tmpfs(size="100M") as place:
        text = complaint("format", place / "p", "--size", "64M", "--promise", "power", code=1)
        assert "power loss" in text
        assert not (place / "p").exists()


def test_no_permission_is_said(tmp_path: Path) -> None:
    vfsmap("format", tmp_path / "pool", "--size", "16M")
    assert "Permission denied" in as_user(65534, open_as_stranger, str(tmp_path / "pool"))


def open_as_stranger(path: str) -> str:
    with pytest.raises(Denied) as refused:
        Pool.open(path)
    return str(refused.value)


def test_copying_a_tree_keeps_everything(server: Server, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "deep" / "er").mkdir(parents=True)
    (tree / "file").write_bytes(os.urandom(5 * MIB))
    (tree / "deep" / "link").symlink_to("../file")
    (tree / "deep" / "twin").hardlink_to(tree / "file")
    os.mkfifo(tree / "fifo", 0o600)
    os.setxattr(tree / "file", "user.note", b"kept")
    os.utime(tree / "deep" / "er", ns=(1_000_000_001, 2_000_000_002))
    vfsmap("cp", "--quiet", tree, server.directory)
    copied = server.directory / "tree"
    for path in [tree, *tree.rglob("*")]:
        twin = copied / path.relative_to(tree)
        a, b = path.lstat(), twin.lstat()
        assert (a.st_mode, a.st_uid, a.st_mtime_ns) == (b.st_mode, b.st_uid, b.st_mtime_ns), path
        assert a.st_nlink == b.st_nlink
    assert (copied / "file").read_bytes() == (tree / "file").read_bytes()
    assert (copied / "file").samefile(copied / "deep" / "twin")
    assert (copied / "deep" / "link").readlink() == Path("../file")
    assert os.getxattr(copied / "file", "user.note") == b"kept"


def test_copying_with_alignment_and_seal_makes_small_files_huge_and_final(
    server: Server, tmp_path: Path
) -> None:
    (tmp_path / "small").write_bytes(b"x" * 5000)
    vfsmap("cp", "--quiet", "--align", "2M", "--seal", tmp_path / "small", server.directory)
    copied = server.directory / "small"
    assert json.loads(vfsmap("map", copied, "--populate", "--level", "2M", "--json").stdout)[
        "page_sizes"
    ][str(2 * MIB)] == (2 * MIB)
    with pytest.raises(PermissionError):
        copied.open("a")
    vfsmap("verify", copied)


def test_map_tells_extents_and_page_sizes(server: Server) -> None:
    path = server.directory / "mapped"
    path.write_bytes(os.urandom(MIB) * 6)
    facts = json.loads(vfsmap("map", path, "--populate", "--json").stdout)
    assert facts["direct"] is True
    assert facts["page_sizes"][str(2 * MIB)] == 6 * MIB
    assert sum(extent["length"] for extent in facts["extents"]) == 6 * MIB
    assert "6M of the pool itself" in vfsmap("map", path, "--populate").stdout
    assert "not inside the file" in complaint("map", path, "--offset", "1G", code=2)


@pytest.mark.parametrize(
    "options",
    [(), ("--hash-alg=sha512",), ("--block-size=1024", "--salt=0102"), ("--block-size=65536",)],
    ids=" ".join,
)
def test_a_file_is_sealed_with_the_digest_of_the_fsverity_tool(
    server: Server, options: tuple[str, ...]
) -> None:
    path = server.directory / f"sealed{len(' '.join(options))}"
    path.write_bytes(os.urandom(300_000))
    wanted = subprocess.run(
        ["fsverity", "digest", *options, path], capture_output=True, text=True, check=True
    ).stdout
    assert vfsmap("seal", *options, path).stdout == wanted
    found = json.loads(vfsmap("verify", path, "--json").stdout)
    assert found["digest"] == wanted.split()[0]
    assert found["damaged_blocks"] == []
    assert "damaged blocks  none\n" in vfsmap("verify", path).stdout


def test_a_seal_with_parameters_that_make_no_sense_is_refused(server: Server) -> None:
    path = server.directory / "unsealed"
    path.write_bytes(b"x")
    assert "power of two" in complaint("seal", "--block-size", "3000", path, code=2)
    assert "'salt=0g' is no parameter" in complaint("seal", "--salt", "0g", path, code=2)
    assert "at most 32 bytes, not 33" in complaint("seal", "--salt", "00" * 33, path, code=2)
    with pytest.raises(OSError, match="Invalid argument"):
        os.setxattr(path, "user.vfsmap.seal", b"hash=md5")
    path.write_bytes(b"y")


def test_damage_behind_a_seal_is_found_and_named_by_block(server: Server) -> None:
    path = server.directory / "damaged"
    path.write_bytes(os.urandom(3 * MIB))
    digest = vfsmap("seal", path).stdout.split()[0]
    assert vfsmap("verify", path, "--json").stdout.count(digest) == 1
    extent = json.loads(vfsmap("map", path, "--json").stdout)["extents"][0]
    with server.pool.open("r+b") as pool:  # root can do that; the digest tells
        pool.seek(extent["start"] + 5 * 4096 + 7)
        byte = pool.read(1)
        pool.seek(-1, os.SEEK_CUR)
        pool.write(bytes([byte[0] ^ 1]))
    result = vfsmap("verify", path, "--json", check=False)
    assert result.returncode == 3
    assert json.loads(result.stdout)["damaged_blocks"] == [5]
    assert "damaged: 5" in result.stderr
    assert vfsmap("verify", path, "--offset", "1M").returncode == 0
    path.unlink()


def test_leases_and_events_are_shown(server: Server) -> None:
    path = server.directory / "leased"
    path.write_bytes(bytes(64 * KIB))
    command = [sys.executable, "-m", "vfsmap_tools.cli", "events", "--json", str(server.directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watcher:
        assert watcher.stdout is not None
        assert json.loads(watcher.stdout.readline())["kind"] == "ready"
        with library.map(path):
            rows = json.loads(vfsmap("leases", server.directory, "--json").stdout)
            assert [row["pid"] for row in rows if not row["orphaned"]] == [os.getpid()]
            assert str(os.getpid()) in vfsmap("leases", server.directory).stdout
        assert json.loads(watcher.stdout.readline())["kind"] == "granted"
        assert json.loads(watcher.stdout.readline())["kind"] == "ended"
        watcher.terminate()


def test_the_server_ends_cleanly_on_sigterm(tmp_path: Path) -> None:
    with (
        ext4_loop("200M") as place,
        served_pool(place, "128M", "--socket", tmp_path / "s") as served,
    ):
        (served.directory / "file").write_bytes(b"kept")
        pidfd = os.pidfd_open(served.pid)
        os.kill(served.pid, signal.SIGTERM)
        select.select([pidfd], [], [])
        os.close(pidfd)
        assert not find_mount(served.directory)
        assert not (tmp_path / "s").exists()
        served.mount()
        assert (served.directory / "file").read_bytes() == b"kept"


def test_after_sigkill_everything_is_found_again_and_nothing_is_left_behind(tmp_path: Path) -> None:
    with (
        tmpfs(size="300M") as place,
        served_pool(place, "256M", "--socket", tmp_path / "s") as served,
    ):
        data = os.urandom(MIB) * 20
        (served.directory / "big").write_bytes(data)
        for number in range(500):
            (served.directory / f"file{number}").write_bytes(b"%d" % number)
        served.kill()
        assert not find_mount(served.directory)
        served.mount()
        assert (served.directory / "big").read_bytes() == data
        for number in range(500):
            assert (served.directory / f"file{number}").read_bytes() == b"%d" % number


def test_serve_without_a_mount_maps_by_path(tmp_path: Path) -> None:
    with tmpfs(size="100M") as place:
        with served_pool(place, "64M") as served:
            (served.directory / "dir").mkdir()
            (served.directory / "dir" / "file").write_bytes(b"by path" * 1000)
        vfsmap("serve", served.pool, "--socket", tmp_path / "s")
        try:
            client = Client(tmp_path / "s")
            answer, descriptors = client.call("Map", path="/dir/file")
            raw = os.pread(descriptors[answer["pool"]], 7, answer["extents"][0]["start"])
            assert raw == b"by path"
            for fd in descriptors:
                os.close(fd)
            client.close()
        finally:
            os.kill(served.pid, 15)


def test_an_archive_brings_everything_back(server: Server, tmp_path: Path) -> None:
    tree = server.directory / "archived"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub" / "model").write_bytes(os.urandom(MIB) * 3)
    os.setxattr(tree / "sub", "user.vfsmap.align", b"2M")
    (tree / "sub" / "final").write_bytes(b"final")
    vfsmap("seal", tree / "sub" / "final", "--hash-alg", "sha512", "--salt", "00ff")
    vfsmap("export", "--quiet", tree, tmp_path / "archive.tar")
    back = server.directory / "back"
    back.mkdir()
    for _ in range(2):  # the second time everything is there
        vfsmap("import", "--quiet", back, tmp_path / "archive.tar")
    assert (back / "sub" / "model").read_bytes() == (tree / "sub" / "model").read_bytes()
    assert os.getxattr(back / "sub", "user.vfsmap.align") == b"2M"
    seals = [os.getxattr(t / "sub" / "final", "user.vfsmap.seal") for t in (tree, back)]
    assert seals[0] == seals[1]


def test_noatime_leaves_the_time_of_access_alone() -> None:
    with tmpfs(size="100M") as place, served_pool(place, "64M", "-o", "noatime") as served:
        path = served.directory / "file"
        path.write_bytes(b"x" * 5000)
        os.utime(path, ns=(1_000, 2_000))
        served.unmount()
        served.mount()  # nothing is cached now
        assert path.read_bytes() == b"x" * 5000
        assert list(served.directory.iterdir()) == [path]
        assert path.stat().st_atime_ns == 1_000


@pytest.mark.parametrize("as_json", [True, False])
def test_events_are_told_from_the_first_on(server: Server, as_json: bool) -> None:
    words = ["--json"] * as_json
    command = [sys.executable, "-m", "vfsmap_tools.cli", "events", *words, str(server.directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "ready" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait() == 0


def test_holes_stay_holes_when_a_file_is_copied(server: Server, tmp_path: Path) -> None:
    source, target = tmp_path / "sparse", server.directory / "sparse"
    with source.open("wb") as file:
        file.truncate(8 << 30)  # more than the pool holds
        for at in (0, 3 << 20, (8 << 30) - 5):
            file.seek(at)
            file.write(b"bytes")
    vfsmap("cp", "-q", source, target)
    assert target.stat().st_size == 8 << 30
    assert target.stat().st_blocks * 512 < 16 << 20
    with target.open("rb") as copied:
        for at in (0, 3 << 20, (8 << 30) - 5):
            copied.seek(at)
            assert copied.read(5) == b"bytes"
        copied.seek(1 << 20)
        assert copied.read(4096) == bytes(4096)
    target.unlink()


def test_a_sealed_file_is_not_replaced_by_a_copy(server: Server, tmp_path: Path) -> None:
    (tmp_path / "new").write_bytes(b"new")
    target = server.directory / "sealed-for-ever"
    target.write_bytes(b"old")
    vfsmap("seal", target)
    refused = vfsmap("cp", "-q", tmp_path / "new", target, check=False)
    assert refused.returncode == 1
    assert "is sealed; to have another file of that name, delete it first" in refused.stderr
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/a").write_bytes(b"new")
    (tmp_path / "tree/sealed-for-ever").hardlink_to(tmp_path / "tree/a")
    sources = sorted((tmp_path / "tree").iterdir())
    refused = vfsmap("cp", "-q", *sources, server.directory, check=False)
    assert "is sealed" in refused.stderr
    assert target.read_bytes() == b"old"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_copy_that_is_ended_leaves_nothing_half_done(
    server: Server, tmp_path: Path, name: str
) -> None:
    target = server.directory / f"ended-by-{name}"
    target.mkdir()
    (tmp_path / "large").write_bytes(bytes(1 << 20))
    script = (
        "import os, signal, sys\n"
        "from vfsmap_tools import copying\n"
        "from vfsmap_tools.cli import main\n"
        "number = getattr(signal, sys.argv.pop())\n"
        "if number != signal.SIGINT: signal.signal(number, signal.SIG_DFL)  # nohup may run us\n"
        "def ended(*_): os.kill(os.getpid(), number)\n"
        "copying.Copier._copy_attributes = ended\n"
        "sys.argv[1:1] = ['cp', '-q']\n"
        "main()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "large"), str(target), name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr.strip() == "vfsmap: interrupted"
    assert list(target.iterdir()) == []


def test_files_are_sealed_and_told_whatever_their_names(server: Server) -> None:
    directory = server.make_directory("odd-names")
    odd = os.path.join(os.fsencode(directory), b"odd\xff")
    for path in (os.fsencode(directory / "plain"), odd):
        Path(os.fsdecode(path)).write_bytes(b"content")
    command: list[str | bytes] = [sys.executable, "-m", "vfsmap_tools.cli", "seal", odd]
    told = subprocess.run(command, capture_output=True, check=True).stdout
    assert told.startswith(b"sha256:")
    assert told.endswith(b"odd\\xff\n")
    (row,) = json.loads(vfsmap("seal", "--json", directory / "plain").stdout)
    assert row == {"file": str(directory / "plain"), "digest": told.split()[0].decode()}


ODD = "a\x1b[31m\n\r\x85\u202e\udcff[b]é"


@pytest.mark.parametrize("name", [b"p\xc3\xb6\xc3\xb6l, mine\\", b"pool\xff\n"])
def test_a_pool_is_mounted_and_found_whatever_its_path(tmp_path: Path, name: bytes) -> None:
    pool, mountpoint = tmp_path / os.fsdecode(name), tmp_path / "mnt"
    mountpoint.mkdir()
    vfsmap("format", pool, "--size", "16M")
    vfsmap("mount", pool, mountpoint)
    try:
        (mountpoint / "file").write_bytes(b"content")
        with library.map(mountpoint / "file") as window:
            assert window.direct
        told = json.loads(vfsmap("info", mountpoint, "--json").stdout)
        assert told["mounted_on"] == str(mountpoint)
    finally:
        vfsmap("umount", mountpoint)
    assert not mountpoint.is_mount()


SHOWN = r"a\x1b[31m\n\r\u0085\u202e\xff[b]é"


def test_names_are_printed_for_people_so_that_a_terminal_shows_them(
    server: Server, tmp_path: Path
) -> None:
    file = server.make_directory("shown") / ODD
    pool = tmp_path / ODD
    file.write_bytes(b"content")
    told = [
        vfsmap("format", pool, "--size", "16M").stdout,
        vfsmap("check", pool).stdout,
        vfsmap("info", pool).stdout,
        vfsmap("map", file).stdout,
        vfsmap("explain", file).stdout,
        vfsmap("seal", file).stdout,
        vfsmap("verify", file).stdout,
        vfsmap("dump", server.pool).stdout,
        complaint("seal", file, code=1),
        complaint("verify", file.with_name(ODD + "2"), code=1),
        complaint("cp", tmp_path / ODD / "none", tmp_path, code=1),
        complaint("pstore", "ls", file.parent / "no" / ODD, code=1),
        complaint("export", pool, tmp_path / "tar", code=1),
    ]
    for text in told:
        assert SHOWN in text
        assert "".join(text.split("\n")).isprintable()


def test_json_holds_exact_names_and_escapes_of_bytes_that_are_no_text(server: Server) -> None:
    directory = server.make_directory("json")
    for name, printed in {"é\n\x1b\\xff\\": "é\n\x1b\\xff\\", "\udcff\\": r"\xff" "\\"}.items():
        (directory / name).write_bytes(b"content")
        text = vfsmap("map", directory / name, "--json").stdout
        assert json.loads(text)["file"] == f"{directory}/{printed}"
        assert "\\udc" not in text
