"""The same on the machine at hand, balanced like each of the paper's platforms in turn, asked over HTTP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from experiments.common.bench import Bench, bench_of, needs_gpu
from experiments.common.item import Cell, Context
from experiments.common.leval_here import first_tokens, series_of, served
from experiments.common.models import MODELS, main_deployment
from experiments.common.rows import Row
from experiments.fig04_overhead.config import HERE_PANEL, ITEM


def cells(context: Context) -> Sequence[Cell]:
    """One for each method and balance; methods that read nothing are the same at every balance."""
    bench = bench_of(context)
    if bench is None:
        return needs_gpu(ITEM.key, (HERE_PANEL,))
    made = []
    models = tuple(MODELS) if context.scale != "smoke" else tuple(MODELS)[:1]
    for series in series_of(context):
        if series == "Auto":
            continue
        reads = series in ("KV Offload", "HCache")
        for like in [(model,) for model in models] if reads else [models]:
            key = f"{series} {like[0]}" if reads else series
            made.append(Cell(key=key, measure=partial(measure, bench, context, series, like)))
    return made


def measure(bench: Bench, context: Context, series: str, like: Sequence[str]) -> Iterator[Row]:
    """The mean over tasks, for the paper's models whose balance is that of the run."""
    server = served(bench, context, series, main_deployment(like[0]))
    *tasks, (_, mean_s, note) = first_tokens(server, context)
    each = ", ".join(f"{task} {1e3 * ttft_s:.0f} ms" for task, ttft_s, _ in tasks)
    for model in like:
        balance = f"balanced like {model} on {main_deployment(model).platform}"
        yield Row(
            figure=ITEM.key,
            panel=HERE_PANEL.key,
            series=series,
            x=model,
            y=mean_s,
            unit="s",
            how=server.how,
            machine=bench.machine,
            note=f"{note} ({each}); {balance if server.is_emulated else 'reads nothing, so the same at every balance'}",
        )
