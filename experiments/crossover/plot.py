"""Three maps with the boundaries of the formulas over them, and the table of models and platforms."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from statistics import fmean

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from experiments.common.item import Panel
from experiments.common.plotting import style_of
from experiments.common.rows import Row
from experiments.common.runner import main
from experiments.crossover.config import (
    BALANCES,
    COLUMNS,
    ITEM,
    LONG_TOKENS,
    MODELS,
    PURE,
    RATIOS,
    SERIES_OF,
    TOKENS,
    balance_of,
    hidden_above,
    nominal_model,
    ratio_of,
    recompute_below,
    steps,
)
from mii_hcache.core.platforms import PLATFORMS

_WORDS = {"hidden": "hidden states", "kv": "K and V", "recompute": "recomputation"}
_COLOURS = [style_of(SERIES_OF[name], [])[0] for name in PURE]
_NEAR = 1.3
"""Platforms whose balances differ by less share a label."""
_NAMES = {
    "a100-1ssd": "A100, 1 SSD",
    "a100-2ssd": "A100, 2 SSDs",
    "a100-dram": "A100, DRAM",
    "a30-dram": "A30",
    "4090-dram": "4090",
    "l20-dram": "L20",
    "h800-dram": "H800",
    "h200-dram": "H200",
    "4xa100-4ssd": "4 A100, 4 SSDs",
}


def draw(rows: Sequence[Row]) -> dict[str, Figure]:
    """`crossover` and `crossover_models`."""
    return {"crossover": _maps(rows), "crossover_models": _tables(rows)}


def _maps(rows: Sequence[Row]) -> Figure:
    figure, grid = pyplot.subplots(1, 3, figsize=(12.5, 5.1), layout="constrained", sharey=True)
    by_key = {panel.key: panel for panel in ITEM.panels}
    _winners(grid[0], [row for row in rows if row.panel == "b"])
    for axes, key, highest in zip(grid[1:], "bc", (2.0, 2.2), strict=True):
        _gains(figure, axes, [row for row in rows if row.panel == key], highest)
    grid[2].axvline(hidden_above(TOKENS), color="white", linewidth=1.2, linestyle="--")
    text = f"ratio {hidden_above(TOKENS):.2f}: hidden states\nenter the best mix"
    grid[2].text(hidden_above(TOKENS) / 1.06, 0.005, text, color="white", fontsize=6.5, ha="right")
    for axes, key in zip(grid, "abc", strict=True):
        _frame(axes, by_key[key])
    grid[0].set_ylabel(f"balance: {by_key['a'].y_label}\n= 2 · hidden size · bytes/s / (element bytes · FLOP/s)")
    figure.suptitle(ITEM.title, fontsize=9)
    return figure


Cells = dict[tuple[float, float], Row]


def _mesh(rows: Sequence[Row]) -> tuple[list[float], list[float], Cells]:
    """The map's columns and lines by their middles, and its cells."""
    cells = {(float(row.x), float(row.series.split(" / ")[1])): row for row in rows}
    return sorted({x for x, _ in cells}), sorted({y for _, y in cells}), cells


def _edges(ends: tuple[float, float], middles: Sequence[float]) -> list[float]:
    return [float(edge) for edge in np.geomspace(*ends, len(middles) + 1)]


def _winners(axes: Axes, rows: Sequence[Row]) -> None:
    xs, ys, cells = _mesh(rows)
    best = [[PURE.index(cells[x, y].series.split(" / ")[0]) for x in xs] for y in ys]
    axes.pcolormesh(
        _edges(RATIOS, xs),
        _edges(BALANCES, ys),
        best,
        cmap=ListedColormap(_COLOURS),
        vmin=-0.5,
        vmax=2.5,
        alpha=0.75,
        rasterized=True,
    )
    _boundaries(axes, "black", with_long=True)
    for geometry in MODELS.values():
        places = [balance_of(geometry, PLATFORMS[name]) for name in COLUMNS]
        axes.plot(
            [ratio_of(geometry)] * len(places),
            places,
            "o",
            color="white",
            markersize=2.6,
            markeredgecolor="black",
            markeredgewidth=0.5,
        )
    for x, y, text in ((1.4, 0.3, "hidden\nstates"), (0.42, 3.5, "K and V"), (1.0, 0.012, "recomputation")):
        axes.text(x, y, text, ha="center", va="center", fontsize=9, fontweight="bold")


def _gains(figure: Figure, axes: Axes, rows: Sequence[Row], highest: float) -> None:
    xs, ys, cells = _mesh(rows)
    gains = np.array([[cells[x, y].y for x in xs] for y in ys], dtype=float)
    image = axes.pcolormesh(
        _edges(RATIOS, xs), _edges(BALANCES, ys), gains, cmap="cividis", vmin=1.0, vmax=highest, rasterized=True
    )
    _boundaries(axes, "white", with_long=False)
    figure.colorbar(image, ax=axes, label="times as fast", orientation="horizontal", shrink=0.9, aspect=35, pad=0.02)


