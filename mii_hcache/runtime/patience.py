"""How long a step may wait for room to save its state: decode never, a prefill a share of what it takes anyway."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from mii_hcache.runtime.pace import Pace
from mii_hcache.runtime.stats import Counters

_Taken = TypeVar("_Taken")


class Patience:
    """What is left of a step's right to wait. Engine thread only."""

    def __init__(self, *, share: float, max_batch_tokens: int, counters: Counters) -> None:
        """`share` of a prefill step may be waited for."""
        self.share = share
        self.pace = Pace(max_batch_tokens)
        self._counters = counters
        self._left_s = 0.0
        self._started_s = 0.0

    def begin(self, num_tokens: int, *, is_prefill: bool) -> None:
        """A step of `num_tokens` is about to run."""
        self._left_s = self.share * self.pace.expected_s(num_tokens) if is_prefill else 0.0

    def start_clock(self) -> None:
        """The step starts to compute."""
        self._started_s = time.perf_counter()

    def end(self, num_tokens: int, *, is_prefill: bool) -> None:
        """The step has computed."""
        if is_prefill:
            self.pace.note(num_tokens, time.perf_counter() - self._started_s)

    def wait_for(self, take: Callable[[float], _Taken]) -> _Taken:
        """Take room by `take(wait_s)`, waiting for as long as this step still may."""
        started_s = time.perf_counter()
        taken = take(self._left_s)
        if self._left_s > 0:
            waited_s = time.perf_counter() - started_s
            self._counters.add("save_wait_seconds_total", waited_s)
            self._left_s = max(0.0, self._left_s - waited_s)
        return taken
