"""How long a step takes at least, as far as the last few steps tell."""

from __future__ import annotations

FIRST_STEP_S = 0.5
"""Assumed length of a full step before one was measured."""
NEWEST_SHARE = 0.3
"""Weight of the newest step in the averages."""


class Pace:
    """Length and tokens of the average step, lately. One thread.

    A step costs something for itself and something for each token. What a step of few tokens costs per token says
    nothing about a full one, so a longer step than the average is only known to take as long as that.
    """

    def __init__(self, max_batch_tokens: int) -> None:
        self._step_s = FIRST_STEP_S
        self._step_tokens = float(max_batch_tokens)

    def note(self, num_tokens: int, seconds: float) -> None:
        """A step was measured."""
        self._step_s += NEWEST_SHARE * (seconds - self._step_s)
        self._step_tokens += NEWEST_SHARE * (num_tokens - self._step_tokens)

    def expected_s(self, num_tokens: int) -> float:
        """How long a step of `num_tokens` takes at least."""
        return self._step_s * min(1.0, num_tokens / self._step_tokens)
