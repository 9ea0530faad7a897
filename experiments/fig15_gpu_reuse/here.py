"""The same on the machine at hand: a server that evicts when its pool is full (`--keep lru`), asked over HTTP."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import partial
from statistics import fmean

from experiments.common.asking import Question, Single, ask_histories, ask_in_turn
from experiments.common.bench import MODELS_DIR, Bench, bench_of, needs_gpu
from experiments.common.item import Cell, Context
from experiments.common.leval import task_requests
from experiments.common.models import main_deployment
from experiments.common.reuse import zipf_weights
from experiments.common.rows import Row
from experiments.common.served import Served, model_folder, serving
from experiments.common.servers import KV_CAPACITY_TOKENS
from experiments.common.workloads import LEVAL_TASKS
from experiments.fig15_gpu_reuse.config import ALPHAS, HERE_PANEL, HITS_HERE, ITEM, METHODS, MODEL, NUM_CONTEXTS


def cells(context: Context) -> Sequence[Cell]:
    """One for each method: a server of its own."""
    bench = bench_of(context)
    if bench is None:
        return needs_gpu(ITEM.key, (HERE_PANEL,))
    series = METHODS if context.scale != "smoke" else ("KV Offload", "HCache")
    return [Cell(key=name, measure=partial(measure, bench, context, name)) for name in series]


def requests_of(context: Context) -> dict[str, list[Question]]:
    """By exponent: which contexts are asked, the same for every method. Popularity is dealt anew for each."""
    factor, num_contexts = context.pick(smoke=(1 / 24, 16), small=(1 / 16, NUM_CONTEXTS), paper=(1.0, NUM_CONTEXTS))
    num_requests = context.pick(smoke=8, small=40, paper=300)
    pairs = [task_requests(name, None).pairs[0] for name in LEVAL_TASKS]
    contexts = [
        Question(
            context=idx,
            history_tokens=round(factor * pairs[idx % len(pairs)][0]),
            prompt_tokens=max(1, round(factor * pairs[idx % len(pairs)][1])),
        )
        for idx in range(num_contexts)
    ]
    alphas = ALPHAS if context.scale != "smoke" else {x: ALPHAS[x] for x in ("Uniform", "2.0")}
    chosen = {}
    for x, alpha in alphas.items():
        rng = random.Random(f"fig15/{x}")
        weights = zipf_weights(num_contexts, alpha)
        rng.shuffle(weights)
        chosen[x] = rng.choices(contexts, weights, k=num_requests)
    return chosen


def pool_tokens(context: Context) -> int:
    """The paper's 48,000 tokens, shortened as its lengths are; fewer in the smoke run, which has fewer contexts."""
    return context.pick(smoke=1024, small=KV_CAPACITY_TOKENS[MODEL] // 16, paper=KV_CAPACITY_TOKENS[MODEL])


def measure(bench: Bench, context: Context, series: str) -> Iterator[Row]:
    """For each exponent the mean time to first token and the share of requests whose context was resident, of the
    second half of its requests; the first half fills the pool."""
    requests = requests_of(context)
    deployment = main_deployment(MODEL)
    tokens = pool_tokens(context)
    server = Served(
        model_dir=model_folder(bench.model, MODELS_DIR),
        series=series,
        keep="lru",
        num_blocks=tokens // 16,
        read_bytes_per_s=bench.read_bytes_per_s(deployment),
    )
    with serving(server) as url:
        every = {one.context: one for some in requests.values() for one in some}
        if server.method != "recompute":
            ask_histories(url, list(every.values()))
        for x, questions in requests.items():
            singles = ask_in_turn(url, questions, name=x)
            half = len(questions) // 2
            yield from _rows(bench, server, x, singles[half:], f"{len(every)} contexts in {tokens} tokens of memory")


def _rows(bench: Bench, server: Served, x: str, singles: Sequence[Single], setting: str) -> Iterator[Row]:
    hits = [one.way == "resident" for one in singles]
    missed_s = [one.ttft_s for one, is_hit in zip(singles, hits, strict=True) if not is_hit]
    missed = f"{1e3 * fmean(missed_s):.0f} ms when it was not" if missed_s else "it always was"
    note = f"{len(singles)} requests, one at a time; {setting}; the context was resident in {fmean(hits):.0%}, {missed}"
    about = {"figure": ITEM.key, "x": x, "machine": bench.machine, "note": note}
    ttft_s = fmean(one.ttft_s for one in singles)
    yield Row(panel=HERE_PANEL.key, series=server.series, y=ttft_s, unit="s", how=server.how, **about)
    if server.series == "HCache":  # the order of requests decides, so it is that of every method
        yield Row(panel="b", series=HITS_HERE, y=fmean(hits), unit="ratio", how="measured", **about)
