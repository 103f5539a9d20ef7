"""Waiting for requests awake: who is woken, when, and who else gets a turn."""

import os
import socket
from collections.abc import Iterator

import pyfuse3
import pytest
import trio
import trio.testing

from vfsmap.testing.waiting import WHENEVER, wait_until, wake_up_limit
from vfsmap_fuse.poll import LatencyRequest, Turnstile, Watch, busy_polling

needs_root = pytest.mark.skipif(
    not os.access(LatencyRequest.DEVICE, os.R_OK | os.W_OK),
    reason="this user may make no latency request",
)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


async def test_a_wait_ends_when_the_descriptor_is_readable_awake_and_asleep(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    watch = Watch(ours.fileno())
    for _ in range(100):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch.readable)
            theirs.send(b"x")
        assert ours.recv(1) == b"x"
    watch.forget()


async def test_while_requests_keep_coming_other_tasks_have_their_turns(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    theirs.send(b"x")  # nobody reads it, so there always is a request
    watch = Watch(ours.fileno())
    turns = 0

    async def other() -> None:
        nonlocal turns
        for _ in range(5):
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        while turns < 5:
            await watch.readable()
    watch.forget()


async def test_who_is_woken_by_io_has_its_turn_before_a_wait_polls_on(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    watch = Watch(pair[0].fileno())
    ours, theirs = socket.socketpair()
    woken = False

    async def other() -> None:
        nonlocal woken
        await trio.lowlevel.wait_readable(ours)
        woken = True

    with ours, theirs:
        theirs.send(b"x")
        for _ in range(30):  # trio shuffles those who run in the same turn
            woken = False
            async with trio.open_nursery() as nursery:
                nursery.start_soon(other)
                await trio.lowlevel.checkpoint()
                await watch._give_way()
                assert woken
    watch.forget()


async def test_a_wait_can_be_cancelled(pair: tuple[socket.socket, socket.socket]) -> None:
    watch = Watch(pair[0].fileno())
    with trio.move_on_after(0):
        await watch.readable()
        pytest.fail("nothing was readable")
    watch.forget()


async def test_closing_ends_the_wait_under_way_and_every_later_one(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    watch = Watch(pair[0].fileno())

    async def wait() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await watch.readable()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        watch.close()
    await wait()
    watch.forget()


async def test_only_one_at_a_time_passes_the_turnstile_and_none_is_forgotten() -> None:
    turnstile = Turnstile()
    inside = passed = 0

    async def pass_through() -> None:
        nonlocal inside, passed
        for _ in range(20):
            async with turnstile:
                inside += 1
                assert inside == 1
                await trio.lowlevel.checkpoint()
                inside -= 1
                passed += 1

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(pass_through)
    assert passed == 100


async def test_a_free_turnstile_is_passed_without_giving_way() -> None:
    turnstile = Turnstile()
    turns = 0

    async def other() -> None:
        nonlocal turns
        turns += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        async with turnstile:
            assert turns == 0


@needs_root
def test_the_kernel_knows_of_a_latency_request_until_it_is_withdrawn_or_closed() -> None:
    request = LatencyRequest()
    assert (request.can_be_made, request.made) == (True, False)
    for end in (request.withdraw, request.close):
        request.make()
        assert (request.can_be_made, request.made) == (False, True)
        assert wake_up_limit() == 0
        end()
        assert not request.made
        wait_until(lambda: wake_up_limit() == WHENEVER)  # others may have requests now and then
    assert not request.can_be_made
    request.close()


def test_without_permission_no_latency_request_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LatencyRequest, "DEVICE", "/dev/none")
    request = LatencyRequest()
    assert (request.can_be_made, request.made) == (False, False)
    request.close()


@needs_root
async def test_processors_wake_at_once_from_quick_requests_until_a_while_after_the_last(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    watch = Watch(ours.fileno())
    theirs.send(b"x")  # nobody reads it, so there always is a request
    assert not watch._latency.made
    with trio.fail_after(60):
        while not watch._latency.made:
            await watch.readable()
    assert wake_up_limit() == 0
    ours.recv(1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.readable)
        with trio.fail_after(60):
            while watch._latency.made:
                await trio.lowlevel.checkpoint()
        theirs.send(b"x")
    watch.forget()


@needs_root
async def test_after_a_trickle_of_requests_processors_sleep_as_soon_as_the_server_does(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    watch = Watch(ours.fileno())
    theirs.send(b"x")
    with trio.fail_after(60):
        while not watch._latency.made:
            await watch.readable()
    ours.recv(1)
    watch._past = 0  # the last pauses were long, though each was shorter than it lingers
    watch._expected[0] = False
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.readable)
        await trio.testing.wait_all_tasks_blocked()
        assert not watch._latency.made
        theirs.send(b"x")
    watch.forget()


def test_the_stand_in_goes_when_the_block_ends() -> None:
    with busy_polling():
        stand_in = vars(pyfuse3)["trio"]
        assert (stand_in is trio) == (len(os.sched_getaffinity(0)) < 2)
        assert stand_in.open_nursery is trio.open_nursery
        assert stand_in.lowlevel.current_task is trio.lowlevel.current_task
    assert vars(pyfuse3)["trio"] is trio
