"""Restoration speed on the machine at hand, its reads throttled to the balance of each of the paper's platforms."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from experiments.common.bench import bench_of, needs_gpu
from experiments.common.item import Cell, Context
from experiments.fig11_sensitivity.config import CONTEXTS, GPUS, HERE_PANELS, ITEM, METHODS, SSDS, on_dram, on_ssds


def cells(context: Context) -> Sequence[Cell]:
    """A cell is one platform, or one length."""
    bench = bench_of(context)
    if bench is None:
        return needs_gpu(ITEM.key, list(HERE_PANELS.values()))
    made = []
    for key, (model, gpus) in GPUS.items():
        for gpu in gpus if key in "ab" else ():
            made.append((key, gpu, on_dram(model, gpu), bench.num_tokens))
    for key, (model, counts) in SSDS.items():
        for count in counts if key in "de" else ():
            made.append((key, count, on_ssds(model, count), bench.num_tokens))
    lengths = context.pick(smoke=(256, 512), small=(1024, 2048, 4096), paper=(1024, 4096, 16384))
    model, _ = CONTEXTS["g"]
    made += [("g", length, on_ssds(model, 4), length) for length in lengths]
    if context.scale == "smoke":
        made = made[::4]
    return [
        Cell(
            key=f"{key} {x}",
            measure=partial(bench.rows, ITEM.key, HERE_PANELS[key], x, deployment, METHODS, num_tokens),
        )
        for key, x, deployment, num_tokens in made
    ]
