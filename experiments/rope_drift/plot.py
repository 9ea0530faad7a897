"""Eight small panels: phases, keys, scores, and what a tiny model makes of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from experiments.common.rows import Row
from experiments.common.runner import main
from experiments.rope_drift.config import FAST_MATH, FLOAT32, ITEM, MODELS

_COLOURS = {"bfloat16": "#D55E00", "float16": "#E69F00", FLOAT32: "#0072B2", FAST_MATH: "#56B4E9"}
_ORDER = ("bfloat16", "float16", FAST_MATH, FLOAT32)
_LEAST_RAD = 1e-9
"""Of phases that are shown; some are exact."""


def draw(rows: Sequence[Row]) -> dict[str, Figure]:
    """One image."""
    figure, grid = pyplot.subplots(2, 4, figsize=(13, 5.6), layout="constrained")
    panels = {panel.key: panel for panel in ITEM.panels}
    for axes, key in zip(grid.flat, "abcdefg", strict=False):
        panel = panels[key]
        found = [row for row in rows if row.panel == key and row.y is not None]
        if key == "c":
            found = [row for row in found if row.series.startswith(f"{MODELS[0].name} at 4,096")]
        for series in dict.fromkeys(row.series for row in found):
            _line(axes, series, [row for row in found if row.series == series], is_log=panel.log_y)
        axes.set_title(f"({key}) {panel.title}, simulated", fontsize=8, loc="left")
        axes.set_xlabel(panel.x_label)
        axes.set_ylabel(panel.y_label)
        if panel.log_y:
            axes.set_yscale("log")
        if key != "c":
            _positions(axes, [float(row.x) for row in found])
    _next_tokens(grid[1][3], [row for row in rows if row.panel == "next tokens" and row.y is not None])
    handles = [pyplot.Line2D([], [], color=_COLOURS[name], linewidth=2) for name in _ORDER]
    words = ["bfloat16 made by the kernel", "float16 made by the kernel", FAST_MATH, FLOAT32]
    styles = (("-", "", MODELS[0].name), ("--", "", MODELS[1].name), (":", "", "rounding of K alone (d, g, h)"))
    handles += [pyplot.Line2D([], [], color="#222222", linestyle=style, linewidth=1) for style, _, _ in styles]
    handles += [pyplot.Line2D([], [], color="#222222", marker="x", markersize=4, linewidth=0)]
    handles += [pyplot.Line2D([], [], color="#222222", marker="o", markersize=3, linewidth=0)]
    words += [word for _, _, word in styles]
    words += ["heads whose Q is in float32 (e, f)", "neighbours, where Q shares it (f)"]
    figure.legend(handles, words, loc="outside lower center", ncols=5, frameon=False, fontsize=7)
    figure.suptitle(ITEM.title, fontsize=9)
    return {ITEM.folder: figure}


def _line(axes: Axes, series: str, rows: Sequence[Row], *, is_log: bool) -> None:
    colour = _COLOURS[next(name for name in _ORDER if name in series)]
    style = ":" if "rounding" in series else "--" if series.startswith(MODELS[1].name) else "-"
    is_near = "heads that share it, neighbours" in series
    marker = "x" if "other heads" in series else "o" if is_near else ""
    values = [max(row.y or 0.0, _LEAST_RAD) if is_log else (row.y or 0.0) for row in rows]
    axes.plot(
        [float(row.x) for row in rows], values, color=colour, linestyle=style, marker=marker, markersize=3, linewidth=1
    )


def _positions(axes: Axes, places: Sequence[float]) -> None:
    axes.set_xscale("log", base=2)
    found = sorted(set(places))
    shown = found[:: 2 if len(found) > 5 else 1]
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{place / 1024:g}k" for place in shown])


def _next_tokens(axes: Axes, rows: Sequence[Row]) -> None:
    for series in dict.fromkeys(row.series for row in rows):
        _line(axes, series, [row for row in rows if row.series == series], is_log=False)
    axes.set_ylim(0, 1.03)
    axes.set_title("(h) its next tokens, simulated", fontsize=8, loc="left")
    axes.set_xlabel("tokens")
    axes.set_ylabel("share that is the same")
    _positions(axes, [float(row.x) for row in rows])


if __name__ == "__main__":
    sys.exit(main([*sys.argv[1:], "--only-plots", ITEM.folder]))
