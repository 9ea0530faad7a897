"""How long a step may wait for room to save its state: decode never, a prefill a share of what it takes anyway."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from mii_hcache.runtime.pace import Pace
from mii_hcache.runtime.stats import Counters
from mii_hcache.runtime.streams import Event, Stream

_Taken = TypeVar("_Taken")


class Patience:
    """What is left of a step's right to wait. Engine thread only.

    A step takes as long as the device computes, which goes on when the engine's calls have returned: so it is timed by
    events, looked at when the next step comes and never waited for."""

    def __init__(self, *, share: float, max_batch_tokens: int, counters: Counters, main: Stream) -> None:
        """`share` of a prefill step may be waited for; steps are computed on `main`."""
        self.share = share
        self.pace = Pace(max_batch_tokens)
        self._counters = counters
        self._main = main
        self._left_s = 0.0
        self._started: Event | None = None
        self._launched: deque[tuple[int, Event, Event]] = deque()
        """Tokens, start and end of prefill steps that were not done when they were last looked at."""

    def begin(self, num_tokens: int, *, is_prefill: bool) -> None:
        """A step of `num_tokens` is about to run."""
        self._learn()
        self._left_s = self.share * self.pace.expected_s(num_tokens) if is_prefill else 0.0

    def start_clock(self, *, is_prefill: bool) -> None:
        """The step starts to compute."""
        self._started = self._main.record(is_timed=True) if is_prefill else None

    def end(self, num_tokens: int) -> None:
        """The step was launched; on a CPU it has computed."""
        if self._started is not None:
            self._launched.append((num_tokens, self._started, self._main.record(is_timed=True)))
            self._started = None
            self._learn()

    def _learn(self) -> None:
        while self._launched and self._launched[0][2].is_done:
            num_tokens, started, ended = self._launched.popleft()
            self.pace.note(num_tokens, ended.passed_s - started.passed_s)

    def wait_for(self, take: Callable[[float], _Taken]) -> _Taken:
        """Take room by `take(wait_s)`, waiting for as long as this step still may."""
        started_s = time.perf_counter()
        taken = take(self._left_s)
        if self._left_s > 0:
            waited_s = time.perf_counter() - started_s
            self._counters.add("save_wait_seconds_total", waited_s)
            self._left_s = max(0.0, self._left_s - waited_s)
        return taken
