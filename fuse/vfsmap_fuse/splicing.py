"""Keeping libfuse from splicing requests, which makes them slower here (decision 0026)."""

import logging

from vfsmap.pmem import libc

log = logging.getLogger("vfsmap.fuse")


class Splicing:
    """Whether libfuse can have a pipe that holds the largest request.

    It tries to make one once, when it receives the first request; without it splices none.  A pipe
    of more than /proc/sys/fs/pipe-max-size takes CAP_SYS_RESOURCE, of the thread that receives.
    """

    def __init__(self) -> None:
        self._forbidden = False

    def forbid(self) -> None:
        """Lay the capability down, if it is there."""
        try:
            self._forbidden = libc.set_capability(libc.CAP_SYS_RESOURCE, False)
        except OSError as exc:  # a system-call filter, perhaps
            log.debug("libfuse may splice requests: %s", exc)

    def permit(self) -> None:
        """Take it up again; requests that come later are not affected."""
        if self._forbidden:
            libc.set_capability(libc.CAP_SYS_RESOURCE, True)
            self._forbidden = False
