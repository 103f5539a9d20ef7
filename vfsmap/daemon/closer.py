"""Closing descriptors that strangers have sent, in threads of their own.

close(2) of a file on a FUSE mount can wait for that mount's server.  For our own mount that is the
very loop that received the descriptor; for a stranger's it may be a server that never answers.  So
the loop closes nothing that it was sent, and each user's descriptors have a thread to themselves:
one that hangs keeps nobody else's waiting.
"""

import os
import queue
import threading
import time
from collections.abc import Iterable
from typing import Final

BACKLOG_MAX: Final = 256
"""Descriptors that a user may have waiting to be closed before being refused."""
THREADS_MAX: Final = 64
"""Users whose descriptors may be closed at the same time before newcomers are refused."""
_TURN: Final = 0.01
"""Seconds between two looks of a thread that has had something to do lately."""
_IDLE_TURNS: Final = 10
_BATCH: Final = 64
_LINGER: Final = 10.0
"""Seconds that an idle thread stays; starting one costs more than a call."""


class Closer:
    """Closes descriptors soon, without keeping the caller waiting."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queues: dict[int, queue.SimpleQueue[int]] = {}

    def close(self, uid: int, descriptors: Iterable[int]) -> None:
        """Close descriptors that came from a user."""
        for fd in descriptors:
            with self._lock:
                waiting = self._queues.get(uid)
                if waiting is not None:
                    waiting.put(fd)
                    continue
                waiting = self._queues[uid] = queue.SimpleQueue()
                waiting.put(fd)  # before there is a thread, which would pause first
                threading.Thread(
                    target=self._run, args=(uid, waiting), name="closer", daemon=True
                ).start()

    def is_choked(self, uid: int) -> bool:
        """Tell whether a user, or all users together, have too much waiting to be closed."""
        waiting = self._queues.get(uid)
        if waiting is None:
            return len(self._queues) >= THREADS_MAX
        return waiting.qsize() >= BACKLOG_MAX

    def _run(self, uid: int, waiting: "queue.SimpleQueue[int]") -> None:
        idle = 0
        while idle < _IDLE_TURNS or self._sleep(uid, waiting):
            idle += 1
            while not waiting.empty():
                idle = 0
                _close_all([waiting.get() for _ in range(min(waiting.qsize(), _BATCH))])
            # while calls come thick and fast, waking this thread for each would slow them all down
            time.sleep(_TURN)

    def _sleep(self, uid: int, waiting: "queue.SimpleQueue[int]") -> bool:
        """Wait for a descriptor and close it; False: none came, and the thread is to end."""
        try:
            fd = waiting.get(timeout=_LINGER)
        except queue.Empty:
            with self._lock:
                if waiting.empty():
                    del self._queues[uid]
                    return False
            return True
        _close_all([fd])
        return True


def _close_all(descriptors: list[int]) -> None:
    """Close descriptors, neighbours together: the loop is in this thread's way once for each call.

    What close(2) has to say concerns the sender.
    """
    descriptors.sort()
    first = 0
    for at, fd in enumerate(descriptors, 1):
        if at == len(descriptors) or descriptors[at] != fd + 1:
            os.closerange(descriptors[first], fd + 1)
            first = at
