"""Rounds of very many conversations in order of time, as arrays.

Shapes (rounds, prompts, answers) are those of `experiments/common/workloads.py`, a pool of which is drawn from. Starts
are Poisson; think times have a body of minutes and a tail of days (`config.py`). A round takes no time.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from experiments.common.workloads import survival, synthetic_rounds
from experiments.fleet.config import (
    PAUSE_MEDIAN_S,
    PAUSE_SHARE,
    PAUSE_SIGMA,
    ROUNDS_PER_S,
    THINK_MEDIAN_S,
    THINK_SIGMA,
)

_POOL = 20_000
"""Different conversations; more are copies of these with other times."""

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Trace:
    """All arrays have one entry a round, in order of time."""

    at_s: Floats
    history_tokens: Ints
    new_tokens: Ints
    """Prompt and answer."""
    previous: Ints
    """Position of the same context's round before; -1 for its first."""
    horizon_s: float
    num_contexts: int

    @property
    def held_tokens(self) -> Ints:
        """What the context is after the round."""
        return self.history_tokens + self.new_tokens

    @property
    def gap_s(self) -> Floats:
        """Since the round before; infinite for first rounds."""
        return np.where(self.previous >= 0, self.at_s - self.at_s[self.previous], np.inf)

    @property
    def next_s(self) -> Floats:
        """When the context is used again; infinite when it is not."""
        found = np.full(len(self.at_s), np.inf)
        later = self.previous >= 0
        found[self.previous[later]] = self.at_s[later]
        return found


def conversations(num_contexts: int, num_gpus: int, *, seed: int) -> Trace:
    """As many as start while the fleet is watched: long enough that their rounds, were all of them over, make
    `ROUNDS_PER_S` a GPU. Rounds after the end are cut off."""
    shuffled, reach = random.Random(seed), survival()
    pool = [synthetic_rounds(shuffled, reach) for _ in range(min(_POOL, num_contexts))]
    counts = np.array([len(rounds) for rounds in pool])
    flat = [(one.history_tokens, one.prompt_tokens + one.output_tokens) for rounds in pool for one in rounds]
    history, new = np.array(flat, dtype=np.int64).T
    first_of_shape = np.cumsum(counts) - counts

    rng = np.random.default_rng(seed)
    shape = rng.integers(len(pool), size=num_contexts)
    num_rounds = counts[shape]
    horizon_s = float(num_rounds.sum()) / (ROUNDS_PER_S * num_gpus)
    first = np.cumsum(num_rounds) - num_rounds
    total = int(num_rounds.sum())
    is_first = np.zeros(total, dtype=bool)
    is_first[first] = True
    round_idx = np.arange(total) - np.repeat(first, num_rounds)

    gaps_s = think_times_s(rng, total)
    gaps_s[is_first] = 0.0
    since_all_s = np.cumsum(gaps_s)
    starts_s = rng.uniform(0.0, horizon_s, num_contexts)
    at_s = since_all_s + np.repeat(starts_s - since_all_s[first], num_rounds)

    place = np.repeat(first_of_shape[shape], num_rounds) + round_idx
    kept = at_s < horizon_s  # of each context its first rounds: times grow
    order = np.flatnonzero(kept)[np.argsort(at_s[kept], kind="stable")]
    rank = np.empty(total, dtype=np.int64)
    rank[order] = np.arange(len(order))
    previous = np.where(is_first[order], -1, rank[order - 1])
    return Trace(
        at_s=at_s[order],
        history_tokens=history[place[order]],
        new_tokens=new[place[order]],
        previous=previous,
        horizon_s=horizon_s,
        num_contexts=num_contexts,
    )


def think_times_s(rng: np.random.Generator, count: int) -> Floats:
    """Minutes, and now and then half a day."""
    is_pause = rng.random(count) < PAUSE_SHARE
    median_s = np.where(is_pause, PAUSE_MEDIAN_S, THINK_MEDIAN_S)
    sigma = np.where(is_pause, PAUSE_SIGMA, THINK_SIGMA)
    return median_s * np.exp(sigma * rng.standard_normal(count))
