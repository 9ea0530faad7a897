"""Methods that restore the same history on the machine at hand, in turn: the real engine, saver, restorer and planner.

State lies in memory, behind a `ThrottledStore` where a slower device is emulated.
"""

from __future__ import annotations

import math
import queue
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mii_hcache.config import HCacheConfig
from mii_hcache.core.cost import LayerCost
from mii_hcache.core.estimate import CostEstimate
from mii_hcache.core.geometry import SPAN_TOKENS
from mii_hcache.core.methods import METHODS
from mii_hcache.core.plans import StoragePlan
from mii_hcache.engine.ragged_engine import HCacheEngine
from mii_hcache.engine.service import EngineService
from mii_hcache.runtime.generation import GenerationRequest, GenerationResult, RestoreReport, SamplingParams
from mii_hcache.runtime.profiled_tier import ProfiledTier
from mii_hcache.runtime.profiler import MAX_CONTEXT_TOKENS, TILE_TOKENS, profile_layer
from mii_hcache.storage.base import ChunkStore
from mii_hcache.storage.memory import MemoryStore
from mii_hcache.storage.throttled import ThrottledStore

STORE_BYTES = 4 << 30


def ask(service: EngineService, prompt: list[int], max_new_tokens: int = 1) -> GenerationResult:
    """One answer."""
    results: queue.SimpleQueue[GenerationResult] = queue.SimpleQueue()
    service.submit(
        GenerationRequest(
            request_id=str(time.monotonic_ns()),
            prompt_token_ids=prompt,
            sampling=SamplingParams(max_new_tokens=max_new_tokens),
            on_finish=results.put,
        )
    )
    result = results.get()
    assert result.error is None, result.error
    return result


def make_store(read_bytes_per_s: float) -> ChunkStore:
    """Memory, as slow as asked."""
    memory = MemoryStore(STORE_BYTES)
    return memory if math.isinf(read_bytes_per_s) else ThrottledStore(memory, read_bytes_per_s)


def profile_store(engine: HCacheEngine, tier: ProfiledTier, repeats: int = 5) -> dict[str, LayerCost]:
    """What this machine costs through a store, by the store's name; what is measured with is deleted again."""
    num_tokens = min(MAX_CONTEXT_TOKENS, engine.max_context_tokens) // TILE_TOKENS * TILE_TOKENS
    engine.reserve(0, num_tokens)
    try:
        costs, _ = profile_layer(
            adapter=engine,
            target=engine.target(0),
            num_target_tokens=num_tokens,
            tiers={tier.store.name: tier},
            repeats=repeats,
        )
        return costs
    finally:
        engine.evict(0)


def profile(engine: HCacheEngine, read_bytes_per_s: float, repeats: int = 5) -> dict[str, LayerCost]:
    """The same for memory of that speed; its name is `memory`."""
    store = make_store(read_bytes_per_s)
    try:
        return profile_store(engine, ProfiledTier(store=store, forget=lambda: None), repeats)
    finally:
        store.close()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one method did. Seconds are medians over turns."""

    method: str
    stored: str
    """`22H+2KV`, `-` when nothing is."""
    bytes_per_token: float
    restore_s: float
    """Of a restore, from admission to the last layer; of recomputation, of the prefill."""
    restore_s_all: tuple[float, ...]
    planned_s: float | None
    """By the plan of the restore before which it was made, of the last turn: from the profile and what the restores
    before had taught. None for methods that plan without costs."""
    profiled_s: float | None
    """The same of the first turn: from the profile alone."""
    io_s: float
    compute_s: float
    bubble_s: float
    """In which the busier of both was idle. These three are the last turn's."""
    recomputed_tokens: int
    read_bytes: int
    ways: str
    """`hidden+recompute`; `prefill` when nothing was restored."""


