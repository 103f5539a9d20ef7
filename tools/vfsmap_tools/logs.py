"""Where messages go: to a file, to the journal, to syslog, or to the terminal.

The journal takes lines from a service's error stream with ``<N>``, the priority, in front of each,
sd-daemon(3); JOURNAL_STREAM tells whether the stream goes there, systemd.exec(5).
"""

import logging
import os
import sys
from logging.handlers import SysLogHandler
from pathlib import Path
from typing import IO, Final

from vfsmap_tools.escaping import printable

_FORMAT: Final = "%(name)s: %(message)s"
_SYSLOG: Final = Path("/dev/log")
_PRIORITIES: Final = (
    (logging.CRITICAL, 2),
    (logging.ERROR, 3),
    (logging.WARNING, 4),
    (logging.INFO, 6),
)
"""Levels of logging and the priorities of syslog(3) that they have."""
_DEBUG: Final = 7


def log_to(path: Path | None, *, verbose: bool, background: bool) -> None:
    """Send a server's messages to where they belong.

    Args:
        path: a file to append to; None: the journal if that is where errors go, else syslog if
            there is no terminal, else the terminal.
        verbose: say more.
        background: there is no terminal.
    """
    handler: logging.Handler
    if path is None and is_journal(sys.stderr):
        handler = logging.StreamHandler()
        handler.setFormatter(JournalFormatter(_FORMAT))
    elif path is None and background and _SYSLOG.is_socket():
        handler = SysLogHandler(str(_SYSLOG), SysLogHandler.LOG_DAEMON)
        handler.setFormatter(LineFormatter(f"vfsmap[{os.getpid()}]: {_FORMAT}"))
    else:
        handler = logging.FileHandler(path) if path else logging.StreamHandler()
        handler.setFormatter(LineFormatter(f"%(asctime)s %(levelname)s {_FORMAT}"))
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler])


def is_journal(stream: IO[str]) -> bool:
    """Tell whether what is written to a stream goes to the journal."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class LineFormatter(logging.Formatter):
    """Keeps a message on one line, whatever the names in it hold."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 the base's name
        """Return a record's message, without a traceback."""
        return printable(super().formatMessage(record))


class JournalFormatter(LineFormatter):
    """Puts its priority in front of each line; the journal adds time and process itself."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record's lines, those of a traceback included."""
        return for_journal(super().format(record), record.levelno)


def for_journal(text: str, level: int) -> str:
    """Return a text with the priority in front of each line."""
    priority = next((p for least, p in _PRIORITIES if level >= least), _DEBUG)
    return "\n".join(f"<{priority}>{line}" for line in text.splitlines() or [""])
