"""Conversations at rising load, by every method and model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from statistics import fmean, median

from experiments.common.item import Context
from experiments.common.rows import Row
from experiments.common.runner import main
from experiments.common.servers import BASIS, server_of
from experiments.common.serving import Served, Server, serve
from experiments.common.workloads import synthetic_sessions
from experiments.fig09_sharegpt.config import ITEM, LOADS, METHODS, TBT_PANELS, TTFT_PANELS

WARM_UP = 0.4
"""Share of the arrivals' time that fills the server and does not count."""


def at_load(server: Server, series: str, rounds_per_s: float, num_rounds: int) -> list[Served]:
    """Rounds that arrived after the warm-up and while sessions still did."""
    sessions = synthetic_sessions(num_rounds, rounds_per_s, seed=0)
    stop_s = sessions[-1].start_s
    done = serve(server, series, sessions)
    return [one for one in done if WARM_UP * stop_s <= one.arrived_s <= stop_s]


def measure(context: Context) -> Iterator[Row]:
    """The scale decides loads and rounds."""
    num_rounds, step = context.pick(smoke=(60, 4), small=(400, 2), paper=(2000, 1))
    for (first, model), second in zip(TTFT_PANELS.items(), TBT_PANELS, strict=True):
        server = server_of(model)
        for load in LOADS[model][::step]:
            for series in METHODS:
                counted = at_load(server, series, load, num_rounds)
                note = f"{len(counted)} rounds of synthetic conversations, seeded; {BASIS}"
                values = {
                    first: median(one.ttft_s for one in counted),
                    second: fmean(one.tbt_s for one in counted if one.tbt_s),
                }
                for panel, y in values.items():
                    yield Row(
                        figure=ITEM.key,
                        panel=panel,
                        series=series,
                        x=load,
                        y=y,
                        unit="s",
                        how="simulated",
                        machine=server.deployment.platform,
                        note=note,
                    )


if __name__ == "__main__":
    sys.exit(main([*sys.argv[1:], "--no-plots", ITEM.key]))
