"""What to store and how to bring it back fastest: the rules of method `auto`, pure functions over one cost model.

`core/baselines.py` has the rules of the paper and of others, `core/methods.py` the list of them all. Safe from any
thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from operator import itemgetter

from mii_hcache.core.cost import LayerCost
from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind, ModelGeometry
from mii_hcache.core.layout import LayerKinds
from mii_hcache.core.plans import KindRuns, RestorePlan, StoragePlan
from mii_hcache.core.restoration import Restoration, clipped
from mii_hcache.core.search import fastest, lowest_bound_s, plan_of

DEFAULT_LENGTHS = (1024, 4096, 16384)
"""Tokens of histories that storage is planned for."""
_BUCKET_BITS = 5
"""Lengths whose leading bits (counted in spans) agree share a plan: up to 1/16 apart."""
_TIE = 1e-9
_PROMISING = 16
"""Layouts that are priced exactly."""


def lengths_up_to(max_context_tokens: int) -> tuple[int, ...]:
    """The default lengths that a model's context allows, in whole spans; at least one."""
    most = max(SPAN_TOKENS, max_context_tokens // SPAN_TOKENS * SPAN_TOKENS)
    return tuple(dict.fromkeys(min(length, most) for length in DEFAULT_LENGTHS))


def restorable(runs: KindRuns, num_tokens: int, recompute_layers: int) -> bool:
    """Every layer from `recompute_layers` on is stored in every span of the first `num_tokens` tokens."""
    kept = clipped(runs, num_tokens // SPAN_TOKENS)
    return all(None not in kinds[recompute_layers:] for kinds, _ in kept)


def plan_restore(
    cost: LayerCost,
    runs: KindRuns,
    num_tokens: int,
    *,
    tile_tokens: int,
    chunk_tokens: int | None = None,
    layer_options: Sequence[int] | None = None,
) -> RestorePlan:
    """The fastest way to bring back the first `num_tokens` tokens of a history stored like this, prefilling included.

    `runs`: (kinds of the layers, spans in a row) from the first span on. `tile_tokens`: tokens of a layer that are read
    and projected at once; `chunk_tokens`: tokens of a forward, None for as many. `layer_options`: leading layers that
    may be recomputed for all tokens, None for any number that the stored spans allow. Takes milliseconds.
    """
    restoration = Restoration(cost, runs, num_tokens, tile_tokens=tile_tokens, chunk_tokens=chunk_tokens)
    return fastest(restoration, restoration.layer_options if layer_options is None else layer_options)


def plan_restore_bucketed(
    cost: LayerCost,
    runs: KindRuns,
    num_tokens: int,
    *,
    tile_tokens: int,
    chunk_tokens: int | None = None,
) -> RestorePlan:
    """`plan_restore` for a length up to 1/16 shorter, remembered, and its split carried over to this length: about 1 %
    off the best at most, and well under a millisecond once a length like it was seen. The timeline is this length's."""
    num_spans = num_tokens // SPAN_TOKENS
    shift = max(0, num_spans.bit_length() - _BUCKET_BITS)
    bucket = num_spans >> shift << shift
    plan = _remembered(cost, clipped(runs, bucket), SPAN_TOKENS * bucket, tile_tokens, chunk_tokens)
    if num_spans == bucket:
        return plan
    restoration = Restoration(cost, runs, num_tokens, tile_tokens=tile_tokens, chunk_tokens=chunk_tokens)
    tokens = SPAN_TOKENS * (plan.recompute_tokens // SPAN_TOKENS * num_spans // bucket)
    if tokens < restoration.least_tokens(plan.recompute_layers):  # what came after the bucket lacks more layers
        return fastest(restoration, restoration.layer_options)
    return plan_of(restoration, tokens, plan.recompute_layers)


@lru_cache(maxsize=1024)
def _remembered(
    cost: LayerCost, runs: KindRuns, num_tokens: int, tile_tokens: int, chunk_tokens: int | None
) -> RestorePlan:
    return plan_restore(cost, runs, num_tokens, tile_tokens=tile_tokens, chunk_tokens=chunk_tokens)


def _auto_layouts(num_layers: int) -> list[LayerKinds]:
    """Nothing; or kv in the last layers, hidden in those before, and layer 0 kv or not stored (its input is the
    embedding)."""
    layouts: list[LayerKinds] = [(None,) * num_layers]
    for first in (None, ChunkKind.KV):
        for num_kv in range(num_layers):
            rest = (ChunkKind.HIDDEN,) * (num_layers - 1 - num_kv) + (ChunkKind.KV,) * num_kv
            layouts.append((first, *rest))
    return layouts


def store_auto(
    geometry: ModelGeometry, cost: LayerCost, lengths: Sequence[int], tile_tokens: int, chunk_tokens: int | None
) -> StoragePlan:
    """The layout whose restores, summed over the lengths as multiples of the best for that length, take least; of equal
    ones the smallest. The layouts that promise most by their bounds are priced exactly."""
    plans = [StoragePlan(method="auto", kinds=kinds) for kinds in _auto_layouts(geometry.num_layers)]

    def restorations(plan: StoragePlan) -> list[Restoration]:
        runs = [plan.runs(length // SPAN_TOKENS) for length in lengths]
        return [
            Restoration(cost, kinds, length, tile_tokens=tile_tokens, chunk_tokens=chunk_tokens)
            for kinds, length in zip(runs, lengths, strict=True)
        ]

    bounds = [[lowest_bound_s(one, one.main_layer_options) for one in restorations(plan)] for plan in plans]
    promising = [plan for _, plan in sorted(zip(_totals(bounds), plans, strict=True), key=itemgetter(0))][:_PROMISING]
    times = [[fastest(one, one.layer_options).timeline.makespan_s for one in restorations(plan)] for plan in promising]
    totals = _totals(times)
    best = [plan for total, plan in zip(totals, promising, strict=True) if total <= min(totals) * (1 + _TIE)]
    return min(best, key=lambda plan: (plan.bytes_per_token(geometry), plan.kv_layers))


def _totals(times_s: Sequence[Sequence[float]]) -> list[float]:
    """For each row the sum of its times, each as a multiple of the least in its column."""
    least = [min(column) for column in zip(*times_s, strict=True)]
    return [sum(time_s / best if best else 1.0 for time_s, best in zip(row, least, strict=True)) for row in times_s]


def restore_auto(
    cost: LayerCost, runs: KindRuns, num_tokens: int, tile_tokens: int, chunk_tokens: int | None
) -> RestorePlan:
    return plan_restore(cost, runs, num_tokens, tile_tokens=tile_tokens, chunk_tokens=chunk_tokens)