@dataclass(kw_only=True)
class Contender:
    """One method with its own saved state, and what its planner has learned."""

    engine: HCacheEngine
    method: str
    read_bytes_per_s: float
    costs: Mapping[str, LayerCost]
    num_tokens: int = 0
    _times_s: list[float] = field(default_factory=list)
    _planned_s: list[float | None] = field(default_factory=list)
    _last: dict[str, float] = field(default_factory=dict)
    _storage: StoragePlan | None = None
    _report: RestoreReport = field(default_factory=RestoreReport)
    _estimate: CostEstimate | None = None

    def __post_init__(self) -> None:
        self._store = make_store(self.read_bytes_per_s)

    def _open(self) -> EngineService:
        service = EngineService(
            engine=self.engine,
            store=self._store,
            method=METHODS[self.method],
            fingerprint=b"bench",
            config=HCacheConfig(method=self.method, keep="none"),
            costs=self.costs,
        )
        self._estimate = service.policy.estimate = self._estimate or service.policy.estimate
        return service

    def save(self, history: list[int]) -> None:
        """Run the history once and keep its state."""
        self.num_tokens = len(history)
        service = self._open()
        try:
            self._storage = service.policy.storage
            if self._storage is not None:
                ask(service, history)
                service.drain_saves()
        finally:
            service.close()

    def take_turn(self, history: list[int]) -> None:
        """Restore twice in a fresh service: the first time touches its buffers, the second one counts. A restore needs
        a token behind it, whose time does not count."""
        service = self._open()
        try:
            for _ in range(2 if self._storage is not None else 1):
                before = service.metrics()
                self._report = ask(service, [*history, 5]).report
                planned_ms = self._report.planned_ms
                self._planned_s.append(None if planned_ms is None else planned_ms / 1e3)
            after = service.metrics()
        finally:
            service.close()
        took_ms = self._report.restore_ms if self._report.restored_tokens else self._report.ttft_ms
        assert took_ms is not None
        self._times_s.append(took_ms / 1e3)
        self._last = {
            name: value - before.get(name, 0.0) for name, value in after.items() if name.startswith("restore")
        }

    def outcome(self) -> Outcome:
        """What came out; the state is given up."""
        self._store.close()
        report, storage, last = self._report, self._storage, self._last
        return Outcome(
            method=self.method,
            stored="-" if storage is None else storage.summary,
            bytes_per_token=0.0 if storage is None else storage.bytes_per_token(self.engine.geometry),
            restore_s=statistics.median(self._times_s),
            restore_s_all=tuple(self._times_s),
            planned_s=self._planned_s[-1],
            profiled_s=self._planned_s[0],
            io_s=last.get("restore_io_seconds_total", 0.0),
            compute_s=last.get("restore_compute_seconds_total", 0.0),
            bubble_s=last.get("restore_bubble_seconds_total", 0.0),
            recomputed_tokens=report.recomputed_tokens if report.restored_tokens else self.num_tokens,
            read_bytes=round(last.get("restored_bytes_total", 0.0)),
            ways=report.method or "prefill",
        )


def race(
    engine: HCacheEngine,
    methods: Sequence[str],
    read_bytes_per_s: float,
    num_tokens: int,
    *,
    repeats: int = 3,
    recompute_repeats: int | None = None,
    costs: Mapping[str, LayerCost] | None = None,
) -> list[Outcome]:
    """Every method on one history of random tokens (whole spans), in turn, so that a machine that gets slower is slower
    for all of them. `costs` None: the machine is profiled first, through such a store."""
    costs = costs or profile(engine, read_bytes_per_s)
    history = random.Random(1).choices(range(3, 2000), k=num_tokens // SPAN_TOKENS * SPAN_TOKENS)
    contenders = [
        Contender(engine=engine, method=method, read_bytes_per_s=read_bytes_per_s, costs=costs) for method in methods
    ]
    for contender in contenders:
        contender.save(history)
    for turn in range(repeats):
        for contender in contenders:
            if contender.method != "recompute" or turn < (recompute_repeats or repeats):
                contender.take_turn(history)
    return [contender.outcome() for contender in contenders]
