"""How long a call takes, on a machine that does other things as well."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

ENOUGH_S = 1.5
"""Nothing is repeated for longer."""
PAUSE_S = 0.02
"""Longest that is waited between two calls that are timed."""


class Stopwatch:
    """Seconds of one of several calls, after one to warm up. Long calls are not repeated so often."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device = device
        self._repeats = repeats
        self.spread = 1.0
        """How many times longer a typical call was than the fastest, at worst."""

    def least_s(self, action: Callable[[], object], *, pauses: bool = True) -> float:
        """The least: others on the machine only ever add, and differences of anything else are noise.

        `pauses` waits as long as the call before took: a restore's pieces wait for reads, and meanwhile others take the
        caches. On a CPU a projection takes a tenth more after 5 ms than in a loop, and half as much again after 20.
        """
        times_s = self._times_s(action, pauses)
        if pauses and len(times_s) >= 3:
            self.spread = max(self.spread, statistics.median(times_s) / min(times_s))
        return min(times_s)

    def _times_s(self, action: Callable[[], object], pauses: bool) -> list[float]:
        times_s: list[float] = []
        while len(times_s) <= self._repeats and (len(times_s) < 2 or sum(times_s) < ENOUGH_S):
            if pauses and times_s:
                time.sleep(min(PAUSE_S, times_s[-1]))
            self.settle()
            started_s = time.perf_counter()
            action()
            self.settle()
            times_s.append(time.perf_counter() - started_s)
        return times_s[1:]

    def settle(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
