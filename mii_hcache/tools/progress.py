"""Tell a waiting person what goes on."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class Progress:
    """One line that is written over, on a terminal; nothing elsewhere, so that logs stay clean. One thread."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._is_on = self._stream.isatty()
        self._started_s = time.monotonic()
        self._shown_s = 0.0

    def show(self, text: str) -> None:
        """Replace the line."""
        if self._is_on:
            self._stream.write(f"\r\033[K{time.monotonic() - self._started_s:5.0f} s  {text}"[:120])
            self._stream.flush()

    def count(self, what: str, num_done: int, num_all: int) -> None:
        """`show` of a bar; cheap enough to call for every piece."""
        now_s = time.monotonic()
        if self._is_on and (num_done == num_all or now_s - self._shown_s > 0.1):
            self._shown_s = now_s
            filled = 30 * num_done // max(1, num_all)
            self.show(f"[{'#' * filled}{'.' * (30 - filled)}] {num_done:,} of {num_all:,} {what}")

    def clear(self) -> None:
        """Take the line away, before something is printed."""
        if self._is_on:
            self._stream.write("\r\033[K")
            self._stream.flush()
