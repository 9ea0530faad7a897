"""Beyond the paper: what 16-bit rotary frequencies do to positions, in DeepSpeed's kernel that makes them itself.

Simulated arithmetic of `kv_rotary_pos_kernel` (deepspeed 0.19.8, `blocked_kv_rotary_cuda.cu`); nothing ran on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from experiments.common.item import Item, Panel


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """A model's rotary embedding and heads."""

    name: str
    theta: float
    query_group: int
    """Query heads of a KV head."""
    head_size: int = 128


MODELS = (
    Rotary(name="Llama-2", theta=1e4, query_group=1),
    Rotary(name="Llama-3", theta=5e5, query_group=4),
)
"""Llama-2-7B and 13B have K and V for each head; Llama-3-8B for four together."""

POSITIONS = tuple(1024 << doubling for doubling in range(8))
"""1,024 to 131,072 (neither model was trained that far; others with these thetas are)."""
BY_DIMENSION = (4096, 32768)
"""Positions whose dimensions are shown one by one."""

DTYPES = ("float16", "bfloat16")
KERNEL = {dtype: f"made by the kernel, {dtype}" for dtype in DTYPES}
"""Series: K, and the first query head of each group."""
FLOAT32 = "float32 (given to the kernel; ours)"
FAST_MATH = "float32, fast sine (modelled)"
ROUNDING = {dtype: f"rounding of K to {dtype} alone" for dtype in DTYPES}

_LLAMA_2, _LLAMA_3 = (model.name for model in MODELS)

ITEM = Item(
    folder="rope_drift",
    title="Beyond the paper: 16-bit rotary frequencies in DeepSpeed's kernel (arithmetic on a CPU, never run on a GPU)",
    claim="frequencies that are rounded to 16 bits turn K by radians at a few thousand tokens; with grouped queries "
    "most heads see that even between neighbours; float32 frequencies do not",
    how="simulated: the kernel's arithmetic step by step on a CPU, as its source reads; truth in float64. The effect "
    "on logits is that of a tiny model with random weights.",
    panels=(
        Panel(key="a", title=f"largest phase error, {_LLAMA_2}", x_label="position", y_label="rad", log_y=True),
        Panel(key="b", title=f"largest phase error, {_LLAMA_3}", x_label="position", y_label="rad", log_y=True),
        Panel(key="c", title="phase error at 4,096, by frequency", x_label="dimension / 2", y_label="rad", log_y=True),
        Panel(key="d", title="error of rotated K", x_label="position", y_label="of its length", log_y=True),
        Panel(key="e", title="error of scores over a context", x_label="tokens", y_label="of their size", log_y=True),
        Panel(key="f", title="a key's score with the query it matches", x_label="position", y_label="of the true one"),
        Panel(key="g", title="logits of a tiny random model", x_label="tokens", y_label="of their size", log_y=True),
        Panel(key="next tokens", title="its next tokens", x_label="tokens", y_label="share that is the same"),
        Panel(key="greedy", title="its greedy tokens up to the first that differs", x_label="tokens", y_label="tokens"),
    ),
    why="A trained model may bear more or less of this than a random one. Which GPU instructions stand for sine, "
    "cosine and power under `--use_fast_math` is modelled (argument in turns, rounded to float32), not measured.",
)
