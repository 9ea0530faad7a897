"""Start and stop of every layer's read and computation."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from experiments.common.item import Context
from experiments.common.rows import Row
from experiments.common.runner import main
from experiments.common.simulator import layer_timeline, stored
from experiments.fig05_pipeline.config import ITEM, TIMELINES, TOKENS


def measure(_: Context) -> Iterator[Row]:
    """Two rows for each interval: x is the layer, y the time. The same at every scale."""
    for panel, (series, deployment) in TIMELINES.items():
        kinds = stored(deployment, series).kinds
        for one in layer_timeline(deployment.cost, kinds, TOKENS):
            for end, y in (("start", one.start_s), ("stop", one.stop_s)):
                yield Row(
                    figure=ITEM.key,
                    panel=panel,
                    series=f"{one.resource} {one.kind} {end}",
                    x=one.layer_idx,
                    y=y,
                    unit="s",
                    how="simulated",
                    machine=deployment.platform,
                    note=deployment.basis,
                )


if __name__ == "__main__":
    sys.exit(main([*sys.argv[1:], "--no-plots", ITEM.key]))
