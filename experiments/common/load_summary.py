"""What rounds under load amount to: percentiles, goodput, rates, and whether the server kept up. Arithmetic only."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean
from typing import Any

from experiments.common.workloads import Round

GROWS = 1.5
"""How many times longer the queue is in the last quarter of a run than in the second when it is said to grow."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One round, in seconds since the run began."""

    session_idx: int
    round_idx: int
    round: Round
    due_s: float
    """When it should be sent: its session's arrival, or the previous answer and the time to think."""
    sent_s: float | None = None
    finished_s: float | None = None
    """None: it failed, or was not over at the limit."""
    token_times_s: tuple[float, ...] = ()
    hcache: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""

    @property
    def ttft_s(self) -> float | None:
        """Due to first token; None without one."""
        return self.token_times_s[0] - self.due_s if self.token_times_s else None

    @property
    def gaps_s(self) -> list[float]:
        """Between its tokens."""
        return [after_s - before_s for before_s, after_s in pairwise(self.token_times_s)]

    @property
    def tbt_s(self) -> float | None:
        """Mean of the gaps; None for fewer than two tokens."""
        gaps_s = self.gaps_s
        return fmean(gaps_s) if gaps_s else None

    @property
    def way(self) -> str:
        """How its history came: resident, the restored kinds, or prefill."""
        if self.hcache.get("resident_tokens"):
            return "resident"
        return str(self.hcache.get("method") or "prefill") if self.hcache.get("restored_tokens") else "prefill"


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a round must reach to count as good."""

    ttft_s: float
    tbt_s: float
    """Mean of its gaps."""

    def is_met(self, asked: Asked) -> bool:
        """Never by one that failed or was not over."""
        return (
            asked.finished_s is not None
            and asked.ttft_s is not None
            and asked.ttft_s <= self.ttft_s
            and (asked.tbt_s or 0.0) <= self.tbt_s
        )


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Of the rounds that count. Without any, times are not a number."""

    num_counted: int
    num_failed: int
    num_unfinished: int
    """Not over at the limit."""
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    tbt_mean_s: float
    """Mean over rounds of a round's mean, as in the paper."""
    tbt_p50_s: float
    """Of all gaps, as is the next."""
    tbt_p99_s: float
    objective: Objective
    goodput: float
    """Share of rounds that meet the objective."""
    offered_rounds_per_s: float
    achieved_rounds_per_s: float
    """All that finished, over the time from the first that was due to the last that finished."""
    is_saturated: bool
    """More and more rounds waited for their first token, or some were not over at the limit."""
    ways: Mapping[str, int]
    """How histories came, and how often."""


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of them does not exceed. Not a number for none."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(share * len(values) - 1e-9) - 1)]


def num_waiting(rounds: Sequence[Asked], at_s: float) -> int:
    """Due by then and without a first token."""
    return sum(one.due_s <= at_s and not (one.token_times_s and one.token_times_s[0] <= at_s) for one in rounds)


def queue_grows(rounds: Sequence[Asked], num_samples: int = 50) -> bool:
    """Whether more rounds wait for their first token in the last quarter of the arrivals than in the second."""
    last_s = max((one.due_s for one in rounds if one.round_idx == 0), default=0.0)

    def mean_waiting(start: float, stop: float) -> float:
        places = [start + (stop - start) * (idx + 0.5) / num_samples for idx in range(num_samples)]
        return fmean(num_waiting(rounds, last_s * place) for place in places)

    return last_s > 0 and mean_waiting(0.75, 1.0) > 1 + GROWS * mean_waiting(0.25, 0.5)


def summary_of(
    rounds: Sequence[Asked], offered_rounds_per_s: float, objective: Objective, *, warm_up: float = 0.0
) -> Summary:
    """`warm_up`: share of the time in which sessions arrive; rounds due before do not count."""
    last_s = max((one.due_s for one in rounds if one.round_idx == 0), default=0.0)
    counted = [one for one in rounds if one.due_s >= warm_up * last_s]
    ttfts_s = [one.ttft_s for one in counted if one.ttft_s is not None]
    tbts_s = [one.tbt_s for one in counted if one.tbt_s is not None]
    gaps_s = [gap_s for one in counted for gap_s in one.gaps_s]
    finished_s = [one.finished_s for one in rounds if one.finished_s is not None]
    took_s = max(finished_s, default=0.0) - min((one.due_s for one in rounds), default=0.0)
    num_failed = sum(bool(one.error) for one in counted)
    num_unfinished = sum(one.finished_s is None and not one.error for one in rounds)
    return Summary(
        num_counted=len(counted),
        num_failed=num_failed,
        num_unfinished=num_unfinished,
        ttft_mean_s=fmean(ttfts_s) if ttfts_s else math.nan,
        ttft_p50_s=percentile(ttfts_s, 0.5),
        ttft_p99_s=percentile(ttfts_s, 0.99),
        tbt_mean_s=fmean(tbts_s) if tbts_s else math.nan,
        tbt_p50_s=percentile(gaps_s, 0.5),
        tbt_p99_s=percentile(gaps_s, 0.99),
        objective=objective,
        goodput=fmean(objective.is_met(one) for one in counted) if counted else math.nan,
        offered_rounds_per_s=offered_rounds_per_s,
        achieved_rounds_per_s=len(finished_s) / took_s if took_s > 0 else 0.0,
        is_saturated=num_unfinished > 0 or queue_grows(rounds),
        ways=dict(Counter(one.way for one in counted if one.hcache).most_common()),
    )
