"""Restores of a nominal model on nominal machines, and of today's models on the platforms that ship."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from experiments.common.item import Context
from experiments.common.rows import Row
from experiments.common.runner import main
from experiments.crossover.config import (
    BALANCES,
    CHUNK_TOKENS,
    COLUMNS,
    ITEM,
    LONG_TOKENS,
    MODELS,
    PURE,
    RATIOS,
    TILE_TOKENS,
    TOKENS,
    nominal_cost,
    nominal_model,
    ratio_of,
    steps,
)
from mii_hcache.core.cost import LayerCost
from mii_hcache.core.geometry import SPAN_TOKENS, ModelGeometry
from mii_hcache.core.methods import METHODS, plan_storage
from mii_hcache.core.plans import RestorePlan, StoragePlan
from mii_hcache.core.platforms import PLATFORMS

Way = tuple[StoragePlan, RestorePlan]


def restored(method: str, geometry: ModelGeometry, cost: LayerCost, num_tokens: int) -> Way:
    """What the planner stores for this length, and how it brings it back."""
    stored = plan_storage(
        method, geometry, cost, lengths=(num_tokens,), tile_tokens=TILE_TOKENS, chunk_tokens=CHUNK_TOKENS
    )
    runs = stored.runs(num_tokens // SPAN_TOKENS)
    return stored, METHODS[method].restore(cost, runs, num_tokens, TILE_TOKENS, CHUNK_TOKENS)


def times_s(methods: tuple[str, ...], geometry: ModelGeometry, cost: LayerCost, num_tokens: int) -> dict[str, float]:
    """By method."""
    return {name: restored(name, geometry, cost, num_tokens)[1].timeline.makespan_s for name in methods}


def measure(context: Context) -> Iterator[Row]:
    """The maps, then the table. The scale decides how fine the maps are, and how many platforms there are."""
    num_ratios, num_balances = context.pick(smoke=(5, 11), small=(15, 22), paper=(25, 33))  # 1 is where cells meet
    columns = context.pick(smoke=COLUMNS[::3], small=COLUMNS, paper=COLUMNS)
    for balance in steps(BALANCES, num_balances):
        for ratio in steps(RATIOS, num_ratios):
            yield from _cell(ratio, balance)
    for panel, num_tokens in (("d", TOKENS), ("e", LONG_TOKENS)):
        for model, geometry in MODELS.items():
            for name in columns:
                yield _entry(panel, model, geometry, name, PLATFORMS[name].layer_cost(geometry), num_tokens)


def _cell(ratio: float, balance: float) -> Iterator[Row]:
    geometry, cost = nominal_model(ratio), nominal_cost(ratio, balance)
    pure_s = times_s(PURE, geometry, cost, TOKENS)
    fastest = min(pure_s, key=lambda name: pure_s[name])
    auto, cake = (restored(name, geometry, cost, TOKENS) for name in ("auto", "cake"))
    auto_s = auto[1].timeline.makespan_s
    gains = {"b": (fastest, pure_s[fastest] / auto_s), "c": ("cake", cake[1].timeline.makespan_s / auto_s)}
    for panel, (over, gain) in gains.items():
        yield Row(
            figure=ITEM.key,
            panel=panel,
            series=f"{over} / {balance:.5g}",
            x=ratio_of(geometry),
            y=gain,
            unit="ratio",
            how="simulated",
            machine="nominal",
            note=_words(auto) if panel == "b" else "",
        )


def _entry(panel: str, model: str, geometry: ModelGeometry, platform: str, cost: LayerCost, num_tokens: int) -> Row:
    pure_s = times_s(PURE, geometry, cost, num_tokens)
    fastest = min(pure_s, key=lambda name: pure_s[name])
    auto = restored("auto", geometry, cost, num_tokens)
    pure = ", ".join(f"{name} {1e3 * took_s:.1f} ms" for name, took_s in pure_s.items())
    return Row(
        figure=ITEM.key,
        panel=panel,
        series=f"{model} / {fastest}",
        x=platform,
        y=pure_s[fastest] / auto[1].timeline.makespan_s,
        unit="ratio",
        how="simulated",
        machine=platform,
        note=f"{pure}; auto {1e3 * auto[1].timeline.makespan_s:.1f} ms: {_words(auto)}",
    )


def _words(way: Way) -> str:
    stored, plan = way
    return f"{stored.summary}, {plan.recompute_tokens} tokens computed"


if __name__ == "__main__":
    sys.exit(main([*sys.argv[1:], "--no-plots", ITEM.key]))
