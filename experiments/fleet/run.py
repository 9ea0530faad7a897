"""Conversations through an LRU; what each method's bytes and restores make of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from experiments.common.item import Context
from experiments.common.rows import Row
from experiments.common.runner import main
from experiments.fleet.config import (
    CHUNK_TOKENS,
    DRAM_BYTES,
    DRAM_PRICE_PER_GB,
    DRIVE_WRITES_PER_DAY,
    GPU_BYTES,
    GPU_PRICE_PER_H,
    ITEM,
    KEYS,
    LIFE_DAYS,
    METHOD_OF,
    MODELS,
    PLATFORM,
    SSD_PRICE_PER_TB,
    SSD_SIZES_TB,
    SSD_TB,
    TIERS,
    TILE_TOKENS,
)
from experiments.fleet.lru import characteristic_times_s, depths
from experiments.fleet.traffic import Floats, Ints, Trace, conversations
from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind, ModelGeometry
from mii_hcache.core.methods import METHODS, plan_storage
from mii_hcache.core.planner import DEFAULT_LENGTHS
from mii_hcache.core.plans import StoragePlan

DAY_S = 86400.0
LENGTHS = tuple(SPAN_TOKENS * spans for spans in (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256))
"""Restores are planned for these; between them times are interpolated."""
_MOST_SAMPLES = 500_000
"""Returns that results are averaged over, evenly spread; the LRU itself sees every round."""


@dataclass(frozen=True, kw_only=True)
class Watched:
    """The second half of a trace, when the tiers have filled."""

    history_tokens: Ints
    """Of each return."""
    depth_tokens: Floats
    """Per GPU."""
    gap_s: Floats
    new_tokens_per_day: float
    """Per GPU, first rounds included."""
    history_tokens_per_day: float
    note: str


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One method on one model: its bytes, and seconds of a return by tier (`TIERS`) and length."""

    plan: StoragePlan
    bytes_per_token: float
    took_s: Mapping[str, Floats]
    gpu_s: Mapping[str, Floats]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a fleet sees, per GPU."""

    shares: Floats
    """Of history tokens, by tier."""
    took_s: Floats
    """Of each return."""
    gpu_s_per_day: float
    """Computing."""
    busy_s_per_day: float
    """Computing or waiting for reads."""
    written_bytes_per_day: float


def watch(trace: Trace, num_gpus: int) -> Watched:
    """The second half."""
    since_s = trace.horizon_s / 2
    days = (trace.horizon_s - since_s) / DAY_S
    late = trace.at_s >= since_s
    depth = depths(trace)
    returns = np.flatnonzero(late & (trace.previous >= 0))
    sample = returns[:: max(1, -(-len(returns) // _MOST_SAMPLES))]
    note = (
        f"{trace.num_contexts:,} contexts, {len(trace.at_s):,} rounds on {num_gpus} GPUs in {2 * days:.1f} days; "
        f"of the second half {len(sample):,} returns"
    )
    return Watched(
        history_tokens=trace.history_tokens[sample],
        depth_tokens=depth[sample] / num_gpus,
        gap_s=trace.gap_s[sample],
        new_tokens_per_day=float(trace.new_tokens[late].sum()) / days / num_gpus,
        history_tokens_per_day=float(trace.history_tokens[returns].sum()) / days / num_gpus,
        note=note,
    )


def store(geometry: ModelGeometry, method: str) -> Stored:
    """Planned for the SSD; restored from DRAM with the same layers."""
    file_cost, memory_cost = PLATFORM.layer_cost(geometry, "file"), PLATFORM.layer_cost(geometry, "memory")
    plan = plan_storage(
        method, geometry, file_cost, lengths=DEFAULT_LENGTHS, tile_tokens=TILE_TOKENS, chunk_tokens=CHUNK_TOKENS
    )
    nothing = StoragePlan(method="recompute", kinds=(None,) * geometry.num_layers)
    ways = {"DRAM": (method, plan, memory_cost), "SSD": (method, plan, file_cost)}
    ways["nowhere"] = ("recompute", nothing, file_cost)
    took_s, gpu_s = {"GPU": np.zeros(len(LENGTHS))}, {"GPU": np.zeros(len(LENGTHS))}
    for tier, (name, stored, cost) in ways.items():
        plans = [
            METHODS[name].restore(cost, stored.runs(length // SPAN_TOKENS), length, TILE_TOKENS, CHUNK_TOKENS)
            for length in LENGTHS
        ]
        took_s[tier] = np.array([one.timeline.makespan_s for one in plans])
        gpu_s[tier] = np.array([one.timeline.compute_s for one in plans])
    return Stored(plan=plan, bytes_per_token=plan.bytes_per_token(geometry), took_s=took_s, gpu_s=gpu_s)


def capacities_tokens(geometry: ModelGeometry, stored: Stored, ssd_bytes: float) -> list[float]:
    """Of GPU, DRAM and SSD, per GPU. GPUs hold K and V whatever is stored; every tier has what those before it have."""
    on_gpu = GPU_BYTES / geometry.bytes_per_token(ChunkKind.KV)
    if not stored.bytes_per_token:
        return [on_gpu, on_gpu, on_gpu]
    in_dram = max(on_gpu, DRAM_BYTES / stored.bytes_per_token)
    return [on_gpu, in_dram, max(in_dram, ssd_bytes / stored.bytes_per_token)]


def outcome(watched: Watched, stored: Stored, capacities: list[float]) -> Outcome:
    """Every return from the first tier that holds its context."""
    history = watched.history_tokens
    tier_idx = np.searchsorted(capacities, watched.depth_tokens)
    took_s, gpu_s = np.empty(len(history)), np.empty(len(history))
    for idx, tier in enumerate(TIERS):
        here = tier_idx == idx
        took_s[here] = np.interp(history[here], (0, *LENGTHS), (0.0, *stored.took_s[tier]))
        gpu_s[here] = np.interp(history[here], (0, *LENGTHS), (0.0, *stored.gpu_s[tier]))
    shares = np.bincount(tier_idx, weights=history, minlength=len(TIERS)) / history.sum()
    per_day = watched.history_tokens_per_day / history.sum()
    saved_tokens = watched.new_tokens_per_day + shares[-1] * watched.history_tokens_per_day
    return Outcome(
        shares=shares,
        took_s=took_s,
        gpu_s_per_day=float(gpu_s.sum() * per_day),
        busy_s_per_day=float(took_s.sum() * per_day),
        written_bytes_per_day=float(saved_tokens * stored.bytes_per_token),
    )


def dollars_per_day(seen: Outcome, ssd_tb: float, *, has_store: bool, counts_waiting: bool) -> float:
    """Per GPU: its time in restores and recomputation, and drives and DRAM by their life, shorter when worn out."""
    gpu = (seen.busy_s_per_day if counts_waiting else seen.gpu_s_per_day) / 3600 * GPU_PRICE_PER_H
    if not has_store:
        return gpu
    wear = seen.written_bytes_per_day / (1e12 * ssd_tb) / DRIVE_WRITES_PER_DAY
    drives = ssd_tb * SSD_PRICE_PER_TB * max(1.0, wear) / LIFE_DAYS
    return gpu + drives + DRAM_BYTES / 1e9 * DRAM_PRICE_PER_GB / LIFE_DAYS


def measure(context: Context) -> Iterator[Row]:
    """Both models see the same conversations. The scale decides how many."""
    num_contexts = context.pick(smoke=4_000, small=100_000, paper=1_200_000)
    num_gpus = context.pick(smoke=1, small=2, paper=16)
    trace = conversations(num_contexts, num_gpus, seed=0)
    watched = watch(trace, num_gpus)
    for model, keys in KEYS.items():
        for series, method in METHOD_OF.items():
            stored = store(MODELS[model], method)
            yield from _method_rows(watched, model, keys, series, stored)
    yield from _lru_rows(trace, watched, num_gpus)


def _method_rows(watched: Watched, model: str, keys: str, series: str, stored: Stored) -> Iterator[Row]:
    def row(key: str, x: float | str, y: float, unit: str) -> Row:
        note = f"{model}, {stored.plan.summary}: {stored.bytes_per_token:,.0f} bytes a token; {watched.note}"
        return _row(key, series, x, y, unit, note)

    per_million = 1e6 / watched.history_tokens_per_day
    for ssd_tb in SSD_SIZES_TB:
        capacities = capacities_tokens(MODELS[model], stored, 1e12 * ssd_tb)
        seen = outcome(watched, stored, capacities)
        yield row(keys[1], ssd_tb, float(seen.shares[-1]), "share of tokens")
        if stored.bytes_per_token:
            yield row(keys[2], ssd_tb, seen.written_bytes_per_day / (1e12 * ssd_tb), "drive writes per day")
        for key, counts_waiting in ((keys[3], False), (keys[4], True)):
            dollars = dollars_per_day(seen, ssd_tb, has_store=stored.bytes_per_token > 0, counts_waiting=counts_waiting)
            yield row(key, ssd_tb, dollars * per_million, "dollars")
        if ssd_tb == SSD_TB:
            for tier, share in zip(TIERS, seen.shares, strict=True):
                yield row(keys[0], tier, float(share), "share of tokens")
            yield row(keys[5], "mean", float(seen.took_s.mean()), "s")
            for name, percent in (("median", 50), ("95 %", 95), ("99 %", 99)):
                yield row(keys[5], name, float(np.percentile(seen.took_s, percent)), "s")


def _lru_rows(trace: Trace, watched: Watched, num_gpus: int) -> Iterator[Row]:
    """How long people stay away, and how well Che's time stands for an LRU."""
    for name, seconds in _AWAY_S.items():
        yield _row("m", "returns within", name, float((watched.gap_s <= seconds).mean()), "share", watched.note)
    capacities = np.geomspace(1e3, 1e8, 21)
    times_s = characteristic_times_s(trace, num_gpus * capacities, since_s=trace.horizon_s / 2)
    weights = watched.history_tokens / watched.history_tokens.sum()
    for capacity, time_s in zip(capacities, times_s, strict=True):
        exact = float(weights[watched.depth_tokens <= capacity].sum())
        che = float(weights[watched.gap_s <= time_s].sum())
        note = f"remembers {time_s / 3600:.3g} hours; {watched.note}" if np.isfinite(time_s) else watched.note
        yield _row("n", "LRU", float(capacity), exact, "share of tokens", watched.note)
        yield _row("n", "Che", float(capacity), che, "share of tokens", note)


_AWAY_S = {
    "1 min": 60.0,
    "5 min": 300.0,
    "1 h": 3600.0,
    "6 h": 6 * 3600.0,
    "1 day": DAY_S,
    "3 days": 3 * DAY_S,
    "7 days": 7 * DAY_S,
}


def _row(panel: str, series: str, x: float | str, y: float, unit: str, note: str) -> Row:
    return Row(
        figure=ITEM.key,
        panel=panel,
        series=series,
        x=x,
        y=y,
        unit=unit,
        how="simulated",
        machine=PLATFORM.name,
        note=note,
    )


if __name__ == "__main__":
    sys.exit(main([*sys.argv[1:], "--no-plots", ITEM.key]))
