"""The engines of the paper's evaluation, for time to first token and serving; and one whose steps were measured."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from experiments.common.models import A100_HBM_BYTES_PER_S, main_deployment
from experiments.common.paper import paper_points
from experiments.common.serving import Server

KV_CAPACITY_TOKENS = {"Llama2-7B": 48_000, "Llama2-13B": 17_000, "OPT-30B": 72_000}
"""The first two as the paper prints them; the third is what 160 GB leave beside the weights."""
Points = tuple[tuple[int, float], ...]
"""(tokens, seconds), in order; at least two."""
_FITTED_TO = {"Llama2-7B": ("fig14", "a"), "Llama2-13B": ("fig14", "b"), "OPT-30B": ("fig09", "f")}
"""Where the paper shows a step without restores at its smallest batch or load."""
BASIS = (
    "restores by the planner on assumed rates; a step costs weights, K and V at 1.4 TB/s a GPU, products, and a "
    "constant "
    "that is fitted to one point of the paper (Ideal, its smallest batch)"
)


@lru_cache(maxsize=8)
def server_of(model: str) -> Server:
    """On the deployment that most figures use."""
    deployment = main_deployment(model)
    num_gpus = 4 if model == "OPT-30B" else 1
    figure, panel = _FITTED_TO[model]
    shortest_s = paper_points(figure, panel, "Ideal")[0][1]
    bare = Server(
        deployment=deployment,
        kv_capacity_tokens=KV_CAPACITY_TOKENS[model],
        hbm_bytes_per_s=num_gpus * A100_HBM_BYTES_PER_S,
        step_start_s=0.0,
    )
    return Server(
        deployment=deployment,
        kv_capacity_tokens=bare.kv_capacity_tokens,
        hbm_bytes_per_s=bare.hbm_bytes_per_s,
        step_start_s=max(0.0, shortest_s - bare.step_s(1, 512, [])),
    )


@dataclass(frozen=True, kw_only=True)
class MeasuredServer(Server):
    """A step costs what steps of so many tokens took on the machine at hand, and what attention over their histories
    took. A prefill that joins decoding rounds adds what it takes beyond its first token."""

    prefills_s: Points
    decodes_s: Points
    """By rounds in the batch."""
    context_s: float
    """Per token of history of a round that decodes or prefills."""
    pair_s: float
    """Per token that is prefilled and token of its history."""

    def step_s(self, num_decoding: int, context_tokens: int, chunks: Iterable[tuple[int, int]]) -> float:
        """One step; as the base class has it."""
        num_tokens, pairs = 0, 0
        for start, count in chunks:
            num_tokens += count
            context_tokens += start
            pairs += count * start
        work_s = self.pair_s * pairs + self.context_s * context_tokens
        if num_tokens:
            work_s += between(self.prefills_s, num_tokens)
        if num_decoding:
            work_s += between(self.decodes_s, num_decoding) - (between(self.prefills_s, 1) if num_tokens else 0.0)
        return work_s


def between(points: Points, at: float) -> float:
    """On the straight line between the two points around it, or through the last two on its side; at least 0."""
    places = [place for place, _ in points]
    upper = min(max(1, bisect_left(places, at)), len(places) - 1)
    (low, low_s), (high, high_s) = points[upper - 1], points[upper]
    return max(0.0, low_s + (high_s - low_s) * (at - low) / (high - low))
