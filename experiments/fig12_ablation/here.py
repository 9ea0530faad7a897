"""The ablation on the machine at hand, its reads throttled to the balance of the paper's three machines."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from experiments.common.bench import bench_of, needs_gpu
from experiments.common.item import Cell, Context
from experiments.fig12_ablation.config import COLUMNS, HERE, ITEM, METHODS


def cells(context: Context) -> Sequence[Cell]:
    """A cell is one machine."""
    bench = bench_of(context)
    if bench is None:
        return needs_gpu(ITEM.key, [HERE])
    columns = list(COLUMNS.items())[: context.pick(smoke=1, small=3, paper=3)]
    return [
        Cell(key=column, measure=partial(bench.rows, ITEM.key, HERE, column, deployment, METHODS))
        for column, deployment in columns
    ]
