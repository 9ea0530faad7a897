"""Simulated over measured, one panel for each kind of number: on the diagonal they agree."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from experiments.common.plotting import style_of
from experiments.common.rows import Row
from experiments.common.runner import main
from experiments.simcheck.config import ITEM, PAIRS, errors


def draw(rows: Sequence[Row]) -> dict[str, Figure]:
    """`simcheck`."""
    found = {error.what: error for error in errors(rows)}
    series = list(dict.fromkeys(row.series for row in rows if row.y is not None))
    figure, grid = pyplot.subplots(1, len(PAIRS), figsize=(11, 3.6), layout="constrained")
    for axes, what in zip(grid, PAIRS, strict=True):
        title = f"{what}\n{found[what].typical:.0%} off" if what in found else what
        axes.set_title(title, fontsize=8, loc="left")
        axes.set_xlabel("measured, ms")
        if what in found:
            _diagonal(axes, rows, what, series)
        else:
            axes.text(0.5, 0.5, "not yet measured", ha="center", va="center", transform=axes.transAxes)
    grid[0].set_ylabel("simulated, ms")
    handles = []
    for name in series:
        colour, marker, _ = style_of(name, series)
        handles.append(Line2D([], [], color=colour, marker=marker, markersize=4, linewidth=0))
    if handles:
        figure.legend(handles, series, loc="outside lower center", ncols=len(series), frameon=False)
    figure.suptitle(ITEM.title, fontsize=9)
    return {ITEM.folder: figure}


def _diagonal(axes: Axes, rows: Sequence[Row], what: str, series: Sequence[str]) -> None:
    measured, simulated = (
        {(row.series, row.x): row.y for row in rows if row.panel == key and row.y} for key in PAIRS[what]
    )
    values = []
    for (name, x), y in measured.items():
        other = simulated.get((name, x))
        if other:
            colour, marker, _ = style_of(name, series)
            axes.plot([y], [other], color=colour, marker=marker, markersize=4, linewidth=0)
            values += [y, other]
    ends = (0.8 * min(values), 1.25 * max(values))
    axes.plot(ends, ends, color="#777777", linewidth=0.8)
    axes.fill_between(ends, [0.8 * end for end in ends], [1.2 * end for end in ends], color="#777777", alpha=0.12)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(*ends)
    axes.set_ylim(*ends)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{1e3 * value:g}"))
        axis.set_minor_formatter(NullFormatter())


if __name__ == "__main__":
    sys.exit(main([*sys.argv[1:], "--only-plots", ITEM.key]))
