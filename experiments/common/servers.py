"""The engines of the paper's evaluation, for time to first token and serving."""

from __future__ import annotations

from functools import lru_cache

from experiments.common.models import A100_HBM_BYTES_PER_S, main_deployment
from experiments.common.paper import paper_points
from experiments.common.serving import Server

KV_CAPACITY_TOKENS = {"Llama2-7B": 48_000, "Llama2-13B": 17_000, "OPT-30B": 72_000}
"""The first two as the paper prints them; the third is what 160 GB leave beside the weights."""
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
