"""Two images: distances by model and dtype, and L-Eval's answers. There is nothing of the paper to put beside them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import floor, log10

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.common.item import Panel
from experiments.common.rows import Row
from experiments.common.runner import main
from experiments.exactness.config import BOUND, ITEM, NOISE, RESIDENT

_GREY = (NOISE, RESIDENT)
"""What the others are compared with."""
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#B0A000", "#222222", "#8C564B")


def draw(ours: Sequence[Row]) -> dict[str, Figure]:
    """Images by name."""
    images = {"exactness": _image(ours, "abcd")}
    if any(row.panel in ("e", "f") and row.y is not None for row in ours):
        images["exactness_leval"] = _image(ours, "ef")
    return images


def _image(ours: Sequence[Row], keys: str) -> Figure:
    panels = [panel for panel in ITEM.panels if panel.key in keys]
    names = list(dict.fromkeys(row.series for row in ours if row.panel in keys and row.y is not None))
    figure, grid = pyplot.subplots(
        (len(panels) + 1) // 2, 2, figsize=(11, 3.1 * ((len(panels) + 1) // 2)), squeeze=False, layout="constrained"
    )
    for panel, axes in zip(panels, grid.flat, strict=False):
        _draw(axes, panel, [row for row in ours if row.panel == panel.key and row.y is not None], names)
    handles = [_handle(name, names) for name in names]
    if handles:
        figure.legend(handles, names, loc="outside lower center", ncols=6, frameon=False, fontsize=7)
    figure.suptitle(ITEM.title, fontsize=9)
    return figure


def _colour(name: str, names: Sequence[str]) -> str:
    others = [one for one in names if one not in (BOUND, *_GREY)]
    return "#888888" if name in _GREY else _COLOURS[others.index(name) % len(_COLOURS)]


def _marker(name: str) -> str:
    return "s" if name in _GREY else "o"


def _handle(name: str, names: Sequence[str]) -> object:
    if name == BOUND:
        return pyplot.Line2D([], [], color="#000000", linewidth=1.2)
    return pyplot.Line2D([], [], color=_colour(name, names), marker=_marker(name), linewidth=0, markersize=4)


def _draw(axes: Axes, panel: Panel, rows: Sequence[Row], names: Sequence[str]) -> None:
    axes.set_title(f"({panel.key}) {panel.title}", fontsize=8, loc="left")
    axes.set_ylabel(panel.y_label)
    places = list(dict.fromkeys(row.x for row in rows))
    if not places:
        axes.text(0.5, 0.5, "not yet measured", ha="center", va="center", transform=axes.transAxes, color="#777777")
        axes.set_xticks([])
        axes.set_yticks([])
        return
    shown = [name for name in names if name != BOUND and any(row.series == name for row in rows)]
    for row in rows:
        assert row.y is not None
        at, y = places.index(row.x), row.y * panel.y_factor
        if row.series == BOUND:
            axes.hlines(y, at - 0.42, at + 0.42, color="#000000", linewidth=1.2)
            continue
        left = at - 0.4 + (shown.index(row.series) + 0.5) * 0.8 / len(shown)
        axes.plot(left, y, _marker(row.series), color=_colour(row.series, names), markersize=4)
    if panel.log_y:
        least = min((row.y for row in rows if row.y), default=1.0)
        axes.set_yscale("symlog", linthresh=10 ** floor(log10(least)))  # 0 has a place: equal to the bit
        axes.set_ylim(bottom=0 - axes.get_yaxis().get_transform().linthresh / 5)
    elif panel.key in "cf":
        axes.set_ylim(min(95.0, *(row.y * panel.y_factor for row in rows if row.y is not None)) - 1, 101)
    else:
        axes.set_ylim(-0.1, 1 + max(row.y or 0 for row in rows))
    axes.set_xticks(range(len(places)), [str(place).replace(" ", "\n") for place in places], fontsize=7)


if __name__ == "__main__":
    sys.exit(main([*sys.argv[1:], "--only-plots", ITEM.key]))
