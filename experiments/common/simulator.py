"""Restoring one history, alone on its machine: the planner's own plans and their timelines. All of it is simulated.

The paper's methods move whole layers, so a tile is a layer; tokens that are recomputed go through the layers in the
engine's chunks. Storage is planned for 1,024 tokens, the length that the paper profiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from experiments.common.models import METHOD_OF, Deployment
from mii_hcache.core.cost import LayerCost
from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind
from mii_hcache.core.layout import LayerKinds
from mii_hcache.core.methods import METHODS, plan_storage
from mii_hcache.core.plans import RestorePlan, StoragePlan

PROFILED_TOKENS = 1024
CHUNK_TOKENS = 512
"""SplitFuse's token budget."""


@lru_cache(maxsize=256)
def stored(deployment: Deployment, series: str) -> StoragePlan:
    """What the method behind a series stores."""
    return plan_storage(
        METHOD_OF.get(series, series),
        deployment.geometry,
        deployment.cost,
        lengths=(PROFILED_TOKENS,),
        tile_tokens=PROFILED_TOKENS,
        chunk_tokens=CHUNK_TOKENS,
    )


@lru_cache(maxsize=16384)
def restored(deployment: Deployment, series: str, num_tokens: int) -> RestorePlan:
    """How the method brings `num_tokens` (whole spans) back, and how long it takes."""
    runs = stored(deployment, series).runs(num_tokens // SPAN_TOKENS)
    method = METHODS[METHOD_OF.get(series, series)]
    return method.restore(deployment.cost, runs, num_tokens, num_tokens, CHUNK_TOKENS)


def whole_spans(num_tokens: float) -> int:
    """The nearest length that is whole spans, at least one."""
    return max(SPAN_TOKENS, round(num_tokens / SPAN_TOKENS) * SPAN_TOKENS)


def speed(deployment: Deployment, series: str, num_tokens: float) -> float:
    """History tokens per second of restoration, the paper's metric."""
    length = whole_spans(num_tokens)
    return length / restored(deployment, series, length).timeline.makespan_s


@dataclass(frozen=True, kw_only=True)
class Interval:
    """One layer on one resource."""

    resource: str
    """`read` or `compute`."""
    layer_idx: int
    kind: str
    """hidden, kv, or recompute."""
    start_s: float
    stop_s: float


def layer_timeline(cost: LayerCost, kinds: LayerKinds, num_tokens: int) -> list[Interval]:
    """Reads one after the other; recomputed layers first on the compute side, then each layer when it has been read.
    The last stop is the makespan of the plan that takes these layers whole and recomputes the first without kinds."""
    done: list[Interval] = []
    read_s = compute_s = 0.0
    num_recomputed = next((idx for idx, kind in enumerate(kinds) if kind is not None), len(kinds))
    for layer_idx, kind in enumerate(kinds):
        if kind is None:
            is_last = layer_idx == num_recomputed - 1
            took_s = cost.c_hidden_s * num_tokens if is_last else cost.forward_s(0, num_tokens)
            took_s += -(-num_tokens // CHUNK_TOKENS) * (cost.c_start_s if is_last else cost.forward_start_s)
            done.append(_interval("compute", layer_idx, "recompute", compute_s, took_s))
            compute_s += took_s
            continue
        io_s, work_s = _whole_layer(cost, kind, num_tokens)
        done.append(_interval("read", layer_idx, kind.value, read_s, io_s))
        read_s += io_s
        compute_s = max(compute_s, read_s)
        if work_s:
            done.append(_interval("compute", layer_idx, kind.value, compute_s, work_s))
        compute_s += work_s
    return done


def _whole_layer(cost: LayerCost, kind: ChunkKind, num_tokens: int) -> tuple[float, float]:
    if kind is ChunkKind.HIDDEN:
        return num_tokens * cost.io_hidden_s + cost.io_start_s, num_tokens * cost.c_hidden_s + cost.c_start_s
    start_s = cost.c_start_s if cost.c_kv_s else 0.0
    return num_tokens * cost.io_kv_s + cost.io_start_s, num_tokens * cost.c_kv_s + start_s


def _interval(resource: str, layer_idx: int, kind: str, start_s: float, took_s: float) -> Interval:
    return Interval(resource=resource, layer_idx=layer_idx, kind=kind, start_s=start_s, stop_s=start_s + took_s)


def makespan_s(intervals: Sequence[Interval]) -> float:
    """From the start to the last stop."""
    return max(interval.stop_s for interval in intervals)
