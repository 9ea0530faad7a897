"""Six panels for each model, and how people return."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, ScalarFormatter

from experiments.common.item import Panel
from experiments.common.plotting import style_of
from experiments.common.rows import Row
from experiments.common.runner import main
from experiments.fleet.config import (
    DRIVE_WRITES_PER_DAY,
    IMAGES,
    ITEM,
    KEYS,
    METHOD_OF,
    SSD_SIZES_TB,
    TIERS,
)

_TIER_COLOURS = dict(zip(TIERS, ("#009E73", "#56B4E9", "#0072B2", "#D55E00"), strict=True))
_PANELS: Mapping[str, Panel] = {panel.key: panel for panel in ITEM.panels}
_NAMES = list(METHOD_OF)
Points = dict[str, dict[float | str, float]]


def draw(rows: Sequence[Row]) -> dict[str, Figure]:
    """One image a model, and `fleet`."""
    found = {key: _points(rows, panel) for key, panel in _PANELS.items()}
    images = {IMAGES[model]: _model(model, keys, found) for model, keys in KEYS.items()}
    return images | {ITEM.folder: _returns(found)}


def _points(rows: Sequence[Row], panel: Panel) -> Points:
    points: Points = {}
    for row in rows:
        if row.panel == panel.key and row.y is not None:
            points.setdefault(row.series, {})[row.x] = row.y * panel.y_factor
    return points


def _model(model: str, keys: str, found: Mapping[str, Points]) -> Figure:
    figure, grid = pyplot.subplots(2, 3, figsize=(11, 6), layout="constrained")
    axes = dict(zip(keys, grid.flat, strict=True))
    _stacked(axes[keys[0]], found[keys[0]])
    for key in keys[1:5]:
        _lines(axes[key], found[key])
    _bars(axes[keys[5]], found[keys[5]])
    for key in keys[1:3]:
        axes[key].set_yscale("log")
    axes[keys[1]].set_ylim(0.002, 150)
    axes[keys[2]].axhline(DRIVE_WRITES_PER_DAY, color="#777777", linestyle="--", linewidth=1)
    axes[keys[2]].text(SSD_SIZES_TB[-1], 1.06 * DRIVE_WRITES_PER_DAY, "rated", ha="right", color="#555555")
    highest = max(axes[key].get_ylim()[1] for key in keys[3:5])
    for key in keys[3:5]:
        axes[key].set_ylim(0, highest)
    for key, one in axes.items():
        _label(one, _PANELS[key])
    handles = [
        pyplot.Line2D([], [], color=style_of(name, [])[0], marker=style_of(name, [])[1], markersize=4, linewidth=1)
        for name in _NAMES
    ]
    figure.legend(handles, _NAMES, loc="outside lower center", ncols=len(_NAMES), frameon=False)
    figure.suptitle(f"{ITEM.title}: {model}, an SSD of 6.9 GB/s for each A100 (simulated)", fontsize=9)
    return figure


def _label(axes: Axes, panel: Panel) -> None:
    axes.set_title(f"({panel.key}) {panel.title}", fontsize=8, loc="left")
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)


def _stacked(axes: Axes, points: Points) -> None:
    """Of each method, the tiers on top of each other; the legend beside the bars."""
    bottoms = [0.0] * len(points)
    for tier, colour in _TIER_COLOURS.items():
        heights = [values[tier] for values in points.values()]
        axes.bar(range(len(points)), heights, 0.7, bottom=bottoms, color=colour, edgecolor="white", linewidth=0.5)
        for place, (height, bottom) in enumerate(zip(heights, bottoms, strict=True)):
            if height >= 6:
                colour_of_text = "white" if tier in ("SSD", "nowhere") else "black"
                axes.text(
                    place,
                    bottom + height / 2,
                    f"{height:.0f}",
                    ha="center",
                    va="center",
                    fontsize=6.5,
                    color=colour_of_text,
                )
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.set_xticks(range(len(points)), [name.replace("Recomputation", "Recompute") for name in points], fontsize=6.5)
    axes.set_ylim(0, 100)
    handles = [pyplot.Rectangle((0, 0), 1, 1, facecolor=colour) for colour in _TIER_COLOURS.values()]
    axes.legend(
        handles, list(_TIER_COLOURS), ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.06), frameon=False, fontsize=7
    )


def _lines(axes: Axes, points: Points) -> None:
    for series, values in points.items():
        colour, marker, _ = style_of(series, [])
        axes.plot(list(values), list(values.values()), color=colour, marker=marker, markersize=4, linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(list(SSD_SIZES_TB)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())


def _bars(axes: Axes, points: Points) -> None:
    places = list(dict.fromkeys(x for values in points.values() for x in values))
    width = 0.8 / len(points)
    for order, (series, values) in enumerate(points.items()):
        left = [places.index(x) - 0.4 + (order + 0.5) * width for x in values]
        axes.bar(left, list(values.values()), width, color=style_of(series, [])[0], edgecolor="white", linewidth=0.3)
    axes.set_xticks(range(len(places)), [str(place) for place in places])


def _returns(found: Mapping[str, Points]) -> Figure:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    _label(left, _PANELS["m"])
    away = found["m"]["returns within"]
    bars = left.bar(range(len(away)), list(away.values()), 0.7, color="#0072B2")
    left.bar_label(bars, fmt="%.0f", fontsize=7)
    left.set_xticks(range(len(away)), [str(name) for name in away])
    left.set_ylim(0, 112)
    _label(right, _PANELS["n"])
    lru, che = found["n"]["LRU"], found["n"]["Che"]
    right.plot([1e-6 * float(x) for x in lru], list(lru.values()), color="#0072B2", linewidth=1.4, label="LRU, exact")
    right.plot(
        [1e-6 * float(x) for x in che], list(che.values()), "o", color="#E69F00", markersize=3.5, label="Che's time"
    )
    right.set_xscale("log")
    right.xaxis.set_minor_formatter(NullFormatter())
    right.set_ylim(0, 104)
    right.legend(frameon=False, loc="lower right")
    figure.suptitle(f"{ITEM.title}: how people return, and what a memory of any size finds (simulated)", fontsize=9)
    return figure


if __name__ == "__main__":
    sys.exit(main([*sys.argv[1:], "--only-plots", ITEM.key]))
