import os
import random
import select
import threading
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from vfsmap.daemon import closer
from vfsmap.daemon.closer import Closer

HANGS, STRANGER, GOOD = 10, 20, 30


class Hanging(NamedTuple):
    """A descriptor whose close(2) waits, as that of a file whose server never answers."""

    fd: int
    entered: threading.Event
    leave: threading.Event


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Hanging:
    entered, leave = threading.Event(), threading.Event()
    real = os.closerange
    victim = os.open("/dev/null", os.O_RDONLY)

    def close_range(low: int, high: int) -> None:
        if low <= victim < high:
            entered.set()
            leave.wait()
        real(low, high)

    monkeypatch.setattr(os, "closerange", close_range)
    return Hanging(victim, entered, leave)


def wait_for_end(reader: int) -> None:
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_a_descriptor_is_closed_soon() -> None:
    reader, writer = os.pipe()
    Closer().close(GOOD, [writer])
    wait_for_end(reader)


def test_of_many_descriptors_those_are_closed_and_no_others() -> None:
    opened = [os.open("/dev/null", os.O_RDONLY) for _ in range(200)]
    reader, writer = os.pipe()
    chosen = random.Random(1).sample(opened, 150)
    Closer().close(GOOD, [*chosen, writer])
    wait_for_end(reader)
    gone = set(chosen)
    assert not any(is_open(fd) for fd in gone)  # the writer was the last of all
    for fd in set(opened) - gone:
        os.close(fd)


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_many_descriptors_are_all_closed() -> None:
    pipes = [os.pipe() for _ in range(50)]
    one = Closer()
    one.close(GOOD, [writer for _, writer in pipes])
    for reader, _ in pipes:
        wait_for_end(reader)
    reader, writer = os.pipe()  # the thread has gone to sleep meanwhile, or not
    one.close(GOOD, [writer])
    wait_for_end(reader)


def test_one_that_hangs_keeps_only_its_own_sender_waiting(
    hanging: Hanging, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Closer()
    one.close(HANGS, [hanging.fd])
    assert hanging.entered.wait(10)
    reader, writer = os.pipe()
    one.close(GOOD, [writer])
    wait_for_end(reader)
    assert not one.is_choked(HANGS)
    monkeypatch.setattr(closer, "BACKLOG_MAX", 2)
    pipes = [os.pipe() for _ in range(2)]
    one.close(HANGS, [writer for _, writer in pipes])
    assert one.is_choked(HANGS)
    assert not one.is_choked(GOOD)
    monkeypatch.setattr(closer, "THREADS_MAX", 2)
    assert one.is_choked(STRANGER)  # two threads are there: a third user has to wait
    hanging.leave.set()
    for reader, _ in pipes:
        wait_for_end(reader)


def test_an_idle_thread_ends_and_another_takes_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closer, "_LINGER", 0.001)
    monkeypatch.setattr(closer, "_IDLE_TURNS", 1)
    one = Closer()
    for _ in range(3):
        before = threading.enumerate()
        reader, writer = os.pipe()
        one.close(GOOD, [writer])
        wait_for_end(reader)
        for thread in set(threading.enumerate()) - set(before):
            thread.join()


def test_what_close_complains_about_is_the_senders_business() -> None:
    reader, writer = os.pipe()
    spare = os.dup(writer)
    os.close(spare)
    Closer().close(GOOD, [spare, writer])
    wait_for_end(reader)


def test_a_descriptor_that_comes_alone_is_closed_before_any_pause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    goes_on = threading.Event()
    monkeypatch.setattr(closer, "time", SimpleNamespace(sleep=lambda _: goes_on.wait()))
    reader, writer = os.pipe()
    Closer().close(0, [writer])
    try:
        assert select.select([reader], [], [], 30)[0]
        assert os.read(reader, 1) == b""
    finally:
        goes_on.set()
        os.close(reader)
