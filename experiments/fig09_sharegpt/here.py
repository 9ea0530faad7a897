"""The same on the machine at hand: conversations over HTTP, at loads that are to it what the paper's are to an A100.

A load of the paper is divided by `slowness`: how many times longer this machine takes to compute a mean round's history
and prompt (shorter here) than the paper's platform by its cost model. So x is the paper's load.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from statistics import fmean

from experiments.common.bench import MODELS_DIR, Bench, bench_of, needs_gpu
from experiments.common.item import Cell, Context
from experiments.common.load import Load, run_load
from experiments.common.load_summary import Asked, Objective, Summary, summary_of
from experiments.common.models import main_deployment
from experiments.common.rows import Row
from experiments.common.served import Served, model_folder, serving
from experiments.common.servers import KV_CAPACITY_TOKENS
from experiments.common.steps import prefill_s
from experiments.common.workloads import Session, midway_sessions, scaled
from experiments.fig09_sharegpt.config import HERE_TBT, HERE_TTFT, ITEM, TTFT_PANELS

SERIES = ("Recomputation", "KV Offload", "HCache", "Ideal", "Auto")
SEED = 0
WARM_UP = 0.1


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is asked."""

    series: tuple[str, ...]
    loads: tuple[float, ...]
    """The paper's, in rounds per second."""
    num_rounds: int
    """At each load."""
    rounds_each: int
    lengths: float
    """Factor on the paper's."""
    think: float
    """Factor on its 30 s."""
    limit_s: float
    """For each load."""
    slowness: float | None = None
    """Instead of the measured one."""


SCALES = {
    "smoke": Scale(
        series=("KV Offload", "HCache"), loads=(0.4, 0.7, 1.0), num_rounds=4, rounds_each=2, lengths=1 / 32,
        think=1 / 300, limit_s=5, slowness=0.2,
    ),
    "small": Scale(
        series=SERIES, loads=(0.6, 0.85, 1.1), num_rounds=20, rounds_each=2, lengths=1 / 12, think=1 / 20, limit_s=60,
    ),
    "paper": Scale(
        series=SERIES, loads=(0.1, 0.4, 0.7, 1.0), num_rounds=150, rounds_each=3, lengths=1.0, think=1.0, limit_s=3600,
    ),
}  # fmt: skip


def cells(context: Context) -> Sequence[Cell]:
    """One for each method: a server of its own, at every load."""
    bench = bench_of(context)
    if bench is None:
        return needs_gpu(ITEM.key, (HERE_TTFT, HERE_TBT))
    scale = SCALES[context.scale]
    return [Cell(key=series, measure=partial(measure, bench, scale, series)) for series in scale.series]


def sessions_of(scale: Scale, rounds_per_s: float) -> list[Session]:
    """In the paper's lengths."""
    return midway_sessions(scale.num_rounds, rounds_per_s, rounds_each=scale.rounds_each, seed=SEED)


def slowness(bench: Bench, scale: Scale) -> float:
    """Of this machine with its model, against the paper's with its own."""
    if scale.slowness is not None:
        return scale.slowness
    deployment = main_deployment(TTFT_PANELS[HERE_TTFT.here_of or ""])
    rounds = [one for session in sessions_of(scale, 1.0) for one in session.rounds]
    tokens = round(fmean(one.history_tokens + one.prompt_tokens for one in rounds))
    here_s = _prefill_s(bench, max(1, round(scale.lengths * tokens)))
    return here_s / (deployment.geometry.num_layers * deployment.cost.forward_s(0, tokens))


@lru_cache(maxsize=4)
def _prefill_s(bench: Bench, num_tokens: int) -> float:
    """Once for all methods: they must be asked at the same times."""
    return prefill_s(bench.engine, num_tokens)


