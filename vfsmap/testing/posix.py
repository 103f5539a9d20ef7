"""How tests speak about system calls: what is refused, and what another user sees."""

import errno
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, TypeVar

T = TypeVar("T")
STRANGER: Final = 1234
"""A user and a group that own nothing."""


@contextmanager
def refused(*numbers: int) -> Iterator[None]:
    """Expect the block to fail with an OSError of one of these errnos."""
    wanted = " or ".join(errno.errorcode[number] for number in numbers)
    try:
        yield
    except OSError as exc:
        if exc.errno not in numbers:
            raise AssertionError(f"{exc.strerror} instead of {wanted}") from exc
    else:
        raise AssertionError(f"it worked instead of being refused with {wanted}")


def as_user(
    action: Callable[[], T],
    uid: int = STRANGER,
    gid: int | None = None,
    groups: Sequence[int] = (),
) -> T:
    """Run ``action`` in a child process as another user; return or raise what it does."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        with os.fdopen(writer, "wb") as pipe:
            pickle.dump(_outcome(action, uid, uid if gid is None else gid, groups), pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        raw = pipe.read()
    os.waitpid(child, 0)
    result, failure = pickle.loads(raw)
    if failure is not None:
        raise failure
    return result  # type: ignore[no-any-return]  # it was pickled


def _outcome(
    action: Callable[[], T], uid: int, gid: int, groups: Sequence[int]
) -> tuple[T | None, BaseException | None]:
    try:
        os.setgroups(list(groups))
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        return action(), None
    except BaseException as exc:
        return None, exc


def in_child(action: Callable[[], object]) -> tuple[int, bytes]:
    """Run something in a fork; return how that ended, and what it returned."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.write(writer, repr(action()).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said
