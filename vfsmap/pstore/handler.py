"""A handler for :mod:`logging` that stores its lines in a region."""

import logging
import os
from typing import Final, Literal

from vfsmap.errors import VfsmapError
from vfsmap.pstore.recorder import Recorder

FORMAT: Final = "[%(asctime)s] %(process)d %(levelname)s %(name)s: %(message)s"
"""What a line looks like unless a formatter is set: a log that outlives its program needs times."""


class RecorderHandler(logging.Handler):
    """Stores each log record as one write to the console zone, or to pmsg.

    Given a path it opens a :class:`Recorder` of its own and closes it with itself.

    Raises:
        NotFound, Denied, Invalid, Damaged, Busy: as :class:`Recorder`.
    """

    def __init__(
        self,
        target: Recorder | str | os.PathLike[str],
        level: int = logging.NOTSET,
        zone: Literal["console", "pmsg"] = "console",
    ) -> None:
        super().__init__(level)
        self._owned = not isinstance(target, Recorder)
        self.recorder = target if isinstance(target, Recorder) else Recorder(target)
        self._store = self.recorder.pmsg if zone == "pmsg" else self.recorder.console
        try:
            self._store(b"")  # now is the time to hear that there is no such zone
        except VfsmapError:
            self.close()
            raise
        self.setFormatter(logging.Formatter(FORMAT))

    def emit(self, record: logging.LogRecord) -> None:
        """Store a record.

        Crash: a killed process loses nothing it had logged; the record being stored can be torn.
        """
        try:
            self._store(self.format(record) + "\n")
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        """Close the recorder, if it was opened here."""
        super().close()
        if self._owned:
            self.recorder.close()
            self._owned = False
