"""The timelines as strips: reads above, computing below."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from matplotlib import pyplot
from matplotlib.figure import Figure

from experiments.common.plotting import side_by_side, style_of
from experiments.common.rows import Row
from experiments.common.runner import main
from experiments.fig05_pipeline.config import ITEM, TIMELINES

_LIKE = {"hidden": "HCache", "kv": "KV Offload", "recompute": "Recomputation"}
"""Kinds take the colour of the method that is made of them."""


def draw(rows: Sequence[Row]) -> dict[str, Figure]:
    """One image, and one of the machine at hand."""
    strips = [row for row in rows if row.panel in TIMELINES]
    if not strips:
        return side_by_side(ITEM, rows)
    figure, grid = pyplot.subplots(len(TIMELINES), 1, figsize=(9, 6.5), layout="constrained")
    for axes, panel in zip(grid, TIMELINES, strict=True):
        ours = {(row.series, row.x): row.y for row in rows if row.panel == panel and row.y is not None}
        for (series, layer), start_s in ours.items():
            resource, kind, end = series.split()
            if end == "start":
                took_s = ours[f"{resource} {kind} stop", layer] - start_s
                colour = style_of(_LIKE[kind], [])[0]
                place = 1 if resource == "read" else 0
                axes.barh(place, 1e3 * took_s, left=1e3 * start_s, color=colour, edgecolor="white", linewidth=0.4)
        axes.set_yticks([0, 1], ["compute", "read"])
        axes.set_xlim(0, 1.02e3 * max(row.y or 0.0 for row in strips))
        axes.set_title(f"{panel}: {1e3 * max(ours.values()):.1f} ms (simulated)", fontsize=8, loc="left")
    grid[-1].set_xlabel("ms")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=style_of(name, [])[0]) for name in _LIKE.values()]
    figure.legend(
        handles, ["from hidden states", "K and V", "recomputed"], loc="outside lower center", ncols=3, frameon=False
    )
    figure.suptitle(ITEM.title, fontsize=9)
    return {ITEM.folder: figure, **side_by_side(ITEM, rows)}


if __name__ == "__main__":
    sys.exit(main([*sys.argv[1:], "--only-plots", ITEM.key]))
