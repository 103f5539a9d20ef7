"""Extended attributes on a real mount, those that are stored and those that are not."""

import errno
import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from vfsmap.testing.posix import STRANGER, as_user, refused
from vfsmap.units import MIB


@pytest.mark.parametrize("value", [b"", b"x", b"\0\xff", b"v" * 4096, b"v" * 65536])
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_value_of_any_size_comes_back(here: Path, kind: str, value: bytes) -> None:
    Path("it").touch() if kind == "file" else os.mkdir("it")
    os.setxattr("it", "user.name", value)
    assert os.getxattr("it", "user.name") == value
    assert os.listxattr("it") == ["user.name"]
    os.setxattr("it", "user.name", b"new")
    assert os.getxattr("it", "user.name") == b"new"
    os.removexattr("it", "user.name")
    assert os.listxattr("it") == []
    with refused(errno.ENODATA):
        os.getxattr("it", "user.name")
    with refused(errno.ENODATA):
        os.removexattr("it", "user.name")


def test_create_and_replace_say_what_must_be_there(here: Path) -> None:
    Path("it").touch()
    with refused(errno.ENODATA):
        os.setxattr("it", "user.a", b"1", os.XATTR_REPLACE)
    os.setxattr("it", "user.a", b"1", os.XATTR_CREATE)
    with refused(errno.EEXIST):
        os.setxattr("it", "user.a", b"2", os.XATTR_CREATE)
    assert os.getxattr("it", "user.a") == b"1"
    os.setxattr("it", "user.a", b"3", os.XATTR_REPLACE)
    assert os.getxattr("it", "user.a") == b"3"
    with refused(errno.EINVAL):
        os.setxattr("it", "user.a", b"3", 4)


def test_names_and_values_have_their_limits(here: Path) -> None:
    Path("it").touch()
    longest = "user." + "n" * 250
    os.setxattr("it", longest, b"x")
    assert os.listxattr("it") == [longest]
    with refused(errno.ERANGE):
        os.setxattr("it", longest + "n", b"x")
    with refused(errno.E2BIG):
        os.setxattr("it", "user.x", b"v" * 65537)
    with refused(errno.EINVAL, errno.EOPNOTSUPP):
        os.setxattr("it", "user.", b"x")


def test_only_known_namespaces_are_stored(here: Path) -> None:
    Path("it").touch()
    for name in ("name", "user", "usr.x", "system.x", "os2.x"):
        with refused(errno.EOPNOTSUPP):
            os.setxattr("it", name, b"x")
        with refused(errno.EOPNOTSUPP, errno.ENODATA):
            os.getxattr("it", name)
    for name in ("trusted.x", "security.x", "user.x.y"):
        os.setxattr("it", name, name.encode())
        assert os.getxattr("it", name) == name.encode()


def test_posix_acls_are_refused_rather_than_stored_and_ignored(here: Path) -> None:
    Path("it").touch()
    entry = bytes.fromhex("02000000 01000600ffffffff 04000400ffffffff 20000400ffffffff")
    with refused(errno.EOPNOTSUPP):
        os.setxattr("it", "system.posix_acl_access", entry)


def test_trusted_attributes_are_for_root_alone(here: Path) -> None:
    Path("it").touch()
    os.chmod("it", 0o666)
    os.setxattr("it", "trusted.x", b"secret")
    os.setxattr("it", "user.x", b"open")
    assert as_user(lambda: os.listxattr("it")) == ["user.x"]
    with refused(errno.EPERM, errno.ENODATA):
        as_user(lambda: os.getxattr("it", "trusted.x"))
    with refused(errno.EPERM):
        as_user(lambda: os.setxattr("it", "trusted.y", b""))


def test_user_attributes_need_the_file_s_permissions(here: Path) -> None:
    Path("it").touch()
    os.chmod("it", 0o600)
    os.setxattr("it", "user.x", b"1")
    for action in (
        lambda: os.getxattr("it", "user.x"),
        lambda: os.setxattr("it", "user.x", b"2"),
        lambda: os.removexattr("it", "user.x"),
    ):
        with refused(errno.EACCES):
            as_user(action)
    os.chmod("it", 0o604)
    assert as_user(lambda: os.getxattr("it", "user.x")) == b"1"


@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_only_files_and_directories_have_user_attributes(here: Path, kind: str) -> None:
    os.symlink("x", "it") if kind == "link" else os.mkfifo("it")
    with refused(errno.EPERM):
        os.setxattr("it", "user.x", b"1", follow_symlinks=False)
    os.setxattr("it", "trusted.x", b"1", follow_symlinks=False)
    assert os.listxattr("it", follow_symlinks=False) == ["trusted.x"]


def test_many_attributes_are_listed_and_go_with_their_file(here: Path) -> None:
    Path("it").touch()
    names = {f"user.attribute-{number}" for number in range(200)}
    for name in names:
        os.setxattr("it", name, name.encode())
    assert set(os.listxattr("it")) == names
    os.rename("it", "that")
    os.link("that", "it")
    assert set(os.listxattr("it")) == names
    os.unlink("it")
    os.unlink("that")
    Path("it").touch()
    assert os.listxattr("it") == []


def test_no_more_attributes_are_kept_than_can_be_listed(here: Path) -> None:
    Path("it").touch()
    name = "user.{:03}" + "n" * 240
    kept = 0
    with refused(errno.ENOSPC):
        for kept in range(1000):
            os.setxattr("it", name.format(kept), b"")
    assert len(os.listxattr("it")) == kept == 65536 // len(name.format(0) + "x")
    os.setxattr("it", name.format(0), b"one that is there can change")
    os.removexattr("it", name.format(1))
    os.setxattr("it", name.format(kept), b"")


