"""A thread that does a thing soon after it was asked to."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

_log = logging.getLogger(__name__)


class Pulse:
    """Calls `beat` on a thread of its own, at latest `interval_s` after `poke`. Thread-safe."""

    def __init__(self, beat: Callable[[], object], interval_s: float, name: str) -> None:
        self._beat = beat
        self._interval_s = interval_s
        self._wanted = threading.Event()
        self._at_once = threading.Event()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def poke(self, *, at_once: bool = False) -> None:
        """Ask for a beat; `at_once` does not wait for more to gather. Does not block."""
        if at_once:
            self._at_once.set()
        self._wanted.set()

    def stop(self) -> None:
        """No beat runs after the return. A beat that was asked for may never come. Idempotent."""
        self._stopped = True
        self.poke(at_once=True)
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._wanted.wait()
            self._at_once.wait(self._interval_s)
            self._wanted.clear()
            self._at_once.clear()
            if self._stopped:  # asked last: a stop whose poke was cleared a moment ago shows here
                return
            try:
                self._beat()
            except Exception:
                _log.exception("%s failed; it will be tried again", self._thread.name)
