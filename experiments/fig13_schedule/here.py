"""The three splits on the machine at hand, and how long its projection takes by tokens."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from experiments.common.bench import Bench, bench_of, needs_gpu
from experiments.common.item import Cell, Context
from experiments.common.rows import Row
from experiments.fig13_schedule.config import DEPLOYMENT, HERE_GEMM, HERE_SPLITS, ITEM, SPLITS


def splits(bench: Bench) -> Iterator[Row]:
    """The methods are the x, as in the paper's panel."""
    names = {method: split for split, method in SPLITS.items()}
    for row in bench.rows(ITEM.key, HERE_SPLITS, "", DEPLOYMENT, list(names)):
        yield replace(row, series="HCache", x=names[row.series])


def projection(bench: Bench, num_tokens: int) -> Iterator[Row]:
    """K and V of so many tokens in one layer: the product, rotating and placing, as a restore does it."""
    engine, times_s = bench.engine, []
    engine.reserve(0, num_tokens)
    try:
        target = engine.target(0)
        rows = torch.zeros(num_tokens, engine.geometry.hidden_size, dtype=engine.dtype, device=engine.device)
        for turn in range(4 * bench.repeats + 1):
            if bench.is_gpu:
                torch.cuda.synchronize()
            started_s = time.perf_counter()
            target.project_hidden(turn % engine.geometry.num_layers, 0, rows)
            if bench.is_gpu:
                torch.cuda.synchronize()
            times_s.append(time.perf_counter() - started_s)
    finally:
        engine.evict(0)
    yield Row(
        figure=ITEM.key,
        panel=HERE_GEMM.key,
        series="GEMM",
        x=num_tokens,
        y=statistics.median(times_s[1:]),
        unit="s",
        how="measured",
        machine=bench.machine,
        note=f"hidden size {engine.geometry.hidden_size}, {engine.geometry.dtype}; median of {len(times_s) - 1}",
    )


def cells(context: Context) -> Sequence[Cell]:
    """One cell for the splits, one for each number of tokens."""
    bench = bench_of(context)
    if bench is None:
        return needs_gpu(ITEM.key, [HERE_SPLITS, HERE_GEMM])
    step = context.pick(smoke=256, small=64, paper=32)
    return [
        Cell(key="splits", measure=partial(splits, bench)),
        *(
            Cell(key=f"{tokens} tokens", measure=partial(projection, bench, tokens))
            for tokens in range(step, 1025, step)
        ),
    ]