@pytest.mark.parametrize(
    "flags", [os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_APPEND, os.O_RDWR | os.O_DIRECT | os.O_DSYNC]
)
def test_capabilities_go_when_the_file_is_written(here: Path, flags: int) -> None:
    Path("it").write_bytes(b"x")
    capability = bytes.fromhex("01000002 00200000 00000000 00000000 00000000")
    os.setxattr("it", "security.capability", capability)
    assert os.getxattr("it", "security.capability") == capability
    fd = os.open("it", flags)
    os.write(fd, b"y")
    os.close(fd)
    with refused(errno.ENODATA):
        os.getxattr("it", "security.capability")


# the virtual ones


def test_virtual_attributes_are_not_listed_and_unknown_ones_not_there(here: Path) -> None:
    Path("it").write_bytes(b"x")
    os.setxattr("it", "user.vfsmap.align", b"2M")
    assert os.listxattr("it") == []
    with refused(errno.ENODATA):
        os.getxattr("it", "user.vfsmap.unknown")
    for name in ("socket", "extents", "level", "unknown"):
        with refused(errno.EACCES):
            os.setxattr("it", f"user.vfsmap.{name}", b"x")
        with refused(errno.EACCES):
            os.removexattr("it", f"user.vfsmap.{name}")


def test_an_alignment_is_set_inherited_and_removed(here: Path) -> None:
    os.mkdir("dir")
    with refused(errno.ENODATA):
        os.getxattr("dir", "user.vfsmap.align")
    os.setxattr("dir", "user.vfsmap.align", b"2M\n")
    os.mkdir("dir/sub")
    Path("dir/sub/it").touch()
    assert os.getxattr("dir/sub/it", "user.vfsmap.align") == b"2M"
    for wrong in (b"3M", b"", b"-1", b"\xff", b"8G"):
        with refused(errno.EINVAL):
            os.setxattr("dir", "user.vfsmap.align", wrong)
    os.removexattr("dir", "user.vfsmap.align")
    with refused(errno.ENODATA):
        os.getxattr("dir", "user.vfsmap.align")
    assert os.getxattr("dir/sub/it", "user.vfsmap.align") == b"2M"


def test_extents_and_level_tell_where_the_bytes_lie(here: Path) -> None:
    Path("it").touch()
    assert os.getxattr("it", "user.vfsmap.extents") == b""
    with refused(errno.ENODATA):
        os.getxattr("it", "user.vfsmap.level")
    Path("it").write_bytes(b"x" * 4 * MIB)
    extents = [
        tuple(map(int, line.split()))
        for line in os.getxattr("it", "user.vfsmap.extents").splitlines()
    ]
    assert sum(length for _, _, length in extents) == 4 * MIB
    assert os.getxattr("it", "user.vfsmap.level") == b"2M"
    assert all(start % (2 * MIB) == 0 for _, start, _ in extents)
    Path("small").write_bytes(b"x")
    assert os.getxattr("small", "user.vfsmap.level") == b"4K"
    with refused(errno.ENODATA):
        os.getxattr(".", "user.vfsmap.extents")


def test_the_socket_of_the_daemon_is_told(here: Path) -> None:
    assert os.getxattr(".", "user.vfsmap.socket") == b"/run/vfsmap/test.socket"


def test_a_sealed_file_tells_its_digest_and_can_not_change(here: Path) -> None:
    Path("it").write_bytes(b"x" * 10_000)
    with refused(errno.ENODATA):
        os.getxattr("it", "user.vfsmap.seal")
    os.setxattr("it", "user.vfsmap.seal", b"")
    digest = os.getxattr("it", "user.vfsmap.seal")
    assert digest.startswith(b"sha256:")
    assert len(digest) == len("sha256:") + 2 * hashlib.sha256().digest_size
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC, os.O_RDWR | os.O_DIRECT):
        with refused(errno.EPERM):
            os.close(os.open("it", flags))
    with refused(errno.EPERM):
        os.truncate("it", 0)
    with refused(errno.EEXIST):
        os.setxattr("it", "user.vfsmap.seal", b"")
    assert Path("it").read_bytes() == b"x" * 10_000
    os.chmod("it", 0o600)
    os.rename("it", "that")
    os.unlink("that")


def test_a_file_that_is_open_for_writing_can_not_be_sealed(here: Path) -> None:
    with Path("it").open("wb") as file:
        file.write(b"x")
        file.flush()
        with refused(errno.EBUSY):
            os.setxattr("it", "user.vfsmap.seal", b"")
    os.setxattr("it", "user.vfsmap.seal", b"")


def test_sealing_needs_permission_to_write(here: Path) -> None:
    Path("it").write_bytes(b"x")
    os.chmod("it", 0o644)
    with refused(errno.EACCES):
        as_user(lambda: os.setxattr("it", "user.vfsmap.seal", b""))
    os.chown("it", STRANGER, -1)
    as_user(lambda: os.setxattr("it", "user.vfsmap.seal", b""))


def test_copying_with_all_attributes_brings_no_virtual_ones(here: Path) -> None:
    Path("it").write_bytes(b"x")
    os.setxattr("it", "user.vfsmap.align", b"2M")
    os.setxattr("it", "user.mine", b"y")
    subprocess.run(["cp", "-a", "it", "copy"], check=True)
    assert os.listxattr("copy") == ["user.mine"]
    with refused(errno.ENODATA):
        os.getxattr("copy", "user.vfsmap.align")
