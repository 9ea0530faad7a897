"""The paper's rules, closed forms over linear costs, exactly as printed; and the optimum of that linear model.

The rules know no latency, no slow-down and no price of placing K and V; attention counts as part of C_token at the
length they are given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

from mii_hcache.core.cost import LayerCost


class Split(NamedTuple):
    """How many of `num_layers` layers (or how much of a length) a rule gives to its first method."""

    closed_form: float
    """As the equation has it."""
    ceiled: int
    """The equation's own rounding."""
    best: int
    """The better of floor and ceiling by the equation's objective."""


def _rounded(closed_form: float, objective: Callable[[int], float]) -> Split:
    """The ceiling where both are equally good: it is the paper's."""
    ceiled, floored = math.ceil(closed_form - 1e-9), math.floor(closed_form + 1e-9)
    return Split(closed_form, ceiled, min((ceiled, floored), key=objective))


def mixes_with_kv(cost: LayerCost) -> bool:
    """Computing is what hidden states wait for, so the other method should need none (C_H > IO_H, IO-rich)."""
    return cost.c_hidden_s > cost.io_hidden_s


def hidden_share(cost: LayerCost, num_tokens: int) -> float:
    """Equation 11 for one layer or one token: what part is hidden states; the rest is kv or recomputed.

    The point where both resources end together. The best of these two methods when a hidden row is smaller than a kv
    row, which the paper takes for granted: with grouped heads it often is not.
    """
    if mixes_with_kv(cost):
        return cost.io_kv_s / (cost.io_kv_s + cost.c_hidden_s - cost.io_hidden_s)
    slack_s = cost.io_hidden_s - cost.c_hidden_s
    token_s = cost.token_s(num_tokens)
    return token_s / (token_s + slack_s) if token_s + slack_s else 1.0


def hcache_split(cost: LayerCost, num_layers: int, num_tokens: int) -> Split:
    """Hidden layers of equation 11; the others are kv when `mixes_with_kv`, else recomputed. Objective: equation 10,
    and its mirror image for recomputation, which the paper does not print."""
    closed_form = num_layers * hidden_share(cost, num_tokens)
    token_s = cost.token_s(num_tokens)

    def objective(num_hidden: int) -> float:
        others = num_layers - num_hidden
        io_s, compute_s = cost.io_hidden_s * num_hidden, cost.c_hidden_s * num_hidden
        if mixes_with_kv(cost):
            return max(compute_s, io_s + cost.io_kv_s * others)
        return max(io_s, compute_s + token_s * others)

    return _rounded(closed_form, objective)


def naive_split(cost: LayerCost, num_layers: int, num_tokens: int) -> Split:
    """kv layers of the paper's naive hybrid (section 6.3.1): recompute the others, no hidden states."""
    token_s = cost.token_s(num_tokens)
    both_s = token_s + cost.io_kv_s
    closed_form = num_layers * (token_s / both_s if both_s else 1.0)

    def objective(num_kv: int) -> float:
        return max(cost.io_kv_s * num_kv, token_s * (num_layers - num_kv))

    return _rounded(closed_form, objective)


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Shares of all (token, layer) pairs by method, which add up to 1."""

    hidden: float
    kv: float
    recompute: float
    layer_token_s: float
    """The busier resource's time per layer and token: no plan is faster in the linear model."""


def best_mix(cost: LayerCost, num_tokens: int) -> Mix:
    """The optimum of the linear model: the least max(IO, compute) over all mixes of hidden, kv and recomputation.

    One resource row more than the sum row can be tight, so an optimum mixes at most two methods: it is one of the three
    pure ones, or two in such shares that both resources end together.
    """
    points = [
        (cost.c_hidden_s, cost.io_hidden_s),
        (cost.c_kv_s, cost.io_kv_s),
        (cost.token_s(num_tokens), 0.0),
    ]
    best_s, best_shares = math.inf, (1.0, 0.0, 0.0)
    for one, other in combinations(range(3), 2):
        surplus, deficit = (compute_s - io_s for compute_s, io_s in (points[one], points[other]))
        balanced = [deficit / (deficit - surplus)] if surplus * deficit < 0 else []
        for share in (0.0, 1.0, *balanced):
            time_s = max(share * points[one][axis] + (1 - share) * points[other][axis] for axis in (0, 1))
            if time_s < best_s:
                shares = [0.0, 0.0, 0.0]
                shares[one], shares[other] = share, 1 - share
                best_s, best_shares = time_s, (shares[0], shares[1], shares[2])
    hidden, kv, recompute = best_shares
    return Mix(hidden=hidden, kv=kv, recompute=recompute, layer_token_s=best_s)
