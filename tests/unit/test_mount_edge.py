"""What the kernel is told when a handler fails."""

import errno
import logging
from types import SimpleNamespace
from typing import cast

import pyfuse3
import pytest

from vfsmap.errors import MediumError, NoSpace, NotFound, ReadOnly, VfsmapError
from vfsmap.fs import FileSystem
from vfsmap.tally import Tallies
from vfsmap_fuse.edge import answered, answered_later


class Pool:
    """Remembers why it turned read-only."""

    def __init__(self) -> None:
        self.failed: VfsmapError | None = None
        self.journal = SimpleNamespace(doubts=0)

    def fail(self, reason: VfsmapError) -> None:
        self.failed = reason


class Handlers:
    """Two handlers that do what they are told."""

    def __init__(self, failure: Exception | None) -> None:
        self._failure = failure
        self.changes = 0
        self.pool = Pool()
        self.fs = cast("FileSystem", self)
        self.tallies = Tallies()

    @answered
    def now(self, number: int) -> int:
        return self._do(number)

    @answered_later
    async def later(self, number: int) -> int:
        return self._do(number)

    def _do(self, number: int) -> int:
        self.pool.journal.doubts += self.changes
        if self._failure:
            raise self._failure
        return number + 1


@pytest.mark.parametrize("handler", ["now", "later"])
async def test_a_result_is_passed_on(handler: str) -> None:
    assert await getattr(Handlers(None), handler)(41) == 42


@pytest.mark.parametrize("handler", ["now", "later"])
@pytest.mark.parametrize(
    ("failure", "number"),
    [
        (NotFound("x"), errno.ENOENT),
        (NoSpace("x"), errno.ENOSPC),
        (ReadOnly("x"), errno.EROFS),
        (MediumError("x"), errno.EIO),
        (pyfuse3.FUSEError(errno.ENOSYS), errno.ENOSYS),
        (MemoryError(), errno.ENOMEM),
        (OSError(errno.EMFILE, "x"), errno.EMFILE),
        (OSError(errno.ENFILE, "x"), errno.ENFILE),
    ],
)
async def test_an_error_of_ours_or_a_shortage_becomes_its_errno_and_nothing_else_happens(
    handler: str, failure: Exception, number: int
) -> None:
    handlers = Handlers(failure)
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await getattr(handlers, handler)(1)
    assert caught.value.errno == number
    assert handlers.pool.failed is None


@pytest.mark.parametrize("handler", ["now", "later"])
async def test_a_bug_is_logged_answered_with_eio_and_turns_the_pool_read_only(
    handler: str, caplog: pytest.LogCaptureFixture
) -> None:
    handlers = Handlers(ZeroDivisionError("sabotage"))
    with caplog.at_level(logging.ERROR), pytest.raises(pyfuse3.FUSEError) as caught:
        await getattr(handlers, handler)(1)
    assert caught.value.errno == errno.EIO
    assert isinstance(handlers.pool.failed, ReadOnly)
    assert "sabotage" in str(handlers.pool.failed)
    (record,) = caplog.records
    assert record.exc_info is not None
    assert f"{handler} failed on a bug of vfsmap" in record.getMessage()


@pytest.mark.parametrize("handler", ["now", "later"])
async def test_a_shortage_once_the_pool_has_changed_turns_it_read_only(handler: str) -> None:
    handlers = Handlers(MemoryError())
    handlers.changes = 1
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await getattr(handlers, handler)(1)
    assert caught.value.errno == errno.EIO
    assert isinstance(handlers.pool.failed, ReadOnly)


@pytest.mark.parametrize("handler", ["now", "later"])
async def test_each_request_is_counted_under_its_name_and_failures_as_errors(handler: str) -> None:
    good, bad = Handlers(None), Handlers(NotFound("x"))
    for _ in range(3):
        await getattr(good, handler)(41)
    with pytest.raises(pyfuse3.FUSEError):
        await getattr(bad, handler)(41)
    assert list(good.tallies) == list(bad.tallies) == [handler]
    assert (good.tallies[handler].count, good.tallies[handler].errors) == (3, 0)
    assert (bad.tallies[handler].count, bad.tallies[handler].errors) == (1, 1)
    assert good.tallies[handler].time_ns > 0
