"""The timelines as strips, and the real restores of the machine at hand."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from matplotlib import pyplot
from matplotlib.figure import Figure

from experiments.common.plotting import side_by_side
from experiments.common.rows import Row
from experiments.common.runner import main
from experiments.common.strips import draw_strip, legend_handles
from experiments.fig05_pipeline.config import ITEM, TIMELINES


def draw(rows: Sequence[Row]) -> dict[str, Figure]:
    """Two images; one where nothing was computed."""
    strips = [row for row in rows if row.panel in TIMELINES]
    images = side_by_side(ITEM, rows)
    if not strips:
        return images
    figure, grid = pyplot.subplots(len(TIMELINES), 1, figsize=(9, 6.5), layout="constrained")
    longest_s = max(row.y or 0.0 for row in strips)
    for axes, panel in zip(grid, TIMELINES, strict=True):
        ours = [row for row in strips if row.panel == panel]
        draw_strip(axes, ours, longest_s)
        stop_s = max(row.y or 0.0 for row in ours)
        axes.set_title(f"{panel}: {1e3 * stop_s:.1f} ms (simulated)", fontsize=8, loc="left")
    grid[-1].set_xlabel("ms")
    figure.legend(*legend_handles(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(ITEM.title, fontsize=9)
    return {ITEM.folder: figure, **images}


if __name__ == "__main__":
    sys.exit(main([*sys.argv[1:], "--only-plots", ITEM.key]))
