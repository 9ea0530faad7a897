"""The best way to bring one history back: how many leading tokens to recompute, how many leading layers.

The busier resource's time without a bubble (`Restoration.bound_s`) first falls with the recomputed tokens, as reads
get fewer, then rises. Its lowest point is found by bisection; then the exact flow shop is asked for the counts around
it, as far as the bound leaves room for something better. So few are asked, and none that could win is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from mii_hcache.core.geometry import SPAN_TOKENS
from mii_hcache.core.plans import RestorePlan
from mii_hcache.core.restoration import Restoration

MAX_TIMELINES = 400
"""Most exact evaluations of one search: keeps a plan of any length within its time."""


def plan_of(restoration: Restoration, recompute_tokens: int, recompute_layers: int) -> RestorePlan:
    """One way, with its price."""
    return RestorePlan(
        num_tokens=restoration.num_tokens,
        recompute_tokens=recompute_tokens,
        recompute_layers=recompute_layers,
        timeline=restoration.timeline(recompute_tokens, recompute_layers),
    )


def prefill(restoration: Restoration) -> RestorePlan:
    """Everything recomputed."""
    return plan_of(restoration, restoration.num_tokens, 0)


def lowest_bound_s(restoration: Restoration, layer_options: Iterable[int]) -> float:
    """No way is faster than this."""
    lowest_s = restoration.bound_s(restoration.num_tokens, 0)
    for layers in layer_options:
        valley = _valley_of(restoration, layers, lowest_s)
        if valley is not None:
            lowest_s = min(lowest_s, restoration.bound_s(SPAN_TOKENS * valley, layers))
    return lowest_s


def fastest(restoration: Restoration, layer_options: Iterable[int]) -> RestorePlan:
    """The way with the least makespan, prefilling included; of equal ones a prefill, then the first that was tried."""
    best = prefill(restoration)
    left = MAX_TIMELINES
    stop = restoration.num_tokens // SPAN_TOKENS
    for layers in layer_options:
        valley = _valley_of(restoration, layers, best.timeline.makespan_s)
        if valley is None:
            continue
        least = restoration.least_tokens(layers) // SPAN_TOKENS
        for spans in (range(valley, stop), range(valley - 1, least - 1, -1)):
            for num_spans in spans:
                if left == 0 or restoration.bound_s(SPAN_TOKENS * num_spans, layers) >= best.timeline.makespan_s:
                    break
                left -= 1
                plan = plan_of(restoration, SPAN_TOKENS * num_spans, layers)
                if plan.timeline.makespan_s < best.timeline.makespan_s:
                    best = plan
    return best


def _valley_of(restoration: Restoration, layers: int, limit_s: float) -> int | None:
    """The spans to recompute at which the bound with this R is lowest. None when no number of them can be faster than
    `limit_s`, because computing alone takes that long: it grows with every span."""
    least = restoration.least_tokens(layers)
    if least == restoration.num_tokens or restoration.compute_bound_s(least, layers) >= limit_s:
        return None

    def bound_s(num_spans: int) -> float:
        return restoration.bound_s(SPAN_TOKENS * num_spans, layers)

    return _valley(bound_s, least // SPAN_TOKENS, restoration.num_tokens // SPAN_TOKENS - 1)


def _valley(value: Callable[[int], float], first: int, last: int) -> int:
    """Where a function that falls and then rises is lowest."""
    while first < last:
        middle = (first + last) // 2
        if value(middle + 1) < value(middle):
            first = middle + 1
        else:
            last = middle
    return first
