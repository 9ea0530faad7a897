"""How a server brings histories back: its method's rule, over costs that are kept up to date."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mii_hcache.core.cost import LayerCost
from mii_hcache.core.estimate import CostEstimate, Part
from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind, ModelGeometry
from mii_hcache.core.identity import SpanId
from mii_hcache.core.methods import Method, plan_storage
from mii_hcache.core.planner import lengths_up_to, plan_restore_bucketed
from mii_hcache.core.plans import RestorePlan, StoragePlan, runs_of
from mii_hcache.errors import ConfigError
from mii_hcache.runtime.lookup import Lookup, look_up
from mii_hcache.runtime.pieces import HOST, Pieces
from mii_hcache.runtime.restore import Restore
from mii_hcache.runtime.stats import Counters
from mii_hcache.runtime.timeline import Activity, Event
from mii_hcache.storage.base import ChunkStore
from mii_hcache.storage.records import SpanRecord

_log = logging.getLogger(__name__)

LEAST_OBSERVED_S = 0.002
"""Shorter observations say more about the clock than about the machine."""
FREE = LayerCost(io_hidden_s=0.0, io_kv_s=0.0, c_hidden_s=0.0, c_token_s=0.0)
"""For methods that ask nobody what things cost."""
REGRET_TRIES = 24
PARTS: tuple[Part, ...] = ("project", "place", "fill")


@dataclass(frozen=True, kw_only=True)
class RestoreChoice:
    """What was decided for one request."""

    recompute_tokens: int
    recompute_layers: int
    tiers: tuple[str, ...]
    """Where each span lies."""
    plan: RestorePlan | None
    """With its predictions; None when the method needs none."""

    @property
    def is_prefill(self) -> bool:
        """Nothing is worth restoring."""
        return self.plan is not None and self.plan.is_prefill


class RestorePolicy:
    """One method on one engine and store. Engine thread only."""

    def __init__(
        self,
        *,
        geometry: ModelGeometry,
        method: Method,
        storage: StoragePlan | None,
        estimate: CostEstimate | None,
        counters: Counters,
        tile_tokens: int,
        chunk_tokens: int,
        num_ranks: int = 1,
    ) -> None:
        """`storage`: what is saved, None for nothing. `estimate` None: this method decides without costs. `num_ranks`
        hold the model together."""
        self._num_ranks = num_ranks
        self._geometry = geometry
        self.method = method
        self.storage = storage
        self.estimate = estimate
        self._counters = counters
        self._tile_tokens = tile_tokens
        self._chunk_tokens = chunk_tokens

    @property
    def fill_layers(self) -> int:
        """Layers of the model where spans that are missing before others can be filled in; 0 where they cannot."""
        return self._geometry.num_layers if self.method.is_free and self.estimate is not None else 0

    def find(self, store: ChunkStore, spans: Sequence[tuple[SpanId, bytes]], *, max_tokens: int) -> Lookup:
        """What of a prompt is worth bringing back: up to its first missing span, or up to the last one that is there,
        whichever has all these tokens sooner."""
        lookup = look_up(store, spans, max_tokens=max_tokens, fill_layers=self.fill_layers, num_ranks=self._num_ranks)
        unbroken = lookup.unbroken()
        if unbroken.num_tokens == lookup.num_tokens:
            return lookup
        try:
            return lookup if self._is_worth_filling(store, lookup, unbroken) else unbroken
        except Exception:
            _log.exception("whether to fill gaps could not be planned; what lies behind them is prefilled")
            self._counters.add("plan_errors_total")
            return unbroken

    def _is_worth_filling(self, store: ChunkStore, lookup: Lookup, unbroken: Lookup) -> bool:
        assert self.estimate is not None
        tiers = [store.tier_of(record.span_id) or store.name for record in lookup.records]
        now_s = time.monotonic()
        filled_s = self._plan(lookup.records, tiers, now_s).timeline.makespan_s
        cost = self.estimate.cost(tiers, now_s)
        unbroken_s = self._prefill_s(cost, lookup.num_tokens)
        if unbroken.records:
            unbroken_s -= self._prefill_s(cost, unbroken.num_tokens)
            unbroken_s += self._plan(unbroken.records, tiers[: len(unbroken.records)], now_s).timeline.makespan_s
        return filled_s < unbroken_s

    def losses_s(self, tier: str, num_spans: int) -> list[float]:
        """For each position of a history: seconds that a restore loses when it has to fill in the span there, not to
        read it from `tier`. Empty when nothing can be filled in."""
        if not self.fill_layers or self.storage is None or self.estimate is None:
            return []
        cost = self.estimate.cost((tier,), time.monotonic())
        losses_s = []
        for span_idx in range(num_spans):
            kinds = self.storage.kinds_of(span_idx)
            num_hidden, num_kv = kinds.count(ChunkKind.HIDDEN), kinds.count(ChunkKind.KV)
            io_s = SPAN_TOKENS * (num_hidden * cost.io_hidden_s + num_kv * cost.io_kv_s)
            compute_s = SPAN_TOKENS * (num_hidden * cost.c_hidden_s + num_kv * cost.c_kv_s)
            fill_s = self.fill_layers * cost.forward_s(span_idx * SPAN_TOKENS, SPAN_TOKENS)
            losses_s.append(fill_s - max(io_s, compute_s))
        return losses_s

    def choose(
        self,
        records: Sequence[SpanRecord],
        tiers: Sequence[str],
        *,
        compute_share: float = 1.0,
        num_others: int = 0,
    ) -> RestoreChoice:
        """How to bring these spans back: some, all, or none of them. `tiers[i]`: where span `i` lies.

        The present load: `compute_share` of the engine's time is a restore's, the rest goes to running sequences;
        `num_others` restores read at the same time. A prefill is not slowed by either: it rides in their steps.
        """
        if self.estimate is None:
            layers = max((record.layout.first_stored for record in records), default=0)
            return RestoreChoice(recompute_tokens=0, recompute_layers=layers, tiers=tuple(tiers), plan=None)
        now_s = time.monotonic()
        plan = self._plan(records, tiers, now_s, io=1.0 + num_others, compute=1 / compute_share)
        if self.method.is_free and compute_share < 1:
            alone = self.estimate.cost(tiers, now_s)
            if plan.timeline.makespan_s > self._prefill_s(alone, plan.num_tokens):
                plan = replace(plan, recompute_tokens=plan.num_tokens)
        return RestoreChoice(
            recompute_tokens=plan.recompute_tokens,
            recompute_layers=plan.recompute_layers,
            tiers=tuple(tiers),
            plan=plan,
        )

    def _plan(
        self,
        records: Sequence[SpanRecord],
        tiers: Sequence[str],
        now_s: float,
        *,
        io: float = 1.0,
        compute: float = 1.0,
    ) -> RestorePlan:
        assert self.estimate is not None
        cost = self.estimate.cost(tiers, now_s)
        if io > 1 or compute > 1:
            cost = cost.scaled(io=io, compute=compute)
        runs = runs_of(record.layout.kinds for record in records)
        num_tokens = len(records) * SPAN_TOKENS
        if self.method.is_free:
            return plan_restore_bucketed(
                cost, runs, num_tokens, tile_tokens=self._tile_tokens, chunk_tokens=self._chunk_tokens
            )
        return self.method.restore(cost, runs, num_tokens, self._tile_tokens, self._chunk_tokens)

    def learn(self, choice: RestoreChoice, restore: Restore, records: Sequence[SpanRecord]) -> None:
        """A restore is over: compare what it took with what was expected, and never make the same mistake twice."""
        if self.estimate is None or choice.plan is None:
            return
        now_s = time.monotonic()
        timeline = restore.timeline
        cost = self.estimate.cost(choice.tiers, now_s)
        tiers = tuple(dict.fromkeys(choice.tiers[choice.recompute_tokens // SPAN_TOKENS :]))
        expected: dict[Activity, float] = {"read": 0.0, "project": 0.0, "place": 0.0, "fill": 0.0}
        for event in timeline.events:
            if event.activity in expected:  # a copy to the device is in what its read costs
                expected[event.activity] += self._expected_s(event, cost)
        compute_s = expected["project"] + expected["place"] + expected["fill"]
        slowed_io_s, slowed_compute_s = cost.overlapped(expected["read"], compute_s)
        if len(tiers) == 1 and timeline.io_s > LEAST_OBSERVED_S:
            self.estimate.observe_read(tiers[0], slowed_io_s / self.estimate.penalty(tiers[0], now_s), timeline.io_s)
        for part in PARTS:
            observed_s = timeline.busy_s(part)
            if observed_s > LEAST_OBSERVED_S:
                slowed = slowed_compute_s / compute_s if compute_s else 1.0
                self.estimate.observe_compute(part, slowed * expected[part], observed_s)
        self._regret(choice, timeline.busy_s("read", "load", "wait", *PARTS), tiers, records, now_s)

    def learn_prefill(self, start: int, num_tokens: int, observed_s: float) -> None:
        """Tokens `[start, start + num_tokens)` of one sequence were computed, and nothing else."""
        if self.estimate is not None and observed_s > LEAST_OBSERVED_S:
            cost = self.estimate.cost((), time.monotonic())
            layer_s = cost.forward_s(start, num_tokens) + cost.forward_start_s
            self.estimate.observe_compute("fill", self._geometry.num_layers * layer_s, observed_s)

    def _prefill_s(self, cost: LayerCost, num_tokens: int) -> float:
        return self._geometry.num_layers * cost.spread(self._chunk_tokens).forward_s(0, num_tokens)

    def _expected_s(self, event: Event, cost: LayerCost) -> float:
        if event.activity == "read":
            return cost.io_start_s + event.num_bytes * cost.io_kv_s / self._geometry.row_bytes(ChunkKind.KV)
        if event.activity == "fill":
            layer_s = cost.forward_s(event.start, event.num_tokens) + cost.forward_start_s
            return (event.num_layers - 1) * layer_s + cost.c_hidden_s * event.num_tokens + cost.c_start_s
        token_s = cost.c_hidden_s if event.activity == "project" else cost.c_kv_s
        return cost.c_start_s + token_s * event.num_tokens

    def _regret(
        self,
        choice: RestoreChoice,
        observed_s: float,
        tiers: Sequence[str],
        records: Sequence[SpanRecord],
        now_s: float,
    ) -> None:
        """Where prefilling would have been faster, count reads as what they took, and dearer until the plan changes. A
        method that is not free to choose does what it is known for: it is not taught better."""
        assert self.estimate is not None and choice.plan is not None
        if not self.method.is_free:
            return
        cost = self.estimate.cost(choice.tiers, now_s)
        prefill_s = self._prefill_s(cost, choice.plan.num_tokens)
        if observed_s <= prefill_s or choice.is_prefill:
            return
        self._counters.add("regretted_restores_total")
        _log.info(
            "a restore of %d tokens from %s took %.0f ms, prefilling them would take %.0f ms: planning anew",
            *(choice.plan.num_tokens, "+".join(tiers), 1e3 * observed_s, 1e3 * prefill_s),
        )
        factor = observed_s / min(prefill_s, max(1e-9, choice.plan.timeline.makespan_s))
        for _ in range(REGRET_TRIES):
            for tier in tiers:
                self.estimate.punish(tier, factor, now_s)
            if self._plan(records, choice.tiers, now_s).recompute_tokens != choice.recompute_tokens:
                return
            factor = 1.5


def make_policy(
    *,
    method: Method,
    geometry: ModelGeometry,
    costs: Mapping[str, LayerCost] | None,
    max_context_tokens: int,
    counters: Counters,
    max_fill_tokens: int,
    pieces: Pieces = HOST,
    num_ranks: int = 1,
) -> RestorePolicy:
    """What `method` saves and how it restores, for one model that `num_ranks` hold together. `costs`: of this machine
    and model, by the tier that is read from; storage is planned for the last one, where most histories will lie in the
    long run. `pieces`: what the restorer works with.

    Raises ConfigError when the method needs costs and has none, or recomputes parts that this engine cannot.
    """
    if method.needs_costs and costs is None:
        raise ConfigError(f"method {method.name!r} needs to know what this machine can do, and it was not measured")
    if method.needs_costs and not max_fill_tokens:
        raise ConfigError(f"method {method.name!r} recomputes parts of a history, which this engine cannot")
    storage: StoragePlan | None = None
    if method.saves:
        storage = plan_storage(
            method.name,
            geometry,
            list(costs.values())[-1] if costs else FREE,
            lengths=lengths_up_to(max_context_tokens),
            tile_tokens=pieces.tile_spans * SPAN_TOKENS,
            chunk_tokens=min(pieces.alone_fill_tokens, max_fill_tokens) or None,
        )
    return RestorePolicy(
        geometry=geometry,
        method=method,
        storage=storage if storage is not None and any(storage.kinds) else None,
        estimate=CostEstimate(costs) if costs and method.needs_costs else None,
        counters=counters,
        tile_tokens=pieces.tile_spans * SPAN_TOKENS,
        chunk_tokens=min(pieces.alone_fill_tokens, max_fill_tokens) or pieces.alone_fill_tokens,
        num_ranks=num_ranks,
    )
