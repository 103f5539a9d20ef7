"""Waiting for the kernel's requests awake: a stand-in for ``trio`` in pyfuse3's namespace.

pyfuse3 looks ``trio`` up in its own module whenever it waits (its asyncio support replaces the
name there).  Two things cost it most of a small request's time: each wait passes through trio's
scheduler several times, and the server falls asleep between two requests of a busy client.  The
stand-in's lock does not pass through the scheduler while nobody waits for it, and its
``wait_readable`` polls the session's descriptor for some 200 us before it goes to sleep.

A wait that polls also watches the descriptor that trio itself sleeps on, and gives way at once
when another task's I/O is ready, and every millisecond in any case.

It polls only when the next request can be expected soon, and learns when that is as a processor
learns branches: from what came after the same sequence of short and long pauses last time.  (A
client that writes large pieces is soon back after each answer to its question for an attribute,
but long away while it copies the bytes.)  So an idle mount costs nothing.

The client has to be woken too.  Where that is permitted, which is to root, the kernel is asked to
keep idle processors out of the states that they take long to leave, from some requests in quick
succession until a short while after the last.  In a virtual machine that is most of a small
request's time: without it the client's processor is given back to the host at each request.
"""

import logging
import os
import select
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pyfuse3
import trio

log = logging.getLogger("vfsmap.fuse")
SPIN_NS: Final = 200_000
"""How long a wait stays awake.  In a quiet virtual machine a client's processor has to be woken
first.  Medians of 15 alternating rounds of create+close there: 3,276 a second with 40 us, 3,723
with 100 us, 4,303 with 200 us; rounds of one setting differed by a factor of two, a repeat gave
3,823 for 200 us, and the published benchmark shows no gain for creating files."""
BUSY_NS: Final = 400_000
"""A pause is short when it is shorter than this, falling asleep and waking up included."""
_PAST: Final = 0b111
"""How many pauses are looked back on, one bit for each, set when it was short."""
TURN_NS: Final = 1_000_000
"""How long the other tasks of the loop wait at most while requests keep coming."""
LINGER: Final = 0.01
"""Seconds after the last request until processors may sleep as deep as they like again."""


class Turnstile:
    """A lock that costs no trip through the scheduler while it is free.

    Whoever comes first gets it, so a worker that never blocks keeps it; one waiter at a time is
    called, and finds out when it runs whether the lock is still free.
    """

    def __init__(self) -> None:
        self._held = False
        self._called = False  # true from the moment a waiter is called until it runs
        self._waiters = trio.lowlevel.ParkingLot()

    async def __aenter__(self) -> None:
        while self._held:
            await self._waiters.park()
            self._called = False
        self._held = True

    async def __aexit__(self, *_: object) -> None:
        self._held = False
        if not self._called and self._waiters:
            self._called = True
            self._waiters.unpark()


class LatencyRequest:
    """A request to the kernel that idle processors wake without delay.

    The CPU latency interface of the kernel's PM QoS (Documentation/power/pm_qos_interface.rst):
    the request is a signed 32-bit number of microseconds, written to a device that is held open.
    It ends with the descriptor, and so with the process, however that ends.
    """

    DEVICE: Final = "/dev/cpu_dma_latency"
    _AT_ONCE: Final = struct.pack("=i", 0)
    _WHENEVER: Final = struct.pack("=i", 2_000_000_000)  # PM_QOS_CPU_LATENCY_DEFAULT_VALUE

    def __init__(self) -> None:
        self.made = False
        self.can_be_made = False
        """Whether the request is permitted, and not made yet."""
        try:
            self._fd = os.open(self.DEVICE, os.O_WRONLY)
        except OSError as exc:
            log.debug("processors that are idle wake when they do: %s", exc)
        else:
            self.can_be_made = True

    def make(self) -> None:
        """Make the request."""
        os.write(self._fd, self._AT_ONCE)
        self.made, self.can_be_made = True, False

    def withdraw(self) -> None:
        """Let processors sleep as they like."""
        os.write(self._fd, self._WHENEVER)
        self.made, self.can_be_made = False, True

    def close(self) -> None:
        """Withdraw it for good."""
        if self.made or self.can_be_made:
            os.close(self._fd)
        self.made = self.can_be_made = False


