"""Attributes on a real mount: modes, owners, times, and what changes them on its own."""

import errno
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vfsmap.testing.posix import STRANGER, as_user, refused

DAY = 86_400 * 10**9
OLD = 10**18 + 123_456_789
"""A time in 2001, to the nanosecond."""
TICK = 10 * 10**6
"""The kernel's own "now", which utime() without a time sends, is that of its last clock tick."""


def mode(name: str) -> int:
    return stat.S_IMODE(os.lstat(name).st_mode)


def make_old(*names: str) -> None:
    for name in names:
        os.utime(name, ns=(OLD, OLD), follow_symlinks=False)


def settle() -> int:
    """Return a time that no change made before can bear, and every later one bears at least."""
    now = time.time_ns()
    while time.time_ns() == now:
        pass
    return time.time_ns()


@pytest.mark.parametrize("bits", [0, 0o777, 0o644, 0o1777, 0o2755, 0o4755, 0o7777, 0o001])
def test_chmod_sets_all_twelve_bits_of_files_and_directories(here: Path, bits: int) -> None:
    Path("file").touch()
    os.mkdir("dir")
    os.mkfifo("fifo")
    for name in ("file", "dir", "fifo"):
        os.chmod(name, bits)
        assert mode(name) == bits
    fd = os.open("file", os.O_RDONLY)
    os.fchmod(fd, 0o600)
    assert os.fstat(fd).st_mode == stat.S_IFREG | 0o600
    os.close(fd)


def test_the_umask_is_applied_to_everything_new(here: Path) -> None:
    before = os.umask(0o027)
    try:
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, 0o666))
        os.mkdir("dir", 0o777)
        os.mkfifo("fifo", 0o666)
        os.mknod("node", stat.S_IFREG | 0o666)
    finally:
        os.umask(before)
    assert [mode(name) for name in ("file", "dir", "fifo", "node")] == [0o640, 0o750, 0o640, 0o640]


def test_new_files_belong_to_their_maker(here: Path) -> None:
    def make() -> None:
        Path("file").touch()
        os.mkdir("dir")
        os.symlink("x", "link")
        os.mkfifo("fifo")

    as_user(make, uid=STRANGER, gid=STRANGER + 1)
    for name in ("file", "dir", "link", "fifo"):
        found = os.lstat(name)
        assert (found.st_uid, found.st_gid) == (STRANGER, STRANGER + 1)


def test_chown_sets_owner_and_group_alone_or_together(here: Path) -> None:
    Path("it").touch()
    os.symlink("it", "link")
    for uid, gid in ((10, 20), (-1, 30), (40, -1), (-1, -1), (2**32 - 2, 2**32 - 2)):
        expected = os.stat("it")
        os.chown("it", uid, gid)
        found = os.stat("it")
        assert found.st_uid == (expected.st_uid if uid == -1 else uid)
        assert found.st_gid == (expected.st_gid if gid == -1 else gid)
    os.lchown("link", 7, 8)
    assert (os.lstat("link").st_uid, os.stat("it").st_uid) == (7, 2**32 - 2)


# set-user-ID and set-group-ID


@pytest.mark.parametrize(
    ("before", "after"), [(0o6755, 0o755), (0o4644, 0o644), (0o2755, 0o755), (0o2745, 0o2745)]
)
def test_a_change_of_owner_takes_set_id_bits_from_files(
    here: Path, before: int, after: int
) -> None:
    Path("it").touch()
    os.chmod("it", before)
    os.chown("it", 1, 1)
    assert mode("it") == after


def test_a_change_of_owner_leaves_a_directory_its_bits(here: Path) -> None:
    os.mkdir("dir")
    os.chmod("dir", 0o6755)
    os.chown("dir", 1, 1)
    assert mode("dir") == 0o6755


@pytest.mark.parametrize("before", [0o6777, 0o4777, 0o2777])
@pytest.mark.parametrize("how", ["write", "truncate", "open"])
def test_a_stranger_who_changes_a_file_takes_its_set_id_bits(
    here: Path, how: str, before: int
) -> None:
    Path("it").write_bytes(b"text")
    os.chmod("it", before)

    def change() -> None:
        if how == "truncate":
            os.truncate("it", 1)
        else:
            fd = os.open("it", os.O_WRONLY | (os.O_TRUNC if how == "open" else 0))
            if how == "write":
                os.write(fd, b"x")
            os.close(fd)

    as_user(change)
    assert mode("it") == 0o777


