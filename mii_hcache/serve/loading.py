"""Tell who waits what goes on while the model is loaded."""

from __future__ import annotations

import logging
import sys
import threading
import time
from types import TracebackType
from typing import TextIO

from mii_hcache.serve.saying import say

_log = logging.getLogger("mii_hcache.serve.start")

_TICK_S = 0.2
_BAR_CHARS = 30
FETCHING = "fetching"
"""Phases whose names start so are left alone: the library that downloads draws bars of its own."""
_REMIND_S = 10.0
"""Without a terminal, a phase that takes longer says how far it is so often."""


class Loading:
    """Phases with their seconds: on a terminal a line that is written over, elsewhere a line for each, or a record
    when the log is JSON. For one `with` block; `phase` may be called from any thread."""

    def __init__(self, stream: TextIO | None = None, *, as_json: bool = False) -> None:
        self._stream = stream or sys.stdout
        self._as_json = as_json
        self._is_terminal = not as_json and self._stream.isatty()
        self._start_s = time.monotonic()
        self._name = ""
        self._phase_s = self._said_s = self._start_s
        self._num_done = self._num_all = 0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._ticker = threading.Thread(target=self._tick, name="loading", daemon=True)

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._start_s

    def phase(self, name: str, num_done: int = 0, num_all: int = 0) -> None:
        """`name` goes on; `num_done` of `num_all` are done, when it is known. Cheap: call it as often as you like."""
        with self._lock:
            if name != self._name:
                self._finish_line()
                self._name, self._phase_s = name, time.monotonic()
                self._say(name)
                if self._is_terminal:
                    self._draw(end="\n" if name.startswith(FETCHING) else "")
            self._num_done, self._num_all = num_done, num_all
            if time.monotonic() - self._said_s > _REMIND_S:
                self._say(f"{name}: {self._percent()}")

    def __enter__(self) -> Loading:
        if self._is_terminal:
            self._ticker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._is_terminal:
            self._ticker.join()
        with self._lock:
            self._finish_line()
            self._name = ""

    def _say(self, words: str) -> None:
        self._said_s = time.monotonic()
        if self._as_json:
            _log.info("%s", words, extra={"fields": {"elapsed_s": round(self.seconds, 1)}})
        elif not self._is_terminal:
            say(f"{self.seconds:7.1f} s  {words}", self._stream)

    def _percent(self) -> str:
        return f"{100 * self._num_done // self._num_all}%" if self._num_all else "goes on"

    def _finish_line(self) -> None:
        """Leave the phase's line, without its bar."""
        self._num_all = 0
        if self._is_terminal and self._name:
            self._draw(end="\n")

    def _tick(self) -> None:
        while not self._ended.wait(_TICK_S):
            with self._lock:
                if self._name and not self._name.startswith(FETCHING):
                    self._draw()

    def _draw(self, end: str = "") -> None:
        seconds = time.monotonic() - self._phase_s
        bar = ""
        if self._num_all:
            num_full = _BAR_CHARS * self._num_done // self._num_all
            bar = f"  [{'#' * num_full}{'.' * (_BAR_CHARS - num_full)}] {self._percent()}"
        say(f"\r\033[K{seconds:7.1f} s  {self._name}{bar}", self._stream, end)