def loads_of(scale: Scale, slower: float) -> dict[float, Load]:
    """By the paper's load. Rounds and tokens of a session are the same at every load up to the arrival times and what
    is new in a round."""
    return {
        x: Load(
            sessions=tuple(scaled(sessions_of(scale, x / slower), tokens=scale.lengths)),
            think_s=30 * scale.think,
            seed=SEED,
            name=f"{x:g}",
            limit_s=scale.limit_s,
        )
        for x in scale.loads
    }


def server_for(bench: Bench, scale: Scale, series: str, loads: Sequence[Load]) -> Served:
    """Everything fits twice where all of it stays resident, else the paper's 48,000 tokens, shortened."""
    deployment = main_deployment(TTFT_PANELS[HERE_TTFT.here_of or ""])
    ends = [session.rounds[-1] for session in loads[0].sessions]
    longest = [one.history_tokens + one.prompt_tokens + one.output_tokens + 32 for one in ends]
    tokens = max(2048, 4 * max(longest), round(scale.lengths * KV_CAPACITY_TOKENS[deployment.model]))
    return Served(
        model_dir=model_folder(bench.model, MODELS_DIR),
        series=series,
        keep="lru" if series == "Ideal" else "none",
        num_blocks=(max(tokens, 2 * sum(longest)) if series == "Ideal" else tokens) // 16,
        read_bytes_per_s=bench.read_bytes_per_s(deployment),
    )


def answered(server: Served, loads: Mapping[float, Load]) -> Iterator[tuple[float, list[Asked]]]:
    """Every load on one server, one after the other."""
    with serving(server) as url:
        for place, (x, load) in enumerate(loads.items()):
            # Residents have grown with the load before; what is saved is still there; recomputation needs neither.
            is_prepared = server.series != "Ideal" and (place > 0 or server.series == "Recomputation")
            yield x, run_load(url, load, is_prepared=is_prepared)


def measure(bench: Bench, scale: Scale, series: str) -> Iterator[Row]:
    """Medians of time to first token, means of time between tokens, as the simulated panels."""
    slower = slowness(bench, scale)
    loads = loads_of(scale, slower)
    server = server_for(bench, scale, series, list(loads.values()))
    objective = Objective(ttft_s=1.0 * slower, tbt_s=0.1 * slower)
    for x, rounds in answered(server, loads):
        summary = summary_of(rounds, loads[x].offered_rounds_per_s, objective, warm_up=WARM_UP)
        yield from rows_of(bench, server, x, summary, f"this machine takes {slower:.2f} times as long")


def rows_of(bench: Bench, server: Served, x: float, summary: Summary, setting: str) -> Iterator[Row]:
    """Both panels' rows of one run; without a single answer they say so."""
    ways = ", ".join(f"{way} {count}" for way, count in summary.ways.items())
    speed = f"reads of {(server.read_bytes_per_s or 0) / 1e6:.0f} MB/s; " if server.is_emulated else ""
    note = (
        f"{summary.num_counted} rounds at {summary.offered_rounds_per_s:.2f}/s, {summary.achieved_rounds_per_s:.2f}/s "
        f"achieved{', SATURATED' if summary.is_saturated else ''}; {setting}; {speed}first token p99 "
        f"{summary.ttft_p99_s:.2f} s, between tokens p99 {1e3 * summary.tbt_p99_s:.0f} ms; {summary.goodput:.0%} "
        f"within {summary.objective.ttft_s:.2f} s and {1e3 * summary.objective.tbt_s:.0f} ms; {ways or 'no answer'}"
        f"{f'; {summary.num_failed} failed' if summary.num_failed else ''}"
        f"{f'; {summary.num_unfinished} not over at the limit' if summary.num_unfinished else ''}"
    )
    for panel, y in ((HERE_TTFT, summary.ttft_p50_s), (HERE_TBT, summary.tbt_mean_s)):
        yield Row(
            figure=ITEM.key,
            panel=panel.key,
            series=server.series,
            x=x,
            y=None if math.isnan(y) else y,
            unit="s",
            how=server.how,
            machine=bench.machine,
            note=note,
        )
