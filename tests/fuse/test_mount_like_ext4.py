"""The mount beside ext4: thousands of random system calls, and every answer the same.

A call's answer is its result or its errno.  After a sequence both trees are compared, too: names,
modes, owners, links, sizes, contents and attributes.
"""

import errno
import os
import random
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from vfsmap.testing.media import ext4_loop
from vfsmap.testing.posix import STRANGER, as_user

NAMES = ("a", "b", "c")
ODD = (".", "..", "", "a/", "x" * 256, "a/../b", "b/.", "missing/a")
FLAGS = (
    os.O_CREAT,
    os.O_EXCL,
    os.O_TRUNC,
    os.O_APPEND,
    os.O_NOFOLLOW,
    os.O_DIRECTORY,
    os.O_SYNC,
)
MODES = (0, 0o444, 0o600, 0o755, 0o777, 0o1777, 0o2755, 0o2777, 0o4711, 0o6777)
XATTRS = ("user.a", "user.b", "trusted.a", "user.", "nonsense")
NULL, ZERO = os.makedev(1, 3), os.makedev(1, 5)
Call = tuple[Callable[..., Any], tuple[Any, ...]]


def use_file(path: str, flags: int, mode: int, at: int, data: bytes) -> Any:
    fd = os.open(path, flags, mode)
    try:
        if flags & os.O_ACCMODE == os.O_RDONLY:
            return os.pread(fd, 100, at) if stat.S_ISREG(os.fstat(fd).st_mode) else None
        return os.pwrite(fd, data, at), os.fstat(fd).st_size
    finally:
        os.close(fd)


def describe(path: str) -> Any:
    found = os.lstat(path)
    sized = stat.S_ISREG(found.st_mode) or stat.S_ISLNK(found.st_mode)
    size = found.st_size if sized else 0
    return found.st_mode, found.st_nlink, found.st_uid, found.st_gid, size, found.st_rdev


def kinds(path: str) -> Any:
    with os.scandir(path) as entries:
        return sorted((e.name, e.is_dir(follow_symlinks=False), e.is_symlink()) for e in entries)


def calls(chance: random.Random, count: int) -> Iterator[Call]:
    def path() -> str:
        if chance.random() < 0.06:
            return chance.choice(ODD)
        return "/".join(chance.choice(NAMES) for _ in range(chance.choice((1, 1, 2, 2, 3))))

    def owner() -> int:
        return chance.choice((-1, 0, STRANGER, STRANGER + 1))

    def flags() -> int:
        chosen = os.O_NONBLOCK | chance.choice((os.O_RDONLY, os.O_WRONLY, os.O_RDWR))
        for flag in FLAGS:
            chosen |= flag if chance.random() < (0.5 if flag == os.O_CREAT else 0.15) else 0
        return chosen

    def make() -> Call:
        kind = chance.choice((stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR))
        # no devices but those whose bytes nobody misses
        return os.mknod, (path(), kind | chance.choice(MODES), chance.choice((NULL, ZERO)))

    makers: list[tuple[int, Callable[[], Call]]] = [
        (9, lambda: (os.mkdir, (path(), chance.choice(MODES)))),
        (3, lambda: (os.rmdir, (path(),))),
        (5, lambda: (os.unlink, (path(),))),
        (8, lambda: (os.rename, (path(), path()))),
        (4, lambda: (os.link, (path(), path()))),
        (3, lambda: (os.symlink, (path(), path()))),
        (2, lambda: (os.readlink, (path(),))),
        (3, make),
        (
            12,
            lambda: (
                use_file,
                (path(), flags(), chance.choice(MODES), chance.randrange(9000), b"data" * 9),
            ),
        ),
        (3, lambda: (os.truncate, (path(), chance.choice((0, 1, 5000, 100_000))))),
        (5, lambda: (os.chmod, (path(), chance.choice(MODES)))),
        (4, lambda: (os.lchown, (path(), owner(), owner()))),
        (3, lambda: (os.chown, (path(), owner(), owner()))),
        (6, lambda: (describe, (path(),))),
        (4, lambda: (kinds, (path(),))),
        (2, lambda: (os.access, (path(), chance.randrange(8)))),
        (3, lambda: (os.setxattr, (path(), chance.choice(XATTRS), b"v", chance.randrange(3)))),
        (2, lambda: (os.getxattr, (path(), chance.choice(XATTRS)))),
        (2, lambda: (os.removexattr, (path(), chance.choice(XATTRS)))),
        (1, lambda: (os.utime, (path(), (5, 6)))),
    ]
    weights = [weight for weight, _ in makers]
    for _, maker in chance.choices(makers, weights, k=count):
        yield maker()


def answers(root: Path, sequence: list[Call]) -> list[Any]:
    os.chdir(root)
    os.umask(0o022)
    found: list[Any] = []
    for call, arguments in sequence:
        try:
            found.append(call(*arguments))
        except OSError as exc:
            found.append(errno.errorcode[exc.errno or 0])
    return found


def tree(root: Path) -> dict[str, Any]:
    found = {}
    for path in sorted(root.rglob("*")):
        facts = describe(str(path))
        found[str(path.relative_to(root))] = (
            facts,
            path.read_bytes() if stat.S_ISREG(facts[0]) else None,
            os.readlink(path) if stat.S_ISLNK(facts[0]) else None,
            sorted(os.listxattr(path, follow_symlinks=False)),
        )
    return found


@pytest.fixture(scope="module")
def ext4() -> Iterator[Path]:
    with ext4_loop("64M") as path:
        yield path


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("uid", [0, STRANGER])
def test_random_calls_are_answered_as_ext4_answers_them(
    here: Path, ext4: Path, uid: int, seed: int
) -> None:
    sequence = list(calls(random.Random(seed), 2500))
    roots = here / "home/root", ext4 / f"{uid}-{seed}/home/root"
    for root in roots:
        root.mkdir(parents=True)
        root.chmod(0o777)
        root.parent.chmod(0o777)
    mine, theirs = (
        as_user(partial(answers, root, sequence), uid, groups=[STRANGER + 1]) for root in roots
    )
    for number, (call, one, other) in enumerate(zip(sequence, mine, theirs, strict=True)):
        assert one == other, f"call {number}, {call[0].__name__}{call[1]}: {one}, ext4: {other}"
    assert tree(roots[0]) == tree(roots[1])
