"""Counters of everything that happens to state. Any thread."""

from __future__ import annotations

import threading
from collections import defaultdict


class Counters:
    """Named numbers that only grow, plus gauges that are set. Names carry units; counters end in `_total`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: defaultdict[str, float] = defaultdict(float)

    def add(self, name: str, amount: float = 1) -> None:
        """Grow a counter."""
        with self._lock:
            self._values[name] += amount

    def set(self, name: str, value: float) -> None:
        """Set a gauge."""
        with self._lock:
            self._values[name] = value

    def get(self, name: str) -> float:
        """The value now; 0 when never touched."""
        with self._lock:
            return self._values.get(name, 0.0)

    def snapshot(self) -> dict[str, float]:
        """All values at one moment."""
        with self._lock:
            return dict(self._values)
