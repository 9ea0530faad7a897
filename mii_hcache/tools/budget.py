"""How much fits into the time that was given."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from mii_hcache.tools.conversation import ANSWER_TOKENS, MESSAGE_TOKENS, least_history_tokens

REPEATS = 3
"""Timed runs of each row, time permitting; the table shows their median."""
MANY_REPEATS = 7
"""Where that takes only `MANY_SHARE` of the time left."""
MANY_SHARE = 0.2


@dataclass(frozen=True, kw_only=True)
class Round:
    """One history to check."""

    history_tokens: int
    num_repeats: int


class Budget:
    """Decides which histories are checked, from how fast the engine was so far."""

    def __init__(
        self,
        *,
        seconds: float,
        num_turns: int,
        num_kinds: int,
        num_splits: int,
        max_context_tokens: int,
        token_s: float,
        step_s: float,
    ) -> None:
        """`num_splits`: extra prefills, for noise. `token_s`: of a prefilled token, `step_s`: of a decode step."""
        self._deadline_s = time.perf_counter() + seconds
        self._num_turns, self._num_kinds, self._num_splits = num_turns, num_kinds, num_splits
        self._token_s, self._step_s = token_s, step_s
        self._correction = 1.0
        self.least_tokens = least_history_tokens(num_turns)
        self.most_tokens = max_context_tokens - 1 - MESSAGE_TOKENS - ANSWER_TOKENS
        """Longest history that leaves room for the last turn."""

    @property
    def left_s(self) -> float:
        """Seconds left, negative when it took longer."""
        return self._deadline_s - time.perf_counter()

    def cost_s(self, planned: Round) -> float:
        """About how long a round takes."""
        prefills = 1 + self._num_turns / 2 + planned.num_repeats + self._num_splits  # the reference, recompute, noise
        prefills += (2 + planned.num_repeats) * (self._num_kinds > 0)  # cold
        prefills += self._num_kinds * (3 + 0.25 * 2 * (self._num_turns + planned.num_repeats))
        answers = self._num_turns * (2 + self._num_kinds) + self._num_kinds + self._num_splits
        seconds = prefills * planned.history_tokens * self._token_s + answers * ANSWER_TOKENS * self._step_s
        return self._correction * seconds

    def learn(self, done: Round, took_s: float) -> None:
        """A round is done: the next one is judged by it."""
        self._correction *= max(0.1, took_s / max(1e-9, self.cost_s(done)))

    def choose(self, wanted_tokens: int, done_histories: Sequence[int]) -> tuple[Round | None, str | None]:
        """The round for a wanted history, None when there is no time or nothing longer than `done_histories` would come
        of it; and what people should be told. The first round is always run, as short as need be."""
        history_tokens = min(wanted_tokens, self.most_tokens)
        told = None
        if history_tokens < wanted_tokens:
            told = f"history {wanted_tokens}: the model's context holds {history_tokens} before the last turn"
        if history_tokens < self.least_tokens:
            history_tokens = self.least_tokens
            told = f"history {wanted_tokens}: the shortest that can be checked in so many turns is {history_tokens}"
        done_tokens = max(done_histories, default=0)
        for num_tokens in (history_tokens, history_tokens // 2, history_tokens // 4, history_tokens // 8):
            for num_repeats, share in ((MANY_REPEATS, MANY_SHARE), (REPEATS, 1.0), (1, 1.0)):
                planned = Round(history_tokens=num_tokens, num_repeats=num_repeats)
                if num_tokens < self.least_tokens or num_tokens <= done_tokens:
                    continue
                if self.cost_s(planned) <= share * self.left_s:
                    if num_tokens < history_tokens:
                        told = f"history {wanted_tokens}: shortened to {num_tokens} for want of time"
                    return planned, told
        if not done_histories:
            least = Round(history_tokens=self.least_tokens, num_repeats=1)
            return least, f"history {wanted_tokens}: shortened to {self.least_tokens}, and timed once, for want of time"
        if history_tokens <= done_tokens:
            return None, told or f"history {wanted_tokens}: done already"
        cost_s = self.cost_s(Round(history_tokens=history_tokens, num_repeats=1))
        return (
            None,
            f"history {wanted_tokens}: skipped, about {cost_s:.0f} s are needed and {self.left_s:.0f} s are left",
        )
