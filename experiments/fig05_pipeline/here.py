"""Real restores of the machine at hand: what share of the time the busier of both resources was idle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from experiments.common.bench import Bench, bench_of, needs_gpu
from experiments.common.contenders import race
from experiments.common.item import Cell, Context
from experiments.common.models import METHOD_OF, Deployment
from experiments.common.rows import Row
from experiments.fig05_pipeline.config import HERE, HERE_SERIES, ITEM
from experiments.fig12_ablation.config import COLUMNS


def shares(bench: Bench, column: str, deployment: Deployment) -> Iterator[Row]:
    """Reading, computing and bubble, over the time of the restore."""
    rate = bench.read_bytes_per_s(deployment)
    methods = [METHOD_OF[name] for name in HERE_SERIES]
    for name, one in zip(HERE_SERIES, race(bench.engine, methods, rate, bench.num_tokens, repeats=1), strict=True):
        for part, seconds in (("reads", one.io_s), ("computes", one.compute_s), ("bubble", one.bubble_s)):
            yield Row(
                figure=ITEM.key,
                panel=HERE.key,
                series=part,
                x=f"{name}, {column}",
                y=seconds / one.restore_s,
                unit="ratio",
                how="emulated",
                machine=bench.machine,
                note=f"{1e3 * one.restore_s:.0f} ms, stored as {one.stored}, reads of {rate / 1e6:.0f} MB/s",
            )


def cells(context: Context) -> Sequence[Cell]:
    """A cell is one machine's balance."""
    bench = bench_of(context)
    if bench is None:
        return needs_gpu(ITEM.key, [HERE])
    columns = list(COLUMNS.items())[: context.pick(smoke=1, small=2, paper=2)]
    return [Cell(key=column, measure=partial(shares, bench, column, deployment)) for column, deployment in columns]
