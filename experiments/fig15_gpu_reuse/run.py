"""Hit rate and mean time to first token under Zipf requests."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from statistics import fmean

from experiments.common.item import Context
from experiments.common.leval import task_requests
from experiments.common.reuse import lru_hits, zipf_weights
from experiments.common.rows import Row
from experiments.common.runner import main
from experiments.common.servers import BASIS, server_of
from experiments.common.workloads import LEVAL_TASKS
from experiments.fig15_gpu_reuse.config import ALPHAS, ITEM, METHODS, MODEL, NUM_CONTEXTS


def measure(context: Context) -> Iterator[Row]:
    """The scale decides how often popularity is dealt anew, and how many requests follow."""
    server = server_of(MODEL)
    num_seeds, num_requests = context.pick(smoke=(2, 500), small=(5, 2000), paper=(20, 10000))
    means = [task_requests(name, None).pairs[0] for name in LEVAL_TASKS]
    contexts = [means[idx % len(means)] for idx in range(NUM_CONTEXTS)]
    lengths = [history for history, _ in contexts]
    resident_s = {pair: server.first_token_s("Ideal", *pair) for pair in means}
    note = f"{NUM_CONTEXTS} contexts, {num_seeds} x {num_requests} requests, seeded; {BASIS}"
    for x, alpha in ALPHAS.items():
        requests: list[tuple[tuple[int, int], bool]] = []
        for seed in range(num_seeds):
            weights = zipf_weights(NUM_CONTEXTS, alpha)
            random.Random(seed).shuffle(weights)
            seen = lru_hits(lengths, weights, server.kv_capacity_tokens, num_requests, seed=seed)
            requests += [(contexts[idx], is_hit) for idx, is_hit in seen]
        hit_rate = fmean(is_hit for _, is_hit in requests)
        yield _row("b", "hit rate", x, hit_rate, "ratio", server.deployment.platform, note)
        for series in METHODS:
            missed_s = {pair: server.first_token_s(series, *pair) for pair in means}
            ttft_s = fmean((resident_s if is_hit else missed_s)[pair] for pair, is_hit in requests)
            yield _row("a", series, x, ttft_s, "s", server.deployment.platform, note)


def _row(panel: str, series: str, x: str, y: float, unit: str, machine: str, note: str) -> Row:
    return Row(
        figure=ITEM.key, panel=panel, series=series, x=x, y=y, unit=unit, how="simulated", machine=machine, note=note
    )


if __name__ == "__main__":
    sys.exit(main([*sys.argv[1:], "--no-plots", ITEM.key]))
