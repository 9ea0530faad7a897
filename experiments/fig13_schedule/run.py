"""The same history by tokens, by rounded tokens and by layers: linear costs, and with the paper's staircase."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from experiments.common.item import Context
from experiments.common.paper import paper_points
from experiments.common.rows import Row
from experiments.common.runner import main
from experiments.common.simulator import restored, stored
from experiments.fig13_schedule.config import DEPLOYMENT, ITEM, SPLITS, TOKENS


def projection_s(num_tokens: int) -> float:
    """One layer's projection in the paper's panel b. Points that it leaves out lie on the step of the one before."""
    return [time_s for tokens, time_s in paper_points(ITEM.key, "b", "GEMM") if tokens <= num_tokens][-1]


def staircase_s(num_hidden_tokens: int, hidden_layers: int) -> float:
    """The busier resource: reads of hidden rows, or projecting them with the staircase and recomputing the rest."""
    cost, num_layers = DEPLOYMENT.cost, DEPLOYMENT.geometry.num_layers
    recomputed = num_layers * TOKENS - hidden_layers * num_hidden_tokens
    compute_s = hidden_layers * projection_s(num_hidden_tokens) + cost.c_token_s * recomputed
    return max(hidden_layers * num_hidden_tokens * cost.io_hidden_s, compute_s)


def measure(_: Context) -> Iterator[Row]:
    """The same at every scale."""
    for split, method in SPLITS.items():
        plan, storage = restored(DEPLOYMENT, method, TOKENS), stored(DEPLOYMENT, method)
        tokens = TOKENS - plan.recompute_tokens
        layers = storage.hidden_layers
        if method == "token-wise" and plan.closed_form is not None:
            tokens = round(plan.closed_form)  # the paper's split is not in whole spans
        times = {"HCache": staircase_s(tokens, layers), "HCache, linear costs": plan.timeline.makespan_s}
        for series, time_s in times.items():
            yield Row(
                figure=ITEM.key,
                panel="a",
                series=series,
                x=split,
                y=TOKENS / time_s,
                unit="tokens/s",
                how="simulated",
                machine=DEPLOYMENT.platform,
                note=f"{tokens} tokens of {layers} layers from hidden states; {DEPLOYMENT.basis}",
            )
    yield Row(
        figure=ITEM.key,
        panel="b",
        series="GEMM",
        x=TOKENS,
        y=None,
        unit="s",
        how="measured",
        note="not yet measured: a sweep of matrix products on a GPU",
    )


if __name__ == "__main__":
    sys.exit(main([*sys.argv[1:], "--no-plots", ITEM.key]))