@pytest.mark.parametrize(
    "change",
    [lambda: os.truncate("it", 1), lambda: Path("it").write_text("")],
    ids=["truncate", "write"],
)
def test_root_may_change_a_file_without_taking_its_set_id_bits(
    here: Path, change: Callable[[], object]
) -> None:
    Path("it").write_bytes(b"text")
    os.chmod("it", 0o6777)
    change()
    assert mode("it") == 0o6777


def test_set_group_id_without_group_execute_is_no_privilege(here: Path) -> None:
    Path("it").touch()
    os.chmod("it", 0o2666)
    os.chown("it", -1, STRANGER)

    def change() -> None:
        Path("it").write_bytes(b"x")

    as_user(change)
    assert mode("it") == 0o2666


def test_a_stranger_to_the_group_takes_even_that(here: Path) -> None:
    Path("it").write_bytes(b"text")
    os.chown("it", -1, 77)
    for change in (lambda: Path("it").write_bytes(b"x"), lambda: grown("it")):
        os.chmod("it", 0o2666)
        as_user(change)
        assert mode("it") == 0o666


def test_a_set_group_id_directory_hands_down_its_group(here: Path) -> None:
    os.mkdir("dir")
    os.chown("dir", 0, 77)
    os.chmod("dir", 0o2777)

    def make() -> None:
        Path("dir/file").touch()
        os.mkdir("dir/sub")
        os.mkfifo("dir/fifo")

    as_user(make)
    assert {os.lstat(f"dir/{name}").st_gid for name in ("file", "sub", "fifo")} == {77}
    assert mode("dir/sub") & stat.S_ISGID
    assert not mode("dir/file") & stat.S_ISGID


def test_a_stranger_can_not_give_a_file_a_group_s_rights(here: Path) -> None:
    Path("it").touch()
    os.chown("it", STRANGER, 77)
    as_user(lambda: os.chmod("it", 0o2755))
    assert mode("it") == 0o755


# times


@pytest.mark.parametrize(
    "time_ns", [0, 1, 999_999_999, -1, -(10**18), 2**31 * 10**9, 2**32 * 10**9 + 7, OLD]
)
def test_times_are_kept_to_the_nanosecond(here: Path, time_ns: int) -> None:
    Path("it").touch()
    os.symlink("it", "link")
    for name in ("it", "link", "."):
        os.utime(name, ns=(time_ns, time_ns + 1), follow_symlinks=False)
        found = os.lstat(name)
        assert (found.st_atime_ns, found.st_mtime_ns) == (time_ns, time_ns + 1)


@pytest.mark.parametrize("seconds", [2**40, -(2**40)])
def test_a_time_that_can_not_be_kept_becomes_the_nearest_that_can(here: Path, seconds: int) -> None:
    Path("it").touch()
    os.utime("it", (seconds, seconds))
    assert abs(os.stat("it").st_mtime) < 2**34
    assert (os.stat("it").st_mtime > 0) == (seconds > 0)


def test_setting_times_changes_the_change_time_only_by_itself(here: Path) -> None:
    Path("it").touch()
    before = settle()
    os.utime("it", ns=(5, 6))
    found = os.stat("it")
    assert (found.st_atime_ns, found.st_mtime_ns) == (5, 6)
    assert found.st_ctime_ns >= before
    os.utime("it")
    assert os.stat("it").st_mtime_ns >= before - TICK


def grown(name: str) -> None:
    with Path(name).open("ab") as file:
        file.write(b"x")