class Watch:
    """Waits until one descriptor is readable, first awake, then asleep."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._latency = LatencyRequest()
        self._epoll = select.epoll()
        self._epoll.register(fd, select.EPOLLIN)
        self._others_watched = False
        self._past = 0
        self._expected = [False] * (_PAST + 1)  # is the pause after such a past short?
        self._closing = False
        self._turn = 0  # when the other tasks last had their turn

    def close(self) -> None:
        """End the wait that is under way, and every later one."""
        self._closing = True
        trio.lowlevel.notify_closing(self._fd)

    def forget(self) -> None:
        """Give the watch's own descriptors back."""
        self._epoll.close()
        self._latency.close()

    async def readable(self, _fd: int = -1) -> None:
        """Return when the descriptor is readable.

        Raises:
            trio.ClosedResourceError: :meth:`close` was called.
        """
        start = time.monotonic_ns()
        if start - self._turn > TURN_NS:
            await trio.lowlevel.checkpoint()
            self._turn = time.monotonic_ns()
        past = self._past
        if self._expected[past]:
            if past == _PAST and self._latency.can_be_made:
                self._latency.make()
            poll, clock, until = self._epoll.poll, time.monotonic_ns, start + SPIN_NS
            while not self._closing:
                if ready := poll(0, 1):  # of two that are ready, the kernel names them in turn
                    if ready[0][0] == self._fd:
                        self._past = (past << 1 | 1) & _PAST
                        return
                    await self._give_way()
                elif clock() > until:
                    break
        if not self._closing:
            await self._sleep()
        if self._closing:
            raise trio.ClosedResourceError
        self._turn = time.monotonic_ns()
        short = self._turn - start < BUSY_NS
        self._expected[past] = short
        self._past = (past << 1 | short) & _PAST

    async def _give_way(self) -> None:
        # who is woken by I/O may come behind us in the turn that wakes it, and not in the next
        await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()
        self._turn = time.monotonic_ns()

    async def _sleep(self) -> None:
        if not self._others_watched and self._past:
            self._watch_others()
        if self._latency.made:
            if self._past:  # a trickle of requests is no reason to go on
                with trio.move_on_after(LINGER):
                    await trio.lowlevel.wait_readable(self._fd)
                    return
            self._latency.withdraw()
        await trio.lowlevel.wait_readable(self._fd)

    def _watch_others(self) -> None:
        # trio does not tell which descriptor it sleeps on, but the kernel does: it watches ours
        wanted, own = f"tfd: {self._fd:8d}", self._epoll.fileno()
        for name in os.listdir("/proc/self/fdinfo"):
            try:
                info = Path("/proc/self/fdinfo", name).read_text()
            except OSError:
                continue  # the descriptor of the listing itself is closed by now
            if wanted in info and int(name) != own:
                self._epoll.register(int(name), select.EPOLLIN)
        self._others_watched = True


class _Lowlevel:
    """Stands in for ``trio.lowlevel``; it serves one session, hence one descriptor."""

    def __init__(self) -> None:
        self._watch: Watch | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(trio.lowlevel, name)

    async def wait_readable(self, fd: int) -> None:
        self._watch = Watch(fd)
        vars(self)["wait_readable"] = self._watch.readable  # from now on straight there
        await self._watch.readable()

    def notify_closing(self, fd: int) -> None:
        if self._watch is not None:
            self._watch.close()

    def forget(self) -> None:
        if self._watch is not None:
            self._watch.forget()


class _Stand:
    """Stands in for ``trio``."""

    Lock = Turnstile

    def __init__(self) -> None:
        self.lowlevel = _Lowlevel()

    def __getattr__(self, name: str) -> Any:
        return getattr(trio, name)


@contextmanager
def busy_polling() -> Iterator[None]:
    """Make pyfuse3 wait awake for as long as the block lasts.

    A machine with one core is left alone: there the client needs the core that polling would take.
    """
    if len(os.sched_getaffinity(0)) < 2:
        yield
        return
    stand = _Stand()
    namespace = vars(pyfuse3)
    namespace["trio"] = stand
    try:
        yield
    finally:
        namespace["trio"] = trio
        stand.lowlevel.forget()
