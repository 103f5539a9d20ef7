"""Waiting for what another process or the kernel is about to do."""

import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

WHENEVER: Final = 2_000_000_000
"""What :func:`wake_up_limit` returns while nobody has a latency request."""


def wait_until(condition: Callable[[], object], seconds: float = 20) -> None:
    """Return when the condition holds.

    Raises:
        AssertionError: it does not, after so many seconds.
    """
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.01)


def wake_up_limit() -> int:
    """Return how many microseconds an idle processor may take to wake up, as the kernel sees it."""
    with Path("/dev/cpu_dma_latency").open("rb", buffering=0) as device:
        (limit,) = struct.unpack("=i", os.read(device.fileno(), 4))
    assert isinstance(limit, int)
    return limit
