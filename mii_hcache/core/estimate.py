"""Costs that follow what restores really take, slowly, and cannot run away.

A measured profile ages: disks fill, neighbours come and go. Each part of the cost (reading from a tier, projecting,
placing, a forward) has a factor over the profile, moved a little by every observation. Where a restore took longer than
recomputing would have, that tier's reads get a penalty on top, so that the next plan is another one; it fades, so that
the tier gets another chance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mii_hcache.core.cost import LayerCost

Part = Literal["project", "place", "fill"]
"""Computing: from hidden states, from K and V, by a forward."""

LEARNING_RATE = 0.2
"""Share of an observation in the new factor."""
MAX_STEP = 2.0
"""An observation counts as at most so many times more, or less, than what was expected."""
MAX_FACTOR = 16.0
"""Factors stay within this, up and down, of the profile."""
PENALTY_HALF_LIFE_S = 60.0
MAX_PENALTY = 1e9
_STEP = math.log(1.05)


@dataclass(kw_only=True)
class _Penalty:
    factor: float
    since_s: float


class CostEstimate:
    """One model on one machine. Not thread-safe; the clock is the caller's (`now_s`, monotonic)."""

    def __init__(self, tiers: Mapping[str, LayerCost]) -> None:
        """`tiers`: a profile, by the name of the tier that is read from."""
        self._tiers = dict(tiers)
        self._io = dict.fromkeys(tiers, 1.0)
        self._compute: dict[Part, float] = {"project": 1.0, "place": 1.0, "fill": 1.0}
        self._penalties: dict[str, _Penalty] = {}

    def cost(self, tiers: Sequence[str], now_s: float) -> LayerCost:
        """What a layer costs when its spans lie in these tiers (with repetitions: one for each span); unknown tiers, as
        those of spans that are nowhere, weigh nothing. Factors are in steps of 5 %, so that plans can be remembered."""
        known = [tier for tier in tiers if tier in self._tiers] or [self._first]
        weights = {tier: known.count(tier) / len(known) for tier in dict.fromkeys(known)}
        factors = {tier: _stepped(self._io[tier] * self.penalty(tier, now_s)) for tier in weights}

        def read_s(name: str) -> float:
            return math.fsum(
                weight * factors[tier] * getattr(self._tiers[tier], name) for tier, weight in weights.items()
            )

        fill = _stepped(self._compute["fill"])
        base = self._tiers[max(weights, key=lambda tier: weights[tier])]
        return replace(
            base,
            io_hidden_s=read_s("io_hidden_s"),
            io_kv_s=read_s("io_kv_s"),
            io_start_s=read_s("io_start_s"),
            c_hidden_s=_stepped(self._compute["project"]) * base.c_hidden_s,
            c_kv_s=_stepped(self._compute["place"]) * base.c_kv_s,
            c_token_s=fill * base.c_token_s,
            c_attention_s=fill * base.c_attention_s,
            c_forward_start_s=fill * base.c_forward_start_s,
        )

    @property
    def _first(self) -> str:
        return next(iter(self._tiers))

    @property
    def factors(self) -> dict[str, float]:
        """By part of the cost: observed over profiled."""
        reads = {f"read {tier}": factor for tier, factor in self._io.items()}
        return reads | {str(part): factor for part, factor in self._compute.items()}

    def observe_read(self, tier: str, expected_s: float, observed_s: float) -> None:
        """Reads from a tier took `observed_s` instead of `expected_s` (this estimate's, without penalty)."""
        if tier in self._io:
            self._io[tier] = _moved(self._io[tier], expected_s, observed_s)

    def observe_compute(self, part: Part, expected_s: float, observed_s: float) -> None:
        """The same for a part of computing."""
        self._compute[part] = _moved(self._compute[part], expected_s, observed_s)

    def penalty(self, tier: str, now_s: float) -> float:
        """Factor on a tier's reads after a restore from it that should not have been; 1 when there was none."""
        penalty = self._penalties.get(tier)
        if penalty is None:
            return 1.0
        faded: float = penalty.factor ** (0.5 ** ((now_s - penalty.since_s) / PENALTY_HALF_LIFE_S))
        if faded < 1.02:
            del self._penalties[tier]
            return 1.0
        return faded

    def punish(self, tier: str, factor: float, now_s: float) -> None:
        """A restore from this tier took longer than recomputing would have: its reads count as `factor` (> 1) times
        what they count as now."""
        if tier in self._io:
            raised = min(MAX_PENALTY, self.penalty(tier, now_s) * max(1.05, factor))
            self._penalties[tier] = _Penalty(factor=raised, since_s=now_s)


def _moved(factor: float, expected_s: float, observed_s: float) -> float:
    if expected_s <= 0 or observed_s <= 0:
        return factor
    ratio = min(MAX_STEP, max(1 / MAX_STEP, observed_s / expected_s))
    moved: float = factor * ratio**LEARNING_RATE
    return min(MAX_FACTOR, max(1 / MAX_FACTOR, moved))


def _stepped(factor: float) -> float:
    return math.exp(_STEP * round(math.log(factor) / _STEP))
