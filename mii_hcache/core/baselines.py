"""What the methods store and restore that `auto` is compared with: the paper's own, its ablations, and Cake.

Layer 0 is a layer like any other in the paper's rules; only `hidden` takes it from the embedding. Storage is planned
for the first of the given lengths: the paper profiles one, 1,024 tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from mii_hcache.core.cost import LayerCost
from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind, ModelGeometry
from mii_hcache.core.makespan import NOTHING
from mii_hcache.core.plans import KindRuns, RestorePlan, StoragePlan, uniform_storage
from mii_hcache.core.restoration import Restoration
from mii_hcache.core.search import fastest, plan_of, prefill
from mii_hcache.core.splits import Split, hcache_split, hidden_share, mixes_with_kv, naive_split

ROUND_TOKENS = 256
"""To what `token-wise-rounded` rounds: a length that matrix products like (the paper's figure 13b)."""


def hcache_storage(
    geometry: ModelGeometry, cost: LayerCost, lengths: Sequence[int], _tile: int = 0, chunk_tokens: int | None = None
) -> StoragePlan:
    """Hidden layers first, then kv; or layers that are recomputed, then hidden (equation 11, section 4.1)."""
    cost = cost.spread(chunk_tokens)
    split = hcache_split(cost, geometry.num_layers, lengths[0])
    others = geometry.num_layers - split.best
    hidden = (ChunkKind.HIDDEN,) * split.best
    kinds = (*hidden, *(ChunkKind.KV,) * others) if mixes_with_kv(cost) else (*(None,) * others, *hidden)
    return StoragePlan(method="hcache", kinds=kinds, closed_form=split.closed_form, note=_rounding(split))


def naive_storage(
    geometry: ModelGeometry, cost: LayerCost, lengths: Sequence[int], _tile: int = 0, chunk_tokens: int | None = None
) -> StoragePlan:
    """Layers that are recomputed, then kv."""
    cost = cost.spread(chunk_tokens)
    split = naive_split(cost, geometry.num_layers, lengths[0])
    kinds = (*(None,) * (geometry.num_layers - split.best), *(ChunkKind.KV,) * split.best)
    return StoragePlan(method="naive-hybrid", kinds=kinds, closed_form=split.closed_form, note=_rounding(split))


def _rounding(split: Split) -> str:
    if split.best == split.ceiled:
        return ""
    return f"{split.best} layers, rounded down from {split.closed_form:.2f}, are faster than the paper's {split.ceiled}"


def hidden_storage(geometry: ModelGeometry, *_: object) -> StoragePlan:
    """Every layer but the first."""
    return uniform_storage(geometry, ChunkKind.HIDDEN)


def kv_storage(geometry: ModelGeometry, *_: object) -> StoragePlan:
    """Every layer."""
    return uniform_storage(geometry, ChunkKind.KV)


def cake_storage(geometry: ModelGeometry, *_: object) -> StoragePlan:
    """As kv: what is recomputed is chosen when restoring."""
    return replace(kv_storage(geometry), method="cake")


def nothing_stored(method: str) -> Callable[..., StoragePlan]:
    """The rule of a method that stores nothing."""

    def store(geometry: ModelGeometry, *_: object) -> StoragePlan:
        return StoragePlan(method=method, kinds=(None,) * geometry.num_layers)

    return store


def token_wise_storage(
    geometry: ModelGeometry, cost: LayerCost, lengths: Sequence[int], _tile: int = 0, chunk_tokens: int | None = None
) -> StoragePlan:
    """Hidden spans with kv spans between them; or hidden spans only, some of which are recomputed on restore."""
    cost = cost.spread(chunk_tokens)
    share = hidden_share(cost, lengths[0])
    return _token_wise("token-wise", geometry, cost, share, closed_form=share)


def rounded_storage(
    geometry: ModelGeometry, cost: LayerCost, lengths: Sequence[int], _tile: int = 0, chunk_tokens: int | None = None
) -> StoragePlan:
    """The same, with the share that rounds the hidden tokens of the first length."""
    cost = cost.spread(chunk_tokens)
    share = hidden_share(cost, lengths[0])
    num_hidden = _nearest(share * lengths[0], ROUND_TOKENS, lengths[0])
    return _token_wise("token-wise-rounded", geometry, cost, num_hidden / lengths[0], closed_form=share)


def _token_wise(
    method: str, geometry: ModelGeometry, cost: LayerCost, share: float, *, closed_form: float
) -> StoragePlan:
    hidden = (ChunkKind.HIDDEN,) * geometry.num_layers
    if not mixes_with_kv(cost):
        return StoragePlan(method=method, kinds=hidden, closed_form=closed_form)
    kv = (ChunkKind.KV,) * geometry.num_layers
    return StoragePlan(method=method, kinds=hidden, other_kinds=kv, other_share=1 - share, closed_form=closed_form)


def restore_stored(
    cost: LayerCost, runs: KindRuns, num_tokens: int, tile_tokens: int, chunk_tokens: int | None = None
) -> RestorePlan:
    """Every token from the store; the layers that are not stored are recomputed. A history that lacks even the last
    layer is prefilled."""
    restoration = Restoration(cost, runs, num_tokens, tile_tokens=tile_tokens, chunk_tokens=chunk_tokens)
    layers = restoration.least_layers
    return prefill(restoration) if layers == restoration.num_layers else plan_of(restoration, 0, layers)


def restore_nothing(
    cost: LayerCost, runs: KindRuns, num_tokens: int, tile_tokens: int, chunk_tokens: int | None = None
) -> RestorePlan:
    """Prefill."""
    return prefill(Restoration(cost, runs, num_tokens, tile_tokens=tile_tokens, chunk_tokens=chunk_tokens))


def restore_cake(
    cost: LayerCost, runs: KindRuns, num_tokens: int, tile_tokens: int, chunk_tokens: int | None = None
) -> RestorePlan:
    """The best number of leading tokens to recompute."""
    restoration = Restoration(cost, runs, num_tokens, tile_tokens=tile_tokens, chunk_tokens=chunk_tokens)
    return fastest(restoration, [layers for layers in (restoration.least_layers,) if layers < restoration.num_layers])


def restore_token_wise(
    cost: LayerCost, runs: KindRuns, num_tokens: int, tile_tokens: int, chunk_tokens: int | None = None
) -> RestorePlan:
    """Equation 11 over this history's tokens, hidden ones rounded up to a span."""
    return _restore_share(cost, runs, num_tokens, tile_tokens, chunk_tokens, SPAN_TOKENS)


def restore_rounded(
    cost: LayerCost, runs: KindRuns, num_tokens: int, tile_tokens: int, chunk_tokens: int | None = None
) -> RestorePlan:
    """The same, hidden tokens rounded to the nearest multiple of `ROUND_TOKENS`."""
    return _restore_share(cost, runs, num_tokens, tile_tokens, chunk_tokens, ROUND_TOKENS)


def _restore_share(
    cost: LayerCost, runs: KindRuns, num_tokens: int, tile_tokens: int, chunk_tokens: int | None, step: int
) -> RestorePlan:
    restoration = Restoration(cost, runs, num_tokens, tile_tokens=tile_tokens, chunk_tokens=chunk_tokens)
    is_mixed = any(ChunkKind.KV in kinds for kinds in restoration.patterns)
    if is_mixed or mixes_with_kv(cost) or restoration.least_layers == restoration.num_layers:
        return restore_stored(cost, runs, num_tokens, tile_tokens, chunk_tokens)
    closed_form = num_tokens * hidden_share(cost.spread(chunk_tokens), num_tokens)
    if step == SPAN_TOKENS:
        num_hidden = min(num_tokens, math.ceil(closed_form / step) * step)
    else:
        num_hidden = _nearest(closed_form, step, num_tokens)
    plan = plan_of(restoration, num_tokens - num_hidden, restoration.least_layers)
    return replace(plan, closed_form=closed_form)


def restore_ideal(cost: LayerCost, runs: KindRuns, num_tokens: int, *_: object) -> RestorePlan:
    """Nothing to do."""
    return RestorePlan(num_tokens=num_tokens, recompute_tokens=0, recompute_layers=0, timeline=NOTHING.timeline)


def _nearest(value: float, step: int, most: int) -> int:
    """The nearest multiple of `step`, or all."""
    return min(most, round(value / step) * step)
