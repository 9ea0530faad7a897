"""The machine at hand in the same two rates: products, and bytes to where they are computed with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from experiments.common.bench import Bench, bench_of, needs_gpu
from experiments.common.item import Cell, Context
from experiments.common.rows import Row
from experiments.tab02_platforms.config import ITEM

COPY_BYTES = 256 << 20


def typical_s(action: Callable[[], object], *, is_gpu: bool, repeats: int) -> float:
    """Median seconds of a call, after one to warm up."""
    times_s = []
    for _ in range(repeats + 1):
        started_s = time.perf_counter()
        action()
        if is_gpu:
            torch.cuda.synchronize()
        times_s.append(time.perf_counter() - started_s)
    return statistics.median(times_s[1:])


def rates(bench: Bench) -> Iterator[Row]:
    """A square 16-bit product, and a copy: from pinned memory to the GPU, or within memory where there is none."""
    side, device = (8192 if bench.is_gpu else 2048), bench.engine.device
    left, right = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    product_s = typical_s(lambda: left @ right, is_gpu=bench.is_gpu, repeats=3 * bench.repeats)
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, pin_memory=bench.is_gpu)
    target = torch.empty_like(source, device=device, pin_memory=False)
    copy_s = typical_s(lambda: target.copy_(source), is_gpu=bench.is_gpu, repeats=3 * bench.repeats)
    how = "pinned memory to the GPU" if bench.is_gpu else "memory to memory, on one thread or more as torch likes"
    for panel, y, unit, note in (
        ("a", 2 * side**3 / product_s, "FLOP/s", f"bfloat16, {side} x {side}"),
        ("b", COPY_BYTES / copy_s, "bytes/s", f"{COPY_BYTES >> 20} MiB, {how}"),
    ):
        yield Row(
            figure=ITEM.key,
            panel=panel,
            series="measured",
            x="here",
            y=y,
            unit=unit,
            how="measured",
            machine=bench.machine,
            note=f"{note}; median of {3 * bench.repeats}",
        )


def cells(context: Context) -> Sequence[Cell]:
    """One cell."""
    bench = bench_of(context)
    return needs_gpu(ITEM.key, ITEM.panels) if bench is None else [Cell(key="rates", measure=partial(rates, bench))]
