"""Trouble that lasts is worth a line of log now and then, not one per attempt."""

from __future__ import annotations

import logging
import time

_SILENCE_S = 60.0


class Trouble:
    """Warns at most once a minute. Any thread; a rare second line does no harm."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._quiet_until_s = 0.0

    def tell(self, message: str, error: Exception) -> None:
        """Warn, unless that was done lately. `message` has one `%s`, for the error."""
        now_s = time.monotonic()
        if now_s >= self._quiet_until_s:
            self._quiet_until_s = now_s + _SILENCE_S
            self._log.warning(message, error)
