"""The same on the machine at hand: the tasks' mean lengths, shorter, asked of a server over HTTP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from experiments.common.bench import Bench, bench_of, needs_gpu
from experiments.common.item import Cell, Context
from experiments.common.leval_here import first_tokens, series_of, served
from experiments.common.models import main_deployment
from experiments.common.rows import Row
from experiments.fig10_leval.config import HERE_PANEL, ITEM, PANELS


def cells(context: Context) -> Sequence[Cell]:
    """One for each method: a server of its own."""
    bench = bench_of(context)
    if bench is None:
        return needs_gpu(ITEM.key, (HERE_PANEL,))
    return [Cell(key=series, measure=partial(measure, bench, context, series)) for series in series_of(context)]


def measure(bench: Bench, context: Context, series: str) -> Iterator[Row]:
    """Seconds by task, on the balance of the paper's panel."""
    assert HERE_PANEL.here_of is not None
    deployment = main_deployment(PANELS[HERE_PANEL.here_of])
    server = served(bench, context, series, deployment)
    for task, ttft_s, note in first_tokens(server, context):
        if task != "mean":
            yield Row(
                figure=ITEM.key,
                panel=HERE_PANEL.key,
                series=series,
                x=task,
                y=ttft_s,
                unit="s",
                how=server.how,
                machine=bench.machine,
                note=f"{note}; balanced like {deployment.platform}",
            )
