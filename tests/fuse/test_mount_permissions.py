"""Permissions on a real mount: what a user who is not root may do."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from vfsmap.testing.posix import STRANGER, as_user, refused

OWNER, GROUP = 2001, 2002


def owned(name: str, mode: int, *, directory: bool = False) -> None:
    os.mkdir(name) if directory else Path(name).write_bytes(b"text")
    os.chown(name, OWNER, GROUP)
    os.chmod(name, mode)


IDENTITIES = {
    "owner": (OWNER, OWNER, ()),
    "group": (STRANGER, GROUP, ()),
    "supplementary group": (STRANGER, STRANGER, (5, GROUP)),
    "other": (STRANGER, STRANGER, ()),
}
SHIFT = {"owner": 6, "group": 3, "supplementary group": 3, "other": 0}


@pytest.mark.parametrize("who", IDENTITIES)
@pytest.mark.parametrize("bits", range(8))
def test_a_file_gives_each_class_of_users_exactly_its_bits(here: Path, who: str, bits: int) -> None:
    owned("it", bits << SHIFT[who])
    uid, gid, groups = IDENTITIES[who]
    flags = {4: os.O_RDONLY, 2: os.O_WRONLY, 6: os.O_RDWR}

    def permitted(right: int) -> bool:
        try:
            os.close(os.open("it", flags[right]))
        except PermissionError:
            return False
        return True

    rights = (4, 2, 6)
    opened = as_user(lambda: [permitted(right) for right in rights], uid, gid, groups)
    access = as_user(lambda: [os.access("it", right) for right in range(1, 8)], uid, gid, groups)
    assert opened == [bits & right == right for right in rights]
    assert access == [bits & right == right for right in range(1, 8)]


def test_root_reads_and_writes_anything_but_runs_only_what_has_an_execute_bit(here: Path) -> None:
    owned("it", 0)
    assert Path("it").read_bytes() == b"text"
    Path("it").write_bytes(b"more")
    assert not os.access("it", os.X_OK)
    os.chmod("it", 0o001)
    assert os.access("it", os.X_OK)


IN_DIRECTORY: dict[str, tuple[Callable[[], object], int]] = {
    "stat": (lambda: os.stat("dir/file"), 1),
    "read": (lambda: Path("dir/file").read_bytes(), 1),
    "list": (lambda: os.listdir("dir"), 4),
    "create": (lambda: Path("dir/new").touch(), 3),
    "mkdir": (lambda: os.mkdir("dir/new"), 3),
    "symlink": (lambda: os.symlink("x", "dir/new"), 3),
    "mkfifo": (lambda: os.mkfifo("dir/new"), 3),
    "unlink": (lambda: os.unlink("dir/file"), 3),
    "rmdir": (lambda: os.rmdir("dir/sub"), 3),
    "rename inside": (lambda: os.rename("dir/file", "dir/new"), 3),
    "rename away": (lambda: os.rename("dir/file", "free/new"), 3),
    "rename to": (lambda: os.rename("free/mine", "dir/new"), 3),
    "link": (lambda: os.link("free/mine", "dir/new"), 3),
    "enter": (lambda: os.chdir("dir"), 1),
}


@pytest.mark.parametrize("what", IN_DIRECTORY)
def test_a_directory_allows_what_its_bits_allow(here: Path, what: str) -> None:
    action, needed = IN_DIRECTORY[what]
    for bits in range(8):
        base = here / f"bits-{bits}"
        for name in (base, base / "dir", base / "dir/sub", base / "free"):
            name.mkdir()
            name.chmod(0o777)
        for name in (base / "dir/file", base / "free/mine"):
            name.write_bytes(b"text")
            os.chown(name, STRANGER, STRANGER)
        (base / "dir").chmod(bits)

        def act(base: Path = base) -> None:
            os.chdir(base)
            action()

        if bits & needed == needed:
            as_user(act)
        else:
            with refused(errno.EACCES):
                as_user(act)


def test_only_the_owner_and_root_may_change_mode_and_owner(here: Path) -> None:
    owned("it", 0o666)
    for action in (
        lambda: os.chmod("it", 0o600),
        lambda: os.chown("it", STRANGER, -1),
        lambda: os.chown("it", -1, STRANGER),
    ):
        with refused(errno.EPERM):
            as_user(action, STRANGER)
    as_user(lambda: os.chmod("it", 0o640), OWNER)
    with refused(errno.EPERM):
        as_user(lambda: os.chown("it", STRANGER, -1), OWNER)
    with refused(errno.EPERM):
        as_user(lambda: os.chown("it", -1, STRANGER), OWNER)
    as_user(lambda: os.chown("it", OWNER, 3000), OWNER, OWNER, [3000])
    assert (os.stat("it").st_uid, os.stat("it").st_gid) == (OWNER, 3000)


def test_in_a_sticky_directory_only_owners_remove_and_rename(here: Path) -> None:
    owned("dir", 0o1777, directory=True)
    for name in ("dir/a", "dir/b", "dir/c"):
        Path(name).touch()
        os.chown(name, 3000, 3000)
    Path("dir/mine").touch()
    os.chown("dir/mine", STRANGER, STRANGER)
    for action in (
        lambda: os.unlink("dir/a"),
        lambda: os.rename("dir/a", "dir/x"),
        lambda: os.rename("dir/mine", "dir/a"),
    ):
        with refused(errno.EPERM):
            as_user(action, STRANGER)
    as_user(lambda: os.unlink("dir/a"), 3000)
    as_user(lambda: os.rename("dir/b", "dir/x"), OWNER)
    os.unlink("dir/c")


def test_a_stranger_can_make_no_device(here: Path) -> None:
    with refused(errno.EPERM):
        as_user(lambda: os.mknod("dev", 0o20600, os.makedev(1, 3)))
    as_user(lambda: os.mknod("file", 0o100600))


def test_a_closed_directory_on_the_way_hides_what_is_behind(here: Path) -> None:
    os.makedirs("a/b")
    Path("a/b/file").write_bytes(b"text")
    os.chmod("a", 0o600)
    for action in (
        lambda: os.stat("a/b/file"),
        lambda: os.readlink("a/b/file"),
        lambda: os.truncate("a/b/file", 0),
        lambda: os.rename("a/b/file", "x"),
        lambda: os.statvfs("a/b"),
    ):
        with refused(errno.EACCES):
            as_user(action)
    os.chmod("a", 0o711)
    assert as_user(lambda: os.stat("a/b/file").st_size) == 4


def test_a_change_of_permissions_holds_at_once(here: Path) -> None:
    owned("it", 0o600)
    with refused(errno.EACCES):
        as_user(lambda: Path("it").read_bytes())
    os.chmod("it", 0o604)
    assert as_user(lambda: Path("it").read_bytes()) == b"text"
    os.chown("it", STRANGER, -1)
    with refused(errno.EACCES):
        os.chmod("it", 0o004)
        as_user(lambda: Path("it").read_bytes())


def test_an_open_descriptor_outlives_its_permissions(here: Path) -> None:
    owned("it", 0o666)
    fd = os.open("it", os.O_RDWR)
    os.chmod("it", 0)
    assert as_user(lambda: os.pwrite(fd, b"T", 0)) == 1
    assert as_user(lambda: os.pread(fd, 4, 0)) == b"Text"
    os.close(fd)
