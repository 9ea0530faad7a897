"""The restoration methods and their names. The command line's choices come from here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mii_hcache.core import baselines
from mii_hcache.core.cost import LayerCost
from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind, ModelGeometry
from mii_hcache.core.planner import DEFAULT_LENGTHS, restore_auto, store_auto
from mii_hcache.core.plans import KindRuns, RestorePlan, StoragePlan
from mii_hcache.errors import ConfigError

StorageRule = Callable[[ModelGeometry, LayerCost, Sequence[int], int, int | None], StoragePlan]
"""(geometry, cost, lengths, tile_tokens, chunk_tokens)."""
RestoreRule = Callable[[LayerCost, KindRuns, int, int, int | None], RestorePlan]
"""(cost, runs, num_tokens, tile_tokens, chunk_tokens)."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method: what it stores, and how it restores."""

    name: str
    summary: str
    store: StorageRule
    restore: RestoreRule
    saves: bool = True
    """False: nothing is ever stored."""
    needs_costs: bool = True
    """False: its plans are the same whatever things cost."""
    is_free: bool = False
    """Any split will do that is fast: plans may be taken from a length nearby, and a busy engine may prefill."""


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="auto",
            summary="the fastest of all: hidden and kv layers, and leading tokens recomputed",
            store=store_auto,
            restore=restore_auto,
            is_free=True,
        ),
        Method(
            name="hcache",
            summary="the paper's schedule: hidden layers with kv or recomputed ones (equation 11)",
            store=baselines.hcache_storage,
            restore=baselines.restore_stored,
        ),
        Method(
            name="hidden",
            summary="hidden states of every layer, layer 0 from the embedding (HCache-O)",
            store=baselines.hidden_storage,
            restore=baselines.restore_stored,
            needs_costs=False,
        ),
        Method(
            name="kv",
            summary="K and V of every layer (KV offload)",
            store=baselines.kv_storage,
            restore=baselines.restore_stored,
            needs_costs=False,
        ),
        Method(
            name="recompute",
            summary="nothing stored, everything prefilled again",
            store=baselines.nothing_stored("recompute"),
            restore=baselines.restore_nothing,
            saves=False,
            needs_costs=False,
        ),
        Method(
            name="naive-hybrid",
            summary="the first layers recomputed, kv for the others (the paper's section 6.3.1)",
            store=baselines.naive_storage,
            restore=baselines.restore_stored,
        ),
        Method(
            name="cake",
            summary="K and V of every layer, leading tokens recomputed meanwhile (Cake)",
            store=baselines.cake_storage,
            restore=baselines.restore_cake,
        ),
        Method(
            name="token-wise",
            summary="tokens, not layers, split between the methods of hcache (the paper's figure 13)",
            store=baselines.token_wise_storage,
            restore=baselines.restore_token_wise,
        ),
        Method(
            name="token-wise-rounded",
            summary="token-wise with hidden tokens in multiples of 256 (figure 13, + round)",
            store=baselines.rounded_storage,
            restore=baselines.restore_rounded,
        ),
        Method(
            name="ideal",
            summary="the state never left: no restore at all",
            store=baselines.nothing_stored("ideal"),
            restore=baselines.restore_ideal,
            saves=False,
            needs_costs=False,
        ),
    )
}
"""By the method's name."""


def method_named(name: str) -> Method:
    """Raises ConfigError for an unknown method."""
    try:
        return METHODS[name]
    except KeyError:
        raise ConfigError(f"method must be one of {', '.join(METHODS)}, got {name!r}") from None


def plan_storage(
    method: str,
    geometry: ModelGeometry,
    cost: LayerCost,
    *,
    lengths: Sequence[int] = DEFAULT_LENGTHS,
    tile_tokens: int,
    chunk_tokens: int | None = None,
) -> StoragePlan:
    """What `method` stores. `lengths`: tokens of typical histories; the paper's rules plan for the first of them.

    Raises ConfigError for an unknown method or lengths that are no whole spans.
    """
    if not lengths or any(length < SPAN_TOKENS or length % SPAN_TOKENS for length in lengths):
        raise ConfigError(f"lengths must be multiples of {SPAN_TOKENS} above 0, got {list(lengths)}")
    return method_named(method).store(geometry, cost, lengths, tile_tokens, chunk_tokens)


def default_method(geometry: ModelGeometry) -> Method:
    """`hidden` where its row is smaller than K and V, else `kv` (most GQA models)."""
    hidden_is_smaller = geometry.row_bytes(ChunkKind.HIDDEN) < geometry.row_bytes(ChunkKind.KV)
    return METHODS["hidden" if hidden_is_smaller else "kv"]
