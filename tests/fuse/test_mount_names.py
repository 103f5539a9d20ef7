"""Names on a real mount: made, linked, renamed, removed, and refused as POSIX has it."""

import errno
import os
import socket
import stat
from pathlib import Path

import pytest

from vfsmap.testing.posix import refused

RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4


def rename2(old: str, new: str, flags: int) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(-100, old.encode(), -100, new.encode(), flags):
        raise OSError(ctypes.get_errno(), "renameat2")


def make(kind: str, name: str) -> None:
    """Make a file of a kind: the kinds that a name can belong to."""
    if kind == "file":
        Path(name).touch()
    elif kind == "directory":
        Path(name).mkdir()
    elif kind == "link":
        Path(name).symlink_to("nowhere")
    elif kind == "fifo":
        os.mkfifo(name)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(name)
    else:
        os.mknod(name, stat.S_IFCHR | 0o600 if kind == "char" else stat.S_IFBLK | 0o600, 0x0103)


KINDS = ["file", "directory", "link", "fifo", "socket", "char", "block"]
OTHERS = [kind for kind in KINDS if kind != "directory"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_name_shows_in_lstat_and_in_the_listing_until_it_is_removed(
    here: Path, kind: str
) -> None:
    make(kind, "it")
    assert os.listdir() == ["it"]
    types = {
        "file": stat.S_IFREG,
        "directory": stat.S_IFDIR,
        "link": stat.S_IFLNK,
        "fifo": stat.S_IFIFO,
        "socket": stat.S_IFSOCK,
        "char": stat.S_IFCHR,
        "block": stat.S_IFBLK,
    }
    assert stat.S_IFMT(os.lstat("it").st_mode) == types[kind]
    (os.rmdir if kind == "directory" else os.unlink)("it")
    assert os.listdir() == []
    with refused(errno.ENOENT):
        os.lstat("it")


@pytest.mark.parametrize("kind", KINDS)
def test_an_existing_name_of_any_kind_can_not_be_made_again(here: Path, kind: str) -> None:
    make(kind, "it")
    with refused(errno.EEXIST):
        os.mkdir("it")
    with refused(errno.EEXIST):
        os.symlink("x", "it")
    with refused(errno.EEXIST):
        os.mkfifo("it")
    with refused(errno.EEXIST):
        os.close(os.open("it", os.O_CREAT | os.O_EXCL))
    Path("other").touch()
    with refused(errno.EEXIST):
        os.link("other", "it")


@pytest.mark.parametrize("kind", OTHERS)
def test_rmdir_of_what_is_no_directory_and_unlink_of_a_directory_are_refused(
    here: Path, kind: str
) -> None:
    make(kind, "it")
    with refused(errno.ENOTDIR):
        os.rmdir("it")
    os.mkdir("dir")
    with refused(errno.EISDIR):
        os.unlink("dir")


def test_a_missing_name_is_remembered_only_until_it_is_made(here: Path) -> None:
    for _ in range(2):
        with refused(errno.ENOENT):
            os.stat("it")
    Path("it").touch()
    assert os.stat("it").st_size == 0
    os.rename("it", "that")
    with refused(errno.ENOENT):
        os.stat("it")
    os.link("that", "it")
    assert os.stat("it").st_nlink == 2


def test_names_go_up_to_255_bytes_and_paths_through_no_file(here: Path) -> None:
    longest = "é" * 127 + "x"
    Path(longest).touch()
    assert os.listdir() == [longest]
    os.rename(longest, "y" * 255)
    for call in (os.mkdir, os.stat, os.unlink, os.mkfifo, os.rmdir):
        with refused(errno.ENAMETOOLONG):
            call("z" * 256)
    with refused(errno.ENAMETOOLONG):
        os.rename("y" * 255, "z" * 256)
    with refused(errno.ENAMETOOLONG):
        os.link("y" * 255, "z" * 256)
    with refused(errno.ENAMETOOLONG):
        os.symlink("x", "z" * 256)
    with refused(errno.ENAMETOOLONG):
        os.close(os.open("z" * 256, os.O_CREAT))
    with refused(errno.ENOTDIR):
        os.stat("y" * 255 + "/x")
    with refused(errno.ENOTDIR):
        os.mkdir("y" * 255 + "/x")


def test_names_are_bytes_and_nothing_else(here: Path) -> None:
    names = [b"\xff\xfe", b"\n", b" ", b"a\\b", b"...", b"-", "ä".encode(), "a\u0308".encode()]
    for name in names:
        os.close(os.open(name, os.O_CREAT))
    assert sorted(os.listdir(b".")) == sorted(names)
    for name in names:
        os.unlink(name)


def test_dot_and_dot_dot_can_neither_be_made_nor_removed(here: Path) -> None:
    os.makedirs("a/b")
    with refused(errno.EINVAL):
        os.rmdir("a/.")
    with refused(errno.ENOTEMPTY):
        os.rmdir("a/b/..")
    with refused(errno.EBUSY, errno.EINVAL):
        os.rename("a/.", "c")
    with refused(errno.EEXIST):
        os.mkdir("a/.")
    with refused(errno.EEXIST):
        os.mkdir("a/..")
    assert os.stat("a/b/..").st_ino == os.stat("a").st_ino
    assert os.stat("a/b/../.").st_ino == os.stat("a").st_ino


def test_only_an_empty_directory_can_be_removed(here: Path) -> None:
    os.makedirs("a/b")
    with refused(errno.ENOTEMPTY):
        os.rmdir("a")
    os.rmdir("a/b")
    os.rmdir("a")
    with refused(errno.ENOENT):
        os.rmdir("a")


def test_a_directory_counts_its_subdirectories_as_links(here: Path) -> None:
    os.mkdir("a")
    assert os.stat("a").st_nlink == 2
    for name in "xyz":
        os.mkdir(f"a/{name}")
    assert os.stat("a").st_nlink == 5
    os.rename("a/x", "b")
    os.rmdir("a/y")
    assert os.stat("a").st_nlink == 3
    os.rename("b", "a/z")
    assert os.stat("a").st_nlink == 3
    Path("a/file").touch()
    assert os.stat("a").st_nlink == 3


# links


@pytest.mark.parametrize("kind", OTHERS)
def test_a_hard_link_is_the_same_file(here: Path, kind: str) -> None:
    make(kind, "it")
    os.link("it", "other", follow_symlinks=False)
    first, second = os.lstat("it"), os.lstat("other")
    assert (first.st_ino, first.st_nlink, first.st_mode) == (second.st_ino, 2, second.st_mode)
    os.unlink("it")
    assert os.lstat("other").st_nlink == 1


def test_what_one_hard_link_writes_the_other_reads(here: Path) -> None:
    Path("a").write_bytes(b"one")
    os.link("a", "b")
    Path("b").write_bytes(b"another")
    assert Path("a").read_bytes() == b"another"
    os.chmod("a", 0o640)
    assert stat.S_IMODE(os.stat("b").st_mode) == 0o640


def test_a_directory_can_not_be_hard_linked(here: Path) -> None:
    os.mkdir("a")
    with refused(errno.EPERM):
        os.link("a", "b")


def test_a_symbolic_link_keeps_its_target_to_the_byte(here: Path) -> None:
    for target in (b"x", b"/", b"../\xff", b"a/" * 2047 + b"b"):
        os.symlink(target, b"link")
        assert os.readlink(b"link") == target
        assert os.lstat("link").st_size == len(target)
        os.unlink("link")
    with refused(errno.ENAMETOOLONG):
        os.symlink("x" * 4096, "link")
    with refused(errno.ENOENT):
        os.symlink("", "link")


def test_symbolic_links_are_followed_in_paths_and_loops_are_noticed(here: Path) -> None:
    os.mkdir("dir")
    Path("dir/file").write_text("text")
    os.symlink("dir", "link")
    assert Path("link/file").read_text() == "text"
    os.symlink("file2", "dir/file3")
    Path("link/file3").write_text("through a dangling link")
    assert Path("dir/file2").exists()
    os.symlink("b", "a")
    os.symlink("a", "b")
    with refused(errno.ELOOP):
        os.stat("a")
    with refused(errno.ELOOP):
        os.close(os.open("link", os.O_RDONLY | os.O_NOFOLLOW))
    with refused(errno.EINVAL):
        os.readlink("dir")


# renaming


@pytest.mark.parametrize("kind", KINDS)
def test_rename_moves_a_file_of_any_kind_and_keeps_its_inode(here: Path, kind: str) -> None:
    make(kind, "old")
    os.mkdir("dir")
    ino = os.lstat("old").st_ino
    os.rename("old", "dir/new")
    assert (os.listdir("."), os.listdir("dir")) == (["dir"], ["new"])
    assert os.lstat("dir/new").st_ino == ino


@pytest.mark.parametrize("old", OTHERS)
@pytest.mark.parametrize("new", OTHERS)
def test_rename_replaces_any_kind_but_a_directory(here: Path, old: str, new: str) -> None:
    make(old, "old")
    make(new, "new")
    ino = os.lstat("old").st_ino
    os.rename("old", "new")
    assert os.listdir() == ["new"]
    assert os.lstat("new").st_ino == ino


@pytest.mark.parametrize("kind", OTHERS)
def test_rename_replaces_no_directory_by_a_file_and_no_file_by_a_directory(
    here: Path, kind: str
) -> None:
    make(kind, "it")
    os.mkdir("dir")
    with refused(errno.EISDIR):
        os.rename("it", "dir")
    with refused(errno.ENOTDIR):
        os.rename("dir", "it")
    assert sorted(os.listdir()) == ["dir", "it"]


def test_rename_replaces_an_empty_directory_only(here: Path) -> None:
    os.makedirs("full/x")
    os.mkdir("empty")
    os.makedirs("dir/y")
    with refused(errno.ENOTEMPTY, errno.EEXIST):
        os.rename("dir", "full")
    os.rename("dir", "empty")
    assert os.listdir("empty") == ["y"]
    assert sorted(os.listdir()) == ["empty", "full"]


def test_a_directory_can_not_be_moved_into_itself(here: Path) -> None:
    os.makedirs("a/b/c")
    for target in ("a/x", "a/b/x", "a/b/c/x"):
        with refused(errno.EINVAL):
            os.rename("a", target)
    with refused(errno.ENOTEMPTY, errno.EEXIST):
        os.rename("a/b/c", "a")


def test_rename_onto_another_name_of_the_same_file_does_nothing(here: Path) -> None:
    Path("a").touch()
    os.link("a", "b")
    os.rename("a", "b")
    assert sorted(os.listdir()) == ["a", "b"]
    os.rename("a", "a")
    assert os.stat("a").st_nlink == 2


def test_a_moved_directory_finds_its_new_parent(here: Path) -> None:
    os.makedirs("a/b")
    os.mkdir("c")
    os.rename("a/b", "c/d")
    assert os.stat("c/d/..").st_ino == os.stat("c").st_ino
    assert (os.stat("a").st_nlink, os.stat("c").st_nlink) == (2, 3)


def test_rename_of_a_missing_name_or_into_a_missing_directory_is_refused(here: Path) -> None:
    Path("a").touch()
    with refused(errno.ENOENT):
        os.rename("missing", "b")
    with refused(errno.ENOENT):
        os.rename("a", "missing/b")
    with refused(errno.ENOTDIR):
        os.rename("a", "a/b")
    with refused(errno.EXDEV):
        os.rename("a", "/dev/shm/b")


def test_noreplace_keeps_what_is_there(here: Path) -> None:
    Path("a").write_text("a")
    Path("b").write_text("b")
    with refused(errno.EEXIST):
        rename2("a", "b", RENAME_NOREPLACE)
    assert Path("b").read_text() == "b"
    rename2("a", "c", RENAME_NOREPLACE)
    assert Path("c").read_text() == "a"


def test_exchange_swaps_a_file_and_a_directory_across_directories(here: Path) -> None:
    os.makedirs("one/dir/inner")
    os.mkdir("two")
    Path("two/file").write_text("text")
    rename2("one/dir", "two/file", RENAME_EXCHANGE)
    assert Path("one/dir").read_text() == "text"
    assert os.listdir("two/file") == ["inner"]
    assert (os.stat("one").st_nlink, os.stat("two").st_nlink) == (2, 3)
    assert os.stat("two/file/..").st_ino == os.stat("two").st_ino
    with refused(errno.ENOENT):
        rename2("one/dir", "missing", RENAME_EXCHANGE)
    with refused(errno.EINVAL):
        rename2("two", "two/file/inner", RENAME_EXCHANGE)
    with refused(errno.EINVAL):
        rename2("one/dir", "x", RENAME_WHITEOUT)


# device numbers and odd files


@pytest.mark.parametrize(
    ("major", "minor"), [(0, 0), (1, 3), (8, 255), (255, 256), (4095, 1048575)]
)
def test_a_device_node_keeps_its_number(here: Path, major: int, minor: int) -> None:
    os.mknod("dev", stat.S_IFBLK | 0o600, os.makedev(major, minor))
    assert os.lstat("dev").st_rdev == os.makedev(major, minor)


def test_a_device_node_made_by_root_opens_its_device(here: Path) -> None:
    os.mknod("null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    Path("null").write_bytes(b"gone")
    assert Path("null").read_bytes() == b""


def test_a_fifo_carries_bytes_between_processes(here: Path) -> None:
    os.mkfifo("pipe")
    with refused(errno.ENXIO):
        os.close(os.open("pipe", os.O_WRONLY | os.O_NONBLOCK))
    child = os.fork()
    if child == 0:
        with Path("pipe").open("wb") as pipe:
            pipe.write(b"through the pipe")
        os._exit(0)
    with Path("pipe").open("rb") as pipe:
        assert pipe.read() == b"through the pipe"
    os.waitpid(child, 0)


def test_a_unix_socket_can_be_connected_to_by_its_name(here: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind("socket")
        listener.listen()
        client.connect("socket")
        connection, _ = listener.accept()
        with connection:
            client.sendall(b"hello")
            assert connection.recv(5) == b"hello"
    with refused(errno.ENXIO):
        os.close(os.open("socket", os.O_RDONLY))
