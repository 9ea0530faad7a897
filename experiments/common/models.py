"""The paper's models and the deployments that its figures use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from experiments.common.paper import paper_value
from mii_hcache.core.cost import HardwareProfile, LayerCost
from mii_hcache.core.geometry import ChunkKind, ModelGeometry
from mii_hcache.core.platforms import PLATFORMS

SSD_BYTES_PER_S = 6.9e9
"""One PM9A3 (the paper's section 6)."""
A100_HBM_BYTES_PER_S = 1.40e12
"""Effective: 0.9 of the datasheet."""


def _model(layers: int, hidden: int, heads: int, ffn_weights: int) -> ModelGeometry:
    return ModelGeometry(
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_size=128,
        dtype="float16",
        ffn_weights=ffn_weights,
    )


MODELS: Mapping[str, ModelGeometry] = {
    "Llama2-7B": _model(32, 4096, 32, 3 * 4096 * 11008),
    "Llama2-13B": _model(40, 5120, 40, 3 * 5120 * 13824),
    "OPT-30B": _model(48, 7168, 56, 2 * 7168 * 28672),
}

METHOD_OF: Mapping[str, str] = {
    "Recomputation": "recompute",
    "KV Offload": "kv",
    "HCache": "hcache",
    "HCache-O": "hidden",
    "Naive Hybrid": "naive-hybrid",
    "Ideal": "ideal",
    "Cake": "cake",
    "Auto": "auto",
}
"""The planner's method for each of the paper's names, and two that the paper does not have."""


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A model on a platform: what a restoration is simulated on."""

    model: str
    platform: str
    cost: LayerCost
    basis: str
    """Where the costs come from, for the notes of rows."""
    shape: ModelGeometry | None = None
    """Of a model that the paper does not have."""

    @property
    def geometry(self) -> ModelGeometry:
        """Of the model."""
        return self.shape or MODELS[self.model]


def with_ssds(platform: HardwareProfile, num_ssds: int) -> HardwareProfile:
    """The same GPUs with so many PM9A3, which they share."""
    base = platform.name.rsplit("-", 1)[0]
    return replace(platform, name=f"{base}-{num_ssds}ssd", read_bytes_per_s={"file": num_ssds * SSD_BYTES_PER_S})


def with_gpus(platform: HardwareProfile, num_gpus: int) -> HardwareProfile:
    """So many of these GPUs, tensor-parallel, on host memory: each link carries its share."""
    read = num_gpus * platform.h2d_bytes_per_s
    name = f"{num_gpus}x{platform.name}" if num_gpus > 1 else platform.name
    link = PLATFORMS["4xa100-4ssd"].link_bytes_per_s
    return replace(platform, name=name, num_gpus=num_gpus, read_bytes_per_s={"memory": read}, link_bytes_per_s=link)


def deployed(model: str, platform: HardwareProfile) -> Deployment:
    """Costs from the platform's rates."""
    return Deployment(
        model=model,
        platform=platform.name,
        cost=platform.layer_cost(MODELS[model]),
        basis="costs from the rates in core/platforms.py, none of them fitted to this figure",
    )


@lru_cache(maxsize=16)
def main_deployment(model: str) -> Deployment:
    """What most of the paper's figures use: one A100 with four SSDs, OPT-30B on four."""
    return deployed(model, PLATFORMS["4xa100-4ssd" if model == "OPT-30B" else "a100-4ssd"])


def calibrated(model: str, platform: str, *, kv: float, recompute: float, projection: float, source: str) -> Deployment:
    """Costs from three whole-model speeds in tokens/s that the paper publishes for a machine: KV offload,
    recomputation, and projecting hidden states without reading. What the planner says of other methods is then a
    prediction; of these three it is not."""
    geometry = MODELS[model]
    io_kv_s = 1 / (kv * geometry.num_layers)
    smaller = geometry.row_bytes(ChunkKind.HIDDEN) / geometry.row_bytes(ChunkKind.KV)
    cost = LayerCost(
        io_hidden_s=io_kv_s * smaller,
        io_kv_s=io_kv_s,
        c_hidden_s=1 / (projection * geometry.num_layers),
        c_token_s=1 / (recompute * geometry.num_layers),
    )
    return Deployment(
        model=model,
        platform=platform,
        cost=cost,
        basis=f"costs fitted to the paper's KV Offload, Recomputation, {source}",
    )


def fitted(column: str, model: str, projection: float, source: str) -> Deployment:
    """`calibrated` with a column of the paper's figure 12."""
    return calibrated(
        model,
        column,
        kv=paper_value("fig12", "", "KV Offload", column),
        recompute=paper_value("fig12", "", "Recomputation", column),
        projection=projection,
        source=source,
    )
