"""The cells as a grid, and beside it when they are read and projected."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from matplotlib import pyplot
from matplotlib.figure import Figure

from experiments.common.rows import Row
from experiments.common.runner import main
from experiments.common.strips import colour_of, draw_strip, legend_handles
from experiments.fig08_partition.config import GEOMETRY, ITEM, NUM_SPANS, WAYS


def draw(rows: Sequence[Row]) -> dict[str, Figure]:
    """One image, a row for each way."""
    figure, grid = pyplot.subplots(
        len(WAYS), 2, figsize=(9, 4.5), width_ratios=(1, 3), layout="constrained", squeeze=False
    )
    times = [row.y or 0.0 for row in rows if row.panel.startswith("time, ")]
    for (cells, strip), way in zip(grid, WAYS, strict=True):
        for row in (row for row in rows if row.panel == f"cells, {way}"):
            layer, span = (int(part) for part in str(row.x).split())
            cells.add_patch(pyplot.Rectangle((span, layer), 1, 1, facecolor=colour_of(row.series), edgecolor="white"))
        cells.set_xlim(0, NUM_SPANS)
        cells.set_ylim(0, GEOMETRY.num_layers)
        cells.set_xticks([idx + 0.5 for idx in range(NUM_SPANS)], [str(idx) for idx in range(NUM_SPANS)])
        cells.set_yticks(
            [idx + 0.5 for idx in range(GEOMETRY.num_layers)], [str(i) for i in range(GEOMETRY.num_layers)]
        )
        cells.set_ylabel("layer")
        cells.set_title(way, fontsize=8, loc="left")
        ours = [row for row in rows if row.panel == f"time, {way}"]
        draw_strip(strip, ours, max(times), factor=1.0)
        strip.set_title(f"done after {max(row.y or 0.0 for row in ours):g} (simulated)", fontsize=8, loc="left")
    grid[-1][0].set_xlabel("span")
    grid[-1][1].set_xlabel("time, in projections of one cell")
    figure.legend(*legend_handles(("hidden", "kv")), loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(ITEM.title, fontsize=9)
    return {ITEM.folder: figure}


if __name__ == "__main__":
    sys.exit(main([*sys.argv[1:], "--only-plots", ITEM.key]))
