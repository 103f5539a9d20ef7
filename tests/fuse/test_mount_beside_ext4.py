"""The mount beside ext4: every call on every kind of path, by root, the owner and a stranger.

A case is a call, its paths and a user.  Both file systems hold the same small tree; what they
answer is compared, then everything that stat tells of the tree, and which times have moved.
"""

import ctypes
import errno
import itertools
import mmap
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Final, NamedTuple

import pytest

from vfsmap.testing.media import ext4_loop
from vfsmap.testing.posix import STRANGER, as_user

OWNER: Final = STRANGER
GROUP: Final = STRANGER + 1
OLD: Final = 10**18 + 123_456_789
LIBC: Final = ctypes.CDLL(None, use_errno=True)
AT_CWD, AT_NOFOLLOW, UTIME_NOW, UTIME_OMIT = -100, 0x100, 0x3FFFFFFF, 0x3FFFFFFE
CLOCK_REALTIME_COARSE: Final = 5
USERS: Final = {"root": (0, 0), "owner": (OWNER, OWNER), "stranger": (OWNER + 7, OWNER + 7)}

DIRECTORIES: Final = {  # mode and owner
    "dir": (0o755, 0),
    "dir/sub": (0o755, 0),
    "full": (0o777, 0),
    "empty": (0o777, OWNER),
    "set": (0o2777, 0),
    "sticky": (0o1777, 0),
    "sticky/sub": (0o777, OWNER),
    "closed": (0o700, 0),
    "fixed": (0o555, OWNER),
}
FILES: Final = {
    "file": (0o644, 0),
    "mine": (0o600, OWNER),
    "all": (0o666, 0),
    "none": (0, OWNER),
    "armed": (0o6777, OWNER),
    "mandatory": (0o2666, OWNER),
    "dir/in": (0o644, 0),
    "full/in": (0o644, OWNER),
    "sticky/root": (0o666, 0),
    "sticky/mine": (0o666, OWNER),
    "closed/in": (0o666, 0),
    "fixed/in": (0o644, OWNER),
}
LINKS: Final = {"link": "file", "dirlink": "full", "dangling": "full/new", "loop": "loop"}
NODES: Final = {
    "fifo": stat.S_IFIFO | 0o666,
    "socket": stat.S_IFSOCK | 0o666,
    "null": stat.S_IFCHR | 0o666,
}
ODD: Final = ("", ".", "..", "dir/.", "dir/..", "file/", "dir/", "link/", "dirlink/", "dangling/")
PATHS: Final = (
    *(*DIRECTORIES, *FILES, *LINKS, *NODES),
    *("twin", "missing", "missing/", "missing/x", "full/new", "empty/new"),
    *("set/new", "sticky/new", "closed/new", "fixed/new", "file/new", "loop/new", "dirlink/in"),
    *(*ODD, "n" * 255, "n" * 256, "full/" + "n" * 256, "full/../" * 600, "p/" * 2047 + "pp"),
)
PAIRED: Final = (
    *("file", "mine", "twin", "dir", "dir/sub", "full", "full/in", "empty", "set", "closed/in"),
    *("sticky/root", "sticky/mine", "sticky/sub", "fixed/in", "link", "dirlink", "dangling"),
    *("loop", "fifo", "null", "missing", "full/new", "empty/new", "sticky/new", "set/new"),
    *("fixed/new", "closed/new", "missing/x", "file/new", "empty/", "file/", "dir/sub/new"),
    *("dir/.", "dirlink/", "dir/..", "n" * 256),
)


