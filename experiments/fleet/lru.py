"""An LRU of whole contexts at every capacity at once, exact; and Che's approximation of it.

Contexts are a stack, the last used on top. A context is found again if it and all above it fit: what is above only
grows until it is used. So one number a round, the tokens down to its context, answers for every capacity (Mattson's
stack distances), and tiers that all see every use are capacities of one stack.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from experiments.fleet.traffic import Floats, Ints, Trace

NEVER = np.iinfo(np.int64).max
"""Depth of a context that was never there."""


def depths(trace: Trace) -> Ints:
    """For each round: tokens of its context and of all contexts used since its last round; `NEVER` for a first round.

    The contexts that were not used since are those whose last use was before and whose next is after: uses as
    intervals [use, next use), they enclose the round's own. All that is held, less those, is left.
    """
    held, previous = trace.held_tokens, trace.previous
    returns = np.flatnonzero(previous >= 0)
    last = previous[returns]
    was_held = np.where(previous >= 0, held[previous], 0)
    grown = np.cumsum(held - was_held)
    total_before = np.concatenate(([0], grown[:-1]))

    is_final = np.ones(len(held), dtype=bool)
    is_final[last] = False
    final = np.cumsum(np.where(is_final, held, 0))  # at `last`, which is not final, that is all before it
    by_last = np.argsort(last)
    enclosing = larger_before(by_last, held[last[by_last]])
    found = np.full(len(held), NEVER)
    found[returns] = total_before[returns] - final[last] - enclosing
    return found


def larger_before(order: Ints, weights: Ints) -> Ints:
    """For each value of the permutation `order`: the weights of larger values that come before it, summed.

    Values are put in order from the highest bit on; at each bit, a value without it has all those of its group before
    it that have it. No Python loop but over bits.
    """
    found = np.zeros(len(order), dtype=np.int64)
    places = np.arange(len(order))
    for bit in reversed(range(max(1, len(order)).bit_length())):
        group = order >> (bit + 1) << (bit + 1)  # position where the values that agree in higher bits begin
        has = (order >> bit & 1).astype(bool)
        lacks = ~has
        ahead = _before(np.where(has, weights, 0), group)
        found[order[lacks]] += ahead[lacks]
        with_bit = _before(has.astype(np.int64), group)
        target = np.where(has, group + (1 << bit) + with_bit, places - with_bit)
        order, weights = _moved(order, target), _moved(weights, target)
    return found


def _before(values: Ints, group: Ints) -> Ints:
    """Sums of what comes before each in its group."""
    sums = np.cumsum(values) - values
    return sums - sums[group]


def _moved(values: Ints, target: Ints) -> Ints:
    moved = np.empty_like(values)
    moved[target] = values
    return moved


def characteristic_times_s(trace: Trace, capacities: npt.ArrayLike, *, since_s: float, snapshots: int = 16) -> Floats:
    """Che's times: how long an LRU of each capacity (tokens) remembers, as if it were equally long for all. Contexts
    used within that time just fill it; seen at a few moments from `since_s` on. Infinite when everything fits."""
    seen = _snapshots(trace, since_s, snapshots)
    asked = np.asarray(capacities, dtype=np.float64)
    return np.array([np.mean([_age_s(ages_s, tokens, one) for ages_s, tokens in seen]) for one in asked])


def _snapshots(trace: Trace, since_s: float, count: int) -> list[tuple[Floats, Ints]]:
    """(ages of the contexts, youngest first; tokens of all up to each)."""
    held, next_s, found = trace.held_tokens, trace.next_s, []
    for now_s in np.linspace(since_s, trace.horizon_s, count + 1)[1:]:
        is_last = (trace.at_s <= now_s) & (next_s > now_s)
        ages_s = now_s - trace.at_s[is_last][::-1]  # rounds are in order of time
        found.append((ages_s, np.cumsum(held[is_last][::-1])))
    return found


def _age_s(ages_s: Floats, tokens: Ints, capacity_tokens: float) -> float:
    idx = int(np.searchsorted(tokens, capacity_tokens, side="right"))
    return float(ages_s[idx]) if idx < len(ages_s) else float("inf")