CHANGES: dict[str, tuple[Callable[[], object], str]] = {
    "write": (lambda: grown("file"), "mc"),
    "truncate": (lambda: os.truncate("file", 2), "mc"),
    "empty at open": (lambda: Path("file").open("wb").close(), "mc"),
    "chmod": (lambda: os.chmod("file", 0o600), "c"),
    "chown": (lambda: os.chown("file", 1, 1), "c"),
    "link": (lambda: os.link("file", "other"), "c"),
    "unlink": (lambda: os.unlink("more"), "c"),
    "rename": (lambda: os.rename("file", "other"), "c"),
    "setxattr": (lambda: os.setxattr("file", "user.x", b"y"), "c"),
    "removexattr": (lambda: os.removexattr("file", "user.kept"), "c"),
    "read": (lambda: Path("file").read_bytes(), "a"),
    "stat": (lambda: os.stat("file"), ""),
    "open": (lambda: Path("file").open("r+b").close(), ""),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_operation_marks_the_times_it_has_to(here: Path, change: str) -> None:
    Path("file").write_bytes(b"text")
    os.setxattr("file", "user.kept", b"")
    os.link("file", "more")
    make_old("file")
    before = settle()
    old = os.stat("file")
    action, marked = CHANGES[change]
    action()
    found = os.stat("other" if change == "rename" else "file")
    assert ("a" in marked) == (found.st_atime_ns >= before)
    assert ("m" in marked) == (found.st_mtime_ns >= before)
    assert ("c" in marked) == (found.st_ctime_ns >= before)
    if "c" not in marked:
        assert found.st_ctime_ns == old.st_ctime_ns


HOME_CHANGES: dict[str, Callable[[], object]] = {
    "create": lambda: Path("dir/new").touch(),
    "mkdir": lambda: os.mkdir("dir/new"),
    "symlink": lambda: os.symlink("x", "dir/new"),
    "mkfifo": lambda: os.mkfifo("dir/new"),
    "link": lambda: os.link("dir/file", "dir/new"),
    "unlink": lambda: os.unlink("dir/file"),
    "rmdir": lambda: os.rmdir("dir/sub"),
    "rename inside": lambda: os.rename("dir/file", "dir/new"),
    "rename away": lambda: os.rename("dir/file", "new"),
    "rename to": lambda: os.rename("outside", "dir/new"),
}


@pytest.mark.parametrize("change", HOME_CHANGES)
def test_a_new_or_a_lost_name_marks_its_directory(here: Path, change: str) -> None:
    os.makedirs("dir/sub")
    Path("dir/file").touch()
    Path("outside").touch()
    make_old("dir")
    before = settle()
    HOME_CHANGES[change]()
    found = os.stat("dir")
    assert found.st_mtime_ns >= before
    assert found.st_ctime_ns >= before
    assert found.st_atime_ns == OLD


def test_a_refused_operation_marks_nothing(here: Path) -> None:
    os.mkdir("dir")
    Path("dir/file").touch()
    make_old("dir", "dir/file")
    old = os.stat("dir"), os.stat("dir/file")
    with refused(errno.EEXIST):
        os.mkdir("dir/file")
    with refused(errno.ENOENT):
        os.unlink("dir/missing")
    with refused(errno.ENOTEMPTY):
        os.rmdir("dir")
    with refused(errno.EACCES):
        as_user(lambda: Path("dir/new").touch())
    with refused(errno.EPERM):
        as_user(lambda: os.chmod("dir/file", 0o777))
    assert (os.stat("dir"), os.stat("dir/file")) == old


def test_listing_and_reading_a_link_mark_the_access_time(here: Path) -> None:
    os.mkdir("dir")
    os.symlink("x", "link")
    make_old("dir", "link")
    before = settle()
    os.listdir("dir")
    os.readlink("link")
    assert os.stat("dir").st_atime_ns >= before
    assert os.lstat("link").st_atime_ns >= before


def test_what_the_page_cache_answers_is_a_read_too(here: Path) -> None:
    Path("it").write_bytes(b"text" * 1024)
    for change in ("written", "renamed"):
        before = settle()
        Path("it").write_bytes(b"more" * 1024) if change == "written" else os.rename("it", "it2")
        found = Path("it" if change == "written" else "it2")
        assert os.stat(found).st_atime_ns < before
        assert found.read_bytes() == b"more" * 1024
        assert os.stat(found).st_atime_ns > before


def test_who_asks_for_it_reads_without_a_trace(here: Path) -> None:
    Path("it").write_bytes(b"text")
    make_old("it")
    fd = os.open("it", os.O_RDONLY | os.O_NOATIME)
    assert os.read(fd, 9) == b"text"
    os.close(fd)
    assert os.stat("it").st_atime_ns == OLD
    with refused(errno.EPERM):
        as_user(lambda: os.open("it", os.O_RDONLY | os.O_NOATIME))


def test_access_times_are_relative_to_changes(here: Path) -> None:
    Path("it").write_bytes(b"text")
    recent = time.time_ns() + DAY
    os.utime("it", ns=(recent, recent - 10))
    Path("it").read_bytes()
    assert os.stat("it").st_atime_ns == recent


def test_times_only_an_owner_may_set_and_now_any_writer(here: Path) -> None:
    Path("it").touch()
    os.chmod("it", 0o666)
    with refused(errno.EPERM):
        as_user(lambda: os.utime("it", ns=(1, 1)))
    as_user(lambda: os.utime("it"))
    os.chmod("it", 0o644)
    with refused(errno.EACCES):
        as_user(lambda: os.utime("it"))


def test_blocks_tell_what_is_allocated(here: Path) -> None:
    with Path("it").open("wb") as file:
        file.write(b"x")
        file.truncate(1 << 30)
    found = os.stat("it")
    assert 0 < found.st_blocks * 512 <= 4096
    assert found.st_blksize >= 4096
    os.symlink("x" * 50, "link")
    os.mkfifo("fifo")
    assert os.lstat("fifo").st_blocks == 0
    assert os.lstat("fifo").st_size == 0