def check(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return result


class Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def utimes(path: str, first: int, second: int, flags: int = 0, fd: int = AT_CWD) -> int:
    times = (Timespec * 2)(Timespec(5, first), Timespec(6, second))
    return check(LIBC.utimensat(fd, os.fsencode(path), times, flags))


def rename2(flags: int, old: str, new: str) -> int:
    return check(LIBC.renameat2(AT_CWD, os.fsencode(old), AT_CWD, os.fsencode(new), flags))


def lchmod(path: str) -> int:
    return check(LIBC.syscall(452, AT_CWD, os.fsencode(path), 0o640, AT_NOFOLLOW))  # fchmodat2


@contextmanager
def opened(path: str, flags: int, mode: int = 0o666) -> Iterator[int]:
    fd = os.open(path, flags | os.O_NONBLOCK, mode)
    try:
        yield fd
    finally:
        os.close(fd)


def using(flags: int, use: Callable[[int], Any] = lambda fd: None) -> Callable[[str], Any]:
    """Return a call that opens a path and does something with the descriptor."""

    def call(path: str) -> Any:
        with opened(path, flags) as fd:
            return use(fd)

    return call


def mapped(fd: int) -> None:
    with mmap.mmap(fd, 4) as view:
        view[0:1] = b"M"
    os.fsync(fd)


def unlinked(path: str) -> Any:
    """Use a file whose name is gone: the kernel must not ask for the name again."""
    with opened(path, os.O_RDWR) as fd:
        os.unlink(path)
        os.fchmod(fd, 0o640)
        os.ftruncate(fd, 2)
        os.pwrite(fd, b"more", 1)
        os.utime(fd, ns=(5, 6))
        found = os.fstat(fd)
        return found.st_mode, found.st_nlink, found.st_size, os.pread(fd, 9, 0), found.st_mtime_ns


def in_it(use: Callable[[], Any]) -> Callable[[str], Any]:
    """Return a call that makes a path the current directory first."""

    def call(path: str) -> Any:
        home = os.open(".", os.O_PATH)
        try:
            os.chdir(path)
            return use()
        finally:
            os.fchdir(home)
            os.close(home)

    return call


def scan(path: str) -> Any:
    with os.scandir(path) as entries:
        return sorted((e.name, e.is_dir(follow_symlinks=False), e.is_symlink()) for e in entries)


def touch_through(path: str) -> Any:
    with opened(path, os.O_PATH) as fd:
        os.chmod(f"/proc/self/fd/{fd}", 0o640)
        return os.stat(f"/proc/self/fd/{fd}").st_mode


def times_by(first: int, second: int) -> Callable[[str], Any]:
    return lambda path: utimes(path, first, second)


ONE: Final[dict[str, Callable[[str], Any]]] = {
    "stat": lambda p: os.stat(p).st_mode,
    "lstat": lambda p: os.lstat(p).st_mode,
    **{f"access {m}": partial(lambda m, p: os.access(p, m), m) for m in range(8)},
    "open": using(os.O_RDONLY),
    "open for writing": using(os.O_WRONLY),
    "open for both": using(os.O_RDWR),
    "open nothing": using(3),
    "open the path": using(os.O_PATH, lambda fd: os.fstat(fd).st_mode),
    "open the link": using(os.O_PATH | os.O_NOFOLLOW, lambda fd: os.fstat(fd).st_mode),
    "open no link": using(os.O_NOFOLLOW),
    "open a directory": using(os.O_DIRECTORY),
    "open and cut": using(os.O_WRONLY | os.O_TRUNC),
    "open for reading and cut": using(os.O_RDONLY | os.O_TRUNC),
    "open without atime": using(os.O_RDONLY | os.O_NOATIME),
    "make": using(os.O_WRONLY | os.O_CREAT),
    "make or cut": using(os.O_RDWR | os.O_CREAT | os.O_TRUNC),
    "make new": using(os.O_RDWR | os.O_CREAT | os.O_EXCL),
    "make no link": using(os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW),
    "make a directory by open": using(os.O_CREAT | os.O_DIRECTORY),
    "make direct": using(os.O_RDWR | os.O_CREAT | os.O_DIRECT),
    "read": using(os.O_RDONLY, lambda fd: os.read(fd, 9)),
    "read nothing": using(os.O_RDONLY, lambda fd: os.read(fd, 0)),
    "read behind": using(os.O_RDONLY, lambda fd: os.pread(fd, 9, 99)),
    "write": using(os.O_WRONLY, lambda fd: os.write(fd, b"w")),
    "write nothing": using(os.O_WRONLY, lambda fd: os.write(fd, b"")),
    "write behind": using(os.O_WRONLY, lambda fd: os.pwrite(fd, b"w", 5000)),
    "append": using(os.O_WRONLY | os.O_APPEND, lambda fd: os.write(fd, b"w")),
    "map and store": using(os.O_RDWR, mapped),
    "ftruncate": using(os.O_RDWR, lambda fd: os.ftruncate(fd, 2)),
    "ftruncate in vain": using(os.O_RDWR, lambda fd: os.ftruncate(fd, 4)),
    "ftruncate up": using(os.O_RDWR, lambda fd: os.ftruncate(fd, 5000)),
    "ftruncate unwritable": using(os.O_RDONLY, lambda fd: os.ftruncate(fd, 2)),
    "fchmod": using(os.O_RDONLY, lambda fd: os.fchmod(fd, 0o2640)),
    "fchown": using(os.O_RDONLY, lambda fd: os.fchown(fd, -1, GROUP)),
    "fchmod a path": using(os.O_PATH, lambda fd: os.fchmod(fd, 0o640)),
    "futimens": using(os.O_RDONLY, lambda fd: os.utime(fd, ns=(5, 6))),
    "futimens now": using(os.O_RDONLY, lambda fd: os.utime(fd)),
    "fsync": using(os.O_RDONLY, os.fsync),
    "lock": using(os.O_RDWR, lambda fd: os.lockf(fd, os.F_TLOCK, 0)),
    "use unlinked": unlinked,
    "through proc": touch_through,
    "chdir": in_it(lambda: None),
    "look around": in_it(lambda: (sorted(os.listdir()), os.stat("..").st_nlink)),
    "make inside": in_it(lambda: os.mkdir("inside")),
    "list": scan,
    "truncate": lambda p: os.truncate(p, 2),
    "truncate in vain": lambda p: os.truncate(p, 4),
    "truncate up": lambda p: os.truncate(p, 5000),
    "truncate below zero": lambda p: os.truncate(p, -1),
    **{
        f"chmod {bits:o}": partial(lambda bits, p: os.chmod(p, bits), bits)
        for bits in (0, 0o640, 0o1755, 0o2755, 0o2745, 0o4711, 0o7777)
    },
    "lchmod": lchmod,
    **{
        f"{how.__name__} {uid} {gid}": partial(lambda h, u, g, p: h(p, u, g), how, uid, gid)
        for how in (os.chown, os.lchown)
        for uid in (-1, 0, OWNER)
        for gid in (-1, OWNER, GROUP)
    },
    "utime": lambda p: os.utime(p, ns=(5, 6)),
    "lutime": lambda p: os.utime(p, ns=(5, 6), follow_symlinks=False),
    "touch": lambda p: os.utime(p),
    "utime now, now": times_by(UTIME_NOW, UTIME_NOW),
    "utime now, omit": times_by(UTIME_NOW, UTIME_OMIT),
    "utime omit, now": times_by(UTIME_OMIT, UTIME_NOW),
    "utime omit, omit": times_by(UTIME_OMIT, UTIME_OMIT),
    "utime set, now": times_by(1, UTIME_NOW),
    "utime now, set": times_by(UTIME_NOW, 1),
    "utime set, omit": times_by(1, UTIME_OMIT),
    "utime omit, set": times_by(UTIME_OMIT, 1),
    "utime senseless": times_by(10**9, 1),
    "mkdir": lambda p: os.mkdir(p, 0o2757),
    "rmdir": os.rmdir,
    "unlink": os.unlink,
    "mkfifo": lambda p: os.mkfifo(p, 0o6757),
    "mknod file": lambda p: os.mknod(p, stat.S_IFREG | 0o6757),
    "mknod socket": lambda p: os.mknod(p, stat.S_IFSOCK | 0o757),
    "mknod device": lambda p: os.mknod(p, stat.S_IFBLK | 0o757, 0x0103),
    "mknod directory": lambda p: os.mknod(p, stat.S_IFDIR | 0o757),
    "symlink": lambda p: os.symlink("file", p),
    "symlink to nothing": lambda p: os.symlink("", p),
    "readlink": os.readlink,
    "setxattr": lambda p: os.setxattr(p, "user.a", b"b"),
    "lsetxattr": lambda p: os.setxattr(p, "user.a", b"b", follow_symlinks=False),
    "setxattr trusted": lambda p: os.setxattr(p, "trusted.a", b"b"),
    "setxattr in vain": lambda p: os.setxattr(p, "user.a", b"b", os.XATTR_REPLACE),
    "getxattr": lambda p: os.getxattr(p, "user.kept"),
    "listxattr": lambda p: sorted(os.listxattr(p)),
    "removexattr": lambda p: os.removexattr(p, "user.kept"),
    "statvfs": lambda p: os.statvfs(p).f_namemax,
    "execute": lambda p: os.access(p, os.X_OK, effective_ids=True),
}
TWO: Final[dict[str, Callable[[str, str], Any]]] = {
    "rename": os.rename,
    "rename to a new name": partial(rename2, 1),
    "exchange": partial(rename2, 2),
    "link": lambda a, b: os.link(a, b, follow_symlinks=False),
    "link what is linked to": lambda a, b: check(
        LIBC.linkat(AT_CWD, os.fsencode(a), AT_CWD, os.fsencode(b), 0x400)
    ),
}


def clear(changed: set[str]) -> None:
    """Remove what goes by the names."""
    for name in changed - {"."}:
        if os.path.isdir(name) and not os.path.islink(name):
            shutil.rmtree(name)
        elif os.path.lexists(name):
            os.unlink(name)
    for attribute in os.listxattr("."):
        os.removexattr(".", attribute)


def build(changed: set[str]) -> None:
    """Make what belongs below the changed names of the tree, all of it old."""

    def below(tree: Iterable[str]) -> Iterator[str]:
        return (path for path in tree if path.partition("/")[0] in changed)

    for path in below(DIRECTORIES):
        os.mkdir(path)
    for path in below(FILES):
        Path(path).write_bytes(b"text")
        os.setxattr(path, "user.kept", b"kept")
    for path in below(LINKS):
        os.symlink(LINKS[path], path)
    for path in below(NODES):
        os.mknod(path, NODES[path], os.makedev(1, 3))
    if "twin" in changed:
        os.link("file", "twin")
    owned = {**FILES, **DIRECTORIES}
    for path in below(owned):
        mode, owner = owned[path]
        os.chown(path, owner, owner)
        os.chmod(path, mode)
    os.chown(".", 0, 0)
    os.chmod(".", 0o777)
    for path in (*below((*owned, *LINKS, *NODES)), "."):
        os.utime(path, ns=(OLD, OLD), follow_symlinks=False)


class Fact(NamedTuple):
    """What is known of a path: what stat tells, the times, and what is in it."""

    ino: int
    told: tuple[int, ...]
    times: tuple[int, int, int]
    inside: tuple[Any, ...]


Facts = dict[str, Fact]
Case = tuple[str, tuple[str, ...]]


def facts(known: Facts, path: str = ".") -> Facts:
    """Return what is known of everything below a path; only what has changed is looked into."""
    found = os.lstat(path)
    kind = stat.S_IFMT(found.st_mode)
    sized = found.st_size if kind in (stat.S_IFREG, stat.S_IFLNK) else 0
    told = (found.st_mode, found.st_nlink, found.st_uid, found.st_gid, sized, found.st_rdev)
    # looking changes the time of access of a directory: O_NOATIME is not passed on for those
    atime = 0 if kind == stat.S_IFDIR else found.st_atime_ns
    fact = Fact(found.st_ino, told, (atime, found.st_mtime_ns, found.st_ctime_ns), ())
    last = known.get(path)
    if last is not None and last[:3] == fact[:3]:
        fact = last
    elif kind == stat.S_IFREG:
        with opened(path, os.O_RDONLY | os.O_NOATIME) as fd:
            fact = fact._replace(inside=(os.pread(fd, 9, 0), *sorted(os.listxattr(fd))))
    elif kind == stat.S_IFDIR:
        fact = fact._replace(inside=(os.listdir(path), *sorted(os.listxattr(path))))
    everything = {path: fact}
    if kind == stat.S_IFDIR:
        for name in fact.inside[0]:
            everything |= facts(known, f"{path}/{name}")
    return everything


def wait_for_tick(before: Facts) -> None:
    """Return when every change from now on bears a later time than any that was made before."""
    newest = max(max(fact.times) for fact in before.values())
    while time.clock_gettime_ns(CLOCK_REALTIME_COARSE) <= newest:
        pass


def moved(before: Facts, after: Facts) -> dict[str, Any]:
    """Return what is new or different, with the times told as "now", "kept" or a number."""
    old = {fact.ino: fact.times for fact in before.values()}
    start = max(max(times) for times in old.values())
    found: dict[str, Any] = dict.fromkeys(before.keys() - after.keys(), "gone")
    for path, fact in after.items():
        if before.get(path) == fact:
            continue
        earlier = old.get(fact.ino, (0, 0, 0))
        marks = tuple(
            "kept" if now == was else "now" if now > start else now
            for now, was in zip(fact.times, earlier, strict=True)
        )
        inside = fact.inside
        if stat.S_ISDIR(fact.told[0]):
            inside = (sorted(inside[0]), *inside[1:])
        found[path] = fact.told, marks, inside
    return found


@contextmanager
def acting_as(uid: int, gid: int) -> Iterator[None]:
    os.setgroups([GROUP] if uid == OWNER else [])
    os.setresgid(gid, gid, 0)
    os.setresuid(uid, uid, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)


def answers(root: Path, user: str, cases: list[Case]) -> list[Any]:
    """Run cases in a tree that is made anew after each that has changed it."""
    calls: dict[str, Callable[..., Any]] = {**ONE, **TWO}
    os.chdir(root)
    os.umask(0o027)
    changed = {path.partition("/")[0] for path in (*DIRECTORIES, *FILES, *LINKS, *NODES, "twin")}
    before: Facts = {}
    found: list[Any] = []
    for name, paths in cases:
        if changed:
            clear(changed)
            build(changed)
            before = facts(before)
            wait_for_tick(before)
        with acting_as(*USERS[user]):
            try:
                result = calls[name](*paths)
            except OSError as exc:
                result = errno.errorcode[exc.errno or 0]
        changes = moved(before, facts(before))
        found.append((result, changes))
        changed = {path.split("/")[1] if path != "." else path for path in changes}
        if changed & {"file", "twin"}:
            changed |= {"file", "twin"}
    return found


@pytest.fixture(scope="module")
def ext4() -> Iterator[Path]:
    with ext4_loop("64M") as path:
        yield path


ALL: Final[dict[str, list[Case]]] = {
    "one path": [(name, (path,)) for name in ONE for path in PATHS],
    "two paths": [(name, pair) for name in TWO for pair in itertools.product(PAIRED, PAIRED)],
}


def is_known_difference(name: str, paths: tuple[str, ...], one: Any, other: Any) -> bool:
    """Tell whether docs/posix.md names the reason for a difference."""
    if name == "read behind":  # nothing to read: the server is not asked
        return bool(one[0] == other[0] == b"" and one[1].items() <= other[1].items())
    if name == "map and store":  # written back without a word who has stored
        return paths[0] in ("armed", "mandatory") and {*one[1]} == {*other[1]}
    # to take set-group-ID away is an attempt to change the mode there, and nothing here
    return name in ("chown -1 -1", "lchown -1 -1") and paths == ("mandatory",)


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_a_call_does_to_every_path_what_it_does_on_ext4(
    here: Path, ext4: Path, kind: str, user: str, step: int
) -> None:
    cases = ALL[kind][list(USERS).index(user) :: step]
    found = []
    for place in (here, Path(mkdtemp(dir=ext4))):
        root = place / "home/root"
        root.mkdir(parents=True)
        for path in (place, root.parent):
            path.chmod(0o777)
        found.append(as_user(partial(answers, root, user, cases), 0))
    different = [
        f"{name} {' '.join(path[-20:] for path in paths)}:\n  {one}\n  ext4: {other}"
        for (name, paths), one, other in zip(cases, *found, strict=True)
        if one != other and not is_known_difference(name, paths, one, other)
    ]
    shown = "\n".join(different[:40])
    assert not different, f"{len(different)} of {len(cases)} calls differ:\n{shown}"
