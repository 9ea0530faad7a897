"""Trouble that lasts is worth one line of log, not one per attempt."""

from __future__ import annotations

import logging


class Trouble:
    """Warns when trouble begins, and says when it is over. Any thread; a rare second line does no harm."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._message: str | None = None

    def begin(self, message: str, error: Exception) -> None:
        """Warn, unless the same trouble lasts already. `message` has one `%s`, for the error."""
        if self._message is None:
            self._log.warning(message, error)
        self._message = message % error

    def end(self) -> None:
        """All is well (again)."""
        if self._message is not None:
            self._log.warning("over: %s", self._message)
            self._message = None
