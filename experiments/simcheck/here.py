"""One recorded load through a real server and through the simulator, method by method; and restores alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from statistics import fmean

from experiments.common.bench import Bench, bench_of, needs_gpu, throttled_cost
from experiments.common.contenders import race
from experiments.common.item import Cell, Context
from experiments.common.load import Load
from experiments.common.load_summary import Objective, percentile, summary_of
from experiments.common.models import METHOD_OF, Deployment, main_deployment
from experiments.common.rows import Row
from experiments.common.served import Served
from experiments.common.servers import MeasuredServer
from experiments.common.serving import Server, serve
from experiments.common.simulator import restored
from experiments.common.steps import Steps, measure_steps
from experiments.fig09_sharegpt.here import SCALES, WARM_UP, Scale, answered, loads_of, server_for, slowness
from experiments.simcheck.config import ITEM, PAIRS, RESTORES, SERIES
from mii_hcache.config import HCacheConfig

LIKE = "Llama2-7B"
"""The paper's model on whose platform reads are balanced."""


def cells(context: Context) -> Sequence[Cell]:
    """Restores alone, then one for each method."""
    bench = bench_of(context)
    if bench is None:
        return needs_gpu(ITEM.key, ITEM.panels)
    scale = scale_of(context)
    lengths: Sequence[int] = context.pick(smoke=(512,), small=(512, 2048), paper=(1024, 4096, 16384))
    made = [Cell(key=f"restore {num_tokens}", measure=partial(restores, bench, num_tokens)) for num_tokens in lengths]
    return made + [Cell(key=series, measure=partial(under_load, bench, scale, series)) for series in scale.series]


def scale_of(context: Context) -> Scale:
    """Figure 9's, with the methods that the simulator knows; the smoke run has one of them, at one load."""
    scale = SCALES[context.scale]
    if context.scale == "smoke":
        return replace(scale, series=("HCache",), loads=scale.loads[:1])
    return replace(scale, series=tuple(name for name in scale.series if name in SERIES))


@lru_cache(maxsize=4)
def deployment_of(bench: Bench) -> Deployment:
    """This machine with the bandwidth that the servers emulate, as it was profiled now."""
    rate = bench.read_bytes_per_s(main_deployment(LIKE))
    return Deployment(
        model=bench.model,
        platform=bench.machine,
        cost=throttled_cost(bench, rate),
        basis="costs and steps measured on this machine",
        shape=bench.engine.geometry,
    )


@lru_cache(maxsize=4)
def steps_of(bench: Bench) -> Steps:
    """Of this machine's engine."""
    return measure_steps(bench.engine, long_tokens=bench.num_tokens, repeats=max(2, bench.repeats))


def simulated_server(bench: Bench, served: Served) -> Server:
    """The same pool, step budget and slices for restores as the real one's."""
    steps, config = steps_of(bench), HCacheConfig()
    return MeasuredServer(
        deployment=deployment_of(bench),
        kv_capacity_tokens=16 * served.num_blocks,
        hbm_bytes_per_s=math.inf,
        step_start_s=0.0,
        budget_tokens=config.max_batch_tokens,
        restores_get=config.restore_slice_s / (config.restore_slice_s + steps.decodes_s[0][1]),
        prefills_s=steps.prefills_s,
        decodes_s=steps.decodes_s,
        context_s=steps.context_s,
        pair_s=steps.pair_s,
    )


def under_load(bench: Bench, scale: Scale, series: str) -> Iterator[Row]:
    """Measured and simulated numbers of one method, load by load."""
    loads = loads_of(scale, slowness(bench, scale))
    served = server_for(bench, scale, series, list(loads.values()))
    server = simulated_server(bench, served)
    for x, rounds in answered(served, loads):
        objective = Objective(ttft_s=1.0, tbt_s=1.0)
        summary = summary_of(rounds, loads[x].offered_rounds_per_s, objective, warm_up=WARM_UP)
        measured = (summary.ttft_p50_s, summary.ttft_mean_s, summary.tbt_mean_s)
        state = ", SATURATED" if summary.is_saturated else ""
        note = f"{summary.num_counted} rounds at {summary.offered_rounds_per_s:.2f}/s{state}"
        predicted = simulated(server, series, loads[x])
        kinds = list(PAIRS.items())[:3]
        for (_, keys), mine, its in zip(kinds, measured, predicted, strict=True):
            yield _row(bench, keys[0], series, x, mine, served.how, note)
            yield _row(bench, keys[1], series, x, its, "simulated", note)


def simulated(server: Server, series: str, load: Load) -> tuple[float, float, float]:
    """First token (median, mean) and mean time between tokens, of the rounds that count."""
    done = serve(server, series, load.sessions, think_s=load.think_s, until_s=load.limit_s)
    last_s = max(session.start_s for session in load.sessions)
    counted = [one for one in done if one.arrived_s >= WARM_UP * last_s]
    ttfts_s, tbts_s = [one.ttft_s for one in counted], [one.tbt_s for one in counted if one.tbt_s]
    ttft_mean_s, tbt_mean_s = (fmean(values) if values else math.nan for values in (ttfts_s, tbts_s))
    return percentile(ttfts_s, 0.5), ttft_mean_s, tbt_mean_s


def restores(bench: Bench, num_tokens: int) -> Iterator[Row]:
    """Restores that have the machine to themselves: the simulator's makespan against the real one."""
    deployment = deployment_of(bench)
    rate = bench.read_bytes_per_s(main_deployment(LIKE))
    methods = [METHOD_OF[name] for name in RESTORES]
    costs = {"memory": deployment.cost}
    outcomes = race(bench.engine, methods, rate, num_tokens, repeats=bench.repeats, costs=costs)
    measured_key, simulated_key = PAIRS["restore alone"]
    for series, outcome in zip(RESTORES, outcomes, strict=True):
        planned = "" if outcome.profiled_s is None else f"; the engine's own plan said {outcome.profiled_s:.3f} s"
        note = f"{num_tokens} tokens through reads of {rate / 1e6:.0f} MB/s, stored as {outcome.stored}{planned}"
        makespan_s = restored(deployment, series, num_tokens).timeline.makespan_s
        yield _row(bench, measured_key, series, num_tokens, outcome.restore_s, "emulated", note)
        yield _row(bench, simulated_key, series, num_tokens, makespan_s, "simulated", note)


def _row(bench: Bench, panel: str, series: str, x: float, y: float, how: str, note: str) -> Row:
    return Row(
        figure=ITEM.key,
        panel=panel,
        series=series,
        x=x,
        y=None if math.isnan(y) else y,
        unit="s",
        how=how,
        machine=bench.machine,
        note=note,
    )