def _boundaries(axes: Axes, colour: str, *, with_long: bool) -> None:
    """The formulas' lines: recomputation below, hidden states right of 1 and below 1."""
    ratios = list(steps((RATIOS[0] / 1.1, RATIOS[1] * 1.1), 200))
    axes.plot(ratios, [recompute_below(x, TOKENS) for x in ratios], color=colour, linewidth=1.2)
    corner = recompute_below(1.0, TOKENS)
    axes.plot([1.0, 1.0, ratios[-1]], [corner, 1.0, 1.0], color=colour, linewidth=1.2)
    if with_long:
        long = [recompute_below(x, LONG_TOKENS) for x in ratios]
        axes.plot(ratios, long, color=colour, linewidth=1.0, linestyle="--")
        axes.plot([1.0, 1.0], [recompute_below(1.0, LONG_TOKENS), corner], color=colour, linewidth=1.0, linestyle="--")
        axes.text(0.19, 0.0047, f"dashed: at {LONG_TOKENS:,} tokens", fontsize=6.5)


def _frame(axes: Axes, panel: Panel) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(*RATIOS)
    axes.set_ylim(*BALANCES)
    axes.xaxis.set_major_locator(FixedLocator([0.125, 0.25, 0.5, 1, 2, 4]))
    axes.set_xticklabels(["1/8", "1/4", "1/2", "1", "2", "4"])
    axes.set_xlabel(f"ratio: {panel.x_label}")
    axes.set_title(f"({panel.key}) {panel.title}, simulated", fontsize=8, loc="left")
    top = axes.secondary_xaxis("top")
    at: dict[float, list[str]] = {}
    for model, geometry in MODELS.items():
        at.setdefault(ratio_of(geometry), []).append(model)
    top.xaxis.set_major_locator(FixedLocator(list(at)))
    top.xaxis.set_minor_locator(NullLocator())
    top.set_xticklabels(list(map(_pairs, at.values())), rotation=90, fontsize=6.5)
    if panel.key == "a":
        return
    side = axes.secondary_yaxis("right")
    places = list(_platform_labels())
    side.yaxis.set_major_locator(FixedLocator([place for place, _ in places]))
    side.yaxis.set_minor_locator(NullLocator())
    side.set_yticklabels([text if panel.key == "c" else "" for _, text in places], fontsize=6.5)
    if panel.key == "c":
        side.set_ylabel("platforms, for a hidden size of 4,096", fontsize=6.5, labelpad=8)


def _pairs(models: Sequence[str]) -> str:
    """Two a line."""
    return "\n".join(", ".join(models[start : start + 2]) for start in range(0, len(models), 2))


def _platform_labels() -> Iterator[tuple[float, str]]:
    """Their balances for a model as wide as Llama-2-7B; neighbours together."""
    wide = nominal_model(1.0)
    groups: list[list[tuple[float, str]]] = []
    shown = [name for name in COLUMNS if name != "4xa100-4ssd"]  # as balanced as one GPU with one SSD
    for place in sorted((balance_of(wide, PLATFORMS[name]), _NAMES[name]) for name in shown):
        if groups and place[0] < _NEAR * groups[-1][0][0]:
            groups[-1].append(place)
        else:
            groups.append([place])
    for group in groups:
        yield fmean(balance for balance, _ in group), "; ".join(name for _, name in group)


def _tables(rows: Sequence[Row]) -> Figure:
    figure, grid = pyplot.subplots(1, 2, figsize=(12.5, 3.9), layout="constrained", sharey=True)
    columns = sorted(COLUMNS, key=lambda name: balance_of(nominal_model(1.0), PLATFORMS[name]))
    models = list(MODELS)
    for axes, key in zip(grid, "de", strict=True):
        for row in rows:
            if row.panel == key and row.y is not None:
                model, fastest = row.series.split(" / ")
                x, y = columns.index(str(row.x)), models.index(model)
                colour = _COLOURS[PURE.index(fastest)]
                axes.add_patch(
                    pyplot.Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, alpha=0.75, edgecolor="white")
                )
                axes.text(x, y, f"{row.y:.2f}", ha="center", va="center", fontsize=7)
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_ylim(-0.5, len(models) - 0.5)
        axes.set_xticks(range(len(columns)), [_NAMES[name] for name in columns], rotation=35, ha="right")
        axes.set_yticks(range(len(models)), [f"{name} ({ratio_of(MODELS[name]):.2g})" for name in models])
        panel = next(panel for panel in ITEM.panels if panel.key == key)
        axes.set_title(f"({key}) {panel.title}: auto over the fastest pure method, simulated", fontsize=8, loc="left")
    grid[0].set_ylabel("model (ratio)")
    handles = [pyplot.Rectangle((0, 0), 1, 1, facecolor=colour, alpha=0.75) for colour in _COLOURS]
    names = [f"fastest pure method: {_WORDS[name]}" for name in PURE]
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(
        "Today's models on the platforms of core/platforms.py; reads are slow for the computing there is on the left",
        fontsize=9,
    )
    return figure


if __name__ == "__main__":
    sys.exit(main([*sys.argv[1:], "--only-plots", ITEM.key]))
