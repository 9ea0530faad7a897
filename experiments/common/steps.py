"""How long the engine computes on the machine at hand, as a request sees it: steps, and whole prefills."""

from __future__ import annotations

import math
import queue
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

from experiments.common.contenders import make_store
from mii_hcache.config import HCacheConfig
from mii_hcache.core.methods import METHODS
from mii_hcache.engine.ragged_engine import HCacheEngine
from mii_hcache.engine.service import EngineService
from mii_hcache.runtime.generation import GenerationRequest, GenerationResult, SamplingParams

PREFILLS = (1, 8, 16, 32, 64, 256, 512)
BATCHES = (1, 4)
SHORT_TOKENS = 16
BEHIND_TOKENS = 64
NUM_DECODED = 24
PAUSE_S = 0.2
"""Before a prefill: a request comes to an engine that idles, with cold caches and threads that sleep. On two cores of a
Xeon, 16 tokens take a third longer then."""


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Seconds of an engine that does nothing else."""

    prefills_s: tuple[tuple[int, float], ...]
    """(tokens, seconds) of a step that prefills so many, after a pause."""
    decodes_s: tuple[tuple[int, float], ...]
    """(rounds, seconds) of a step that decodes a batch, right after another."""
    context_s: float
    """More for a step, per token of history of a sequence in it."""
    pair_s: float
    """More for a prefill behind a history, per token of it and token of the history."""


@contextmanager
def _service(engine: HCacheEngine, method: str) -> Iterator[EngineService]:
    """Which saves nothing."""
    service = EngineService(
        engine=engine,
        store=make_store(math.inf),
        method=METHODS[method],
        fingerprint=b"steps",
        config=HCacheConfig(method=method, keep="none"),
    )
    try:
        yield service
    finally:
        service.close()


def prefill_s(engine: HCacheEngine, num_tokens: int, repeats: int = 3) -> float:
    """The least time to the first token of a prompt: others on the machine only ever add."""
    with _service(engine, "recompute") as service:
        return min(_first_token_s(service, num_tokens, seed) for seed in range(1 + repeats))


def measure_steps(engine: HCacheEngine, long_tokens: int, repeats: int) -> Steps:
    """Medians. `long_tokens`: the history that tells what attention costs."""
    prefills_s, decodes_s = {}, {}
    with _service(engine, "recompute") as service:
        for size in PREFILLS:
            times_s = [_first_token_s(service, size, seed, PAUSE_S) for seed in range(1 + repeats)]
            prefills_s[size] = statistics.median(times_s[1:])
        for batch in BATCHES:
            decodes_s[batch] = statistics.median(_gaps_s(service, [SHORT_TOKENS] * batch))
        long_s = statistics.median(_gaps_s(service, [long_tokens]))
    context_s = max(0.0, long_s - decodes_s[1]) / (long_tokens - SHORT_TOKENS)
    with _service(engine, "ideal") as service:
        _first_token_s(service, long_tokens, 0)
        times_s = [_first_token_s(service, long_tokens + BEHIND_TOKENS, 0, PAUSE_S) for _ in range(1 + repeats)]
    more_s = statistics.median(times_s[1:]) - prefills_s[BEHIND_TOKENS] - context_s * long_tokens
    pair_s = max(0.0, more_s) / (BEHIND_TOKENS * long_tokens)
    return Steps(
        prefills_s=tuple(prefills_s.items()), decodes_s=tuple(decodes_s.items()), context_s=context_s, pair_s=pair_s
    )


def _first_token_s(service: EngineService, num_tokens: int, seed: int, pause_s: float = 0.0) -> float:
    """The tokens of a longer prompt begin with those of a shorter one of the same seed."""
    time.sleep(pause_s)
    (times_s,) = _token_times(service, [num_tokens], 1, seed)
    return times_s[0]


def _gaps_s(service: EngineService, prompts: Sequence[int]) -> list[float]:
    """Between the tokens of requests that decode side by side: while all of them do."""
    every = _token_times(service, prompts, NUM_DECODED, 0)
    all_s, any_over_s = max(times_s[0] for times_s in every), min(times_s[-1] for times_s in every)
    times_s = [at_s for at_s in every[0] if all_s <= at_s <= any_over_s]
    return [after_s - before_s for before_s, after_s in pairwise(times_s)]


def _token_times(service: EngineService, prompts: Sequence[int], num_new: int, seed: int) -> list[list[float]]:
    """Of requests with prompts of so many random tokens, sent at once: when each of their tokens came, in seconds since
    then."""
    results: queue.SimpleQueue[GenerationResult] = queue.SimpleQueue()
    every: list[list[float]] = [[] for _ in prompts]
    rng = random.Random(f"steps/{seed}")
    begin_s = time.perf_counter()
    for times_s, size in zip(every, prompts, strict=True):

        def on_token(_: int, times_s: list[float] = times_s) -> bool:
            times_s.append(time.perf_counter() - begin_s)
            return False

        service.submit(
            GenerationRequest(
                request_id=f"{time.monotonic_ns()}-{len(times_s)}-{id(times_s)}",
                prompt_token_ids=rng.choices(range(6, 2000), k=size),
                sampling=SamplingParams(max_new_tokens=num_new),
                on_token=on_token,
                on_finish=results.put,
            )
        )
    for _ in prompts:
        result = results.get()
        assert result.error is None, result.error
    return every
