"""How far apart two processors are.

A mount's client and its server usually run on two processors, and hand each other every request by
the lines of their caches.  Where a virtual machine's processors lie on different dies, or even on
the same one, is the host's choice, and may change within minutes.  So each result tells.
"""

import mmap
import os
import statistics
import time
from typing import Final

_TRIPS: Final = 10_000
_LOOKS: Final = 100_000_000
"""How often to look before the other process is given up: some seconds."""
_THERE: Final = 0
_BACK: Final = mmap.PAGESIZE


def round_trip() -> float | None:
    """Return the microseconds that a byte takes to another processor and back; None: there is none.

    Python's share, of some 0.1 us, is in it.

    Raises:
        TimeoutError: the process there does not answer.
    """
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        return None
    here, there = sorted(allowed)[:2]
    with mmap.mmap(-1, 2 * mmap.PAGESIZE) as memory:
        child = os.fork()
        if child == 0:
            try:
                os.sched_setaffinity(0, {there})
                for trip in range(_TRIPS):
                    _await(memory, _THERE, 1 + trip % 2)
                    memory[_BACK] = 1 + trip % 2
            finally:
                os._exit(0)
        try:
            os.sched_setaffinity(0, {here})
            return _measure(memory) / 1e3
        finally:
            os.sched_setaffinity(0, allowed)
            os.waitpid(child, 0)


def _measure(memory: mmap.mmap) -> float:
    spent = []
    for trip in range(_TRIPS):
        began = time.perf_counter_ns()
        memory[_THERE] = 1 + trip % 2
        _await(memory, _BACK, 1 + trip % 2)
        spent.append(time.perf_counter_ns() - began)
    return statistics.median(spent)


def _await(memory: mmap.mmap, place: int, value: int) -> None:
    for _ in range(_LOOKS):
        if memory[place] == value:
            return
    raise TimeoutError("the other process does not answer")
