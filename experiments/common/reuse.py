"""An LRU cache of whole contexts in GPU memory, under requests that prefer some contexts (the paper's figure 15)."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Sequence


def zipf_weights(num_contexts: int, alpha: float) -> list[float]:
    """Popularity of the contexts, most popular first; alpha 0 is uniform. They add up to 1."""
    weights = [1 / rank**alpha for rank in range(1, num_contexts + 1)]
    total = sum(weights)
    return [weight / total for weight in weights]


def lru_hits(
    lengths: Sequence[int], weights: Sequence[float], capacity_tokens: int, num_requests: int, *, seed: int
) -> list[tuple[int, bool]]:
    """(context, was it resident) of each request, after as many requests that only fill the cache. A context that is
    larger than the cache is never resident."""
    rng = random.Random(seed)
    resident: OrderedDict[int, int] = OrderedDict()
    used_tokens, seen = 0, []
    for context in rng.choices(range(len(lengths)), weights, k=2 * num_requests):
        is_hit = context in resident
        seen.append((context, is_hit))
        if is_hit:
            resident.move_to_end(context)
            continue
        if lengths[context] > capacity_tokens:
            continue
        resident[context] = lengths[context]
        used_tokens += lengths[context]
        while used_tokens > capacity_tokens:
            used_tokens -= resident.popitem(last=False)[1]
    return seen[num_requests:]
