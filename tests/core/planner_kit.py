"""Models, the paper's own numbers, and strategies for costs: shared by the tests of the cost model and the planner."""

from __future__ import annotations

from hypothesis import strategies as st

from mii_hcache.core.cost import LayerCost
from mii_hcache.core.geometry import ModelGeometry


def model(layers: int, hidden: int, heads: int, kv_heads: int, head_size: int, ffn_weights: int) -> ModelGeometry:
    return ModelGeometry(
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=head_size,
        dtype="float16",
        ffn_weights=ffn_weights,
    )


LLAMA_2_7B = model(32, 4096, 32, 32, 128, 3 * 4096 * 11008)
LLAMA_2_13B = model(40, 5120, 40, 40, 128, 3 * 5120 * 13824)
OPT_30B = model(48, 7168, 56, 56, 128, 2 * 7168 * 28672)
GEMMA_7B = model(28, 3072, 16, 16, 256, 3 * 3072 * 24576)
QWEN3_06B = model(28, 1024, 16, 8, 128, 3 * 1024 * 3072)
LLAMA_3_8B = model(32, 4096, 32, 8, 128, 3 * 4096 * 14336)
QWEN25_7B = model(28, 3584, 28, 4, 128, 3 * 3584 * 18944)
LLAMA_3_70B = model(80, 8192, 64, 8, 128, 3 * 8192 * 28672)


def from_speeds(num_layers: int, *, kv: float, hidden_compute: float, recompute: float) -> LayerCost:
    """Costs from whole-model speeds in thousand tokens per second, as the paper's figures show them (`paper.md` 3.5):
    KV offload, projecting hidden states without reading, and recomputation. A hidden row is half a kv row (MHA)."""
    io_kv_s = 1 / (1e3 * kv * num_layers)
    return LayerCost(
        io_hidden_s=io_kv_s / 2,
        io_kv_s=io_kv_s,
        c_hidden_s=1 / (1e3 * hidden_compute * num_layers),
        c_token_s=1 / (1e3 * recompute * num_layers),
    )


PAPER_7B_4SSD = from_speeds(32, kv=46.2, hidden_compute=81.0, recompute=15.6)
PAPER_7B_4SSD_24GB = from_speeds(32, kv=46.2, hidden_compute=91.6, recompute=15.6)
PAPER_7B_1SSD = from_speeds(32, kv=13.6, hidden_compute=91.6, recompute=15.6)
PAPER_13B_4SSD = from_speeds(40, kv=29.9, hidden_compute=47.7, recompute=8.37)
PAPER_13B_1SSD = from_speeds(40, kv=8.81, hidden_compute=51.3, recompute=8.37)
PAPER_30B_4SSD = from_speeds(48, kv=14.1, hidden_compute=53.8, recompute=10.6)

_seconds = st.floats(1e-9, 1e-5)

costs = st.builds(
    LayerCost,
    io_hidden_s=_seconds,
    io_kv_s=_seconds,
    c_hidden_s=_seconds,
    c_kv_s=st.sampled_from([0.0, 1e-9, 1e-7]),
    c_token_s=st.floats(1e-5, 1e-4),
    c_attention_s=st.sampled_from([0.0, 1e-10, 1e-8]),
    io_start_s=st.sampled_from([0.0, 1e-6, 1e-4]),
    c_start_s=st.sampled_from([0.0, 1e-6, 1e-4]),
    c_forward_start_s=st.sampled_from([0.0, 1e-5, 1e-3]),
)
"""A whole layer costs more compute than one projection, as it does in every model."""

slowed_costs = st.builds(
    lambda cost, io, compute: LayerCost(**{**vars(cost), "io_slowdown": io, "compute_slowdown": compute}),
    costs,
    st.sampled_from([1.0, 1.1, 1.5]),
    st.sampled_from([1.0, 1.2, 2.0]),
)

linear_costs = st.builds(
    LayerCost, io_hidden_s=_seconds, io_kv_s=_seconds, c_hidden_s=_seconds, c_kv_s=_seconds, c_token_s=_seconds
)
