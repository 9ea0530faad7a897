"""How much is asked: the real shapes on a GPU, and tiny ones that show on a CPU that everything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

METHODS = ("hidden", "kv", "auto", "cake", "hcache", "recompute")
"""Of the sweep, in the order in which they are asked for; each repetition begins with another one."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model of random weights and the room that it gets."""

    shape: str
    """Of `experiments.common.checkpoints.SHAPES`."""
    dtype: str
    contexts: tuple[int, ...]
    """Lengths that are restored, the ones that answer most first. Whole spans."""
    pool_tokens: int
    """Of the KV blocks."""
    gate_layers: int = 4
    changes: Mapping[str, int | float] | None = None
    """Fields of the model's config that are not the shape's."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What one run measures."""

    name: str
    models: tuple[Model, ...]
    """The first one is measured most thoroughly."""
    gate_dtypes: tuple[str, ...]
    gate_tokens: int
    gate_ragged: tuple[int, ...]
    block_size: int
    max_batch_tokens: int
    copy_bytes: tuple[int, ...]
    """Sizes of single copies."""
    many: tuple[int, int]
    """Bytes and number of the copies that are made one by one, batched, or as one."""
    product_tokens: tuple[int, ...]
    attention_tokens: tuple[int, ...]
    emulated_bytes_per_s: tuple[float, ...]
    emulated_tokens: int
    ttft_tokens: tuple[int, ...]
    new_tokens: int
    decode_batches: tuple[int, ...]
    decode_context: int
    decode_steps: int
    beside_tokens: int
    """History that is restored beside a decoding batch."""
    speed_contexts: tuple[int, ...]
    """Of the comparison with other engines."""
    repeats: int
    flush_bytes: int
    """Written between two repetitions on the device; twice as much on the host. More than the caches hold."""
    store_bytes: int
    """Of host memory, for saved state."""


H200 = Scale(
    name="h200",
    models=(
        Model(
            shape="llama2-7b",
            dtype="bfloat16",
            contexts=(16384, 4096, 1024, 8192, 2048, 32768),
            pool_tokens=96 << 10,
        ),
        Model(
            shape="llama3-8b",
            dtype="bfloat16",
            contexts=(16384, 4096, 1024, 8192, 2048, 32768),
            pool_tokens=64 << 10,
            changes={"vocab_size": 128256, "rope_theta": 500000.0},
        ),
        Model(
            shape="llama2-13b",
            dtype="bfloat16",
            contexts=(16384, 4096, 1024, 8192, 2048, 32768),
            pool_tokens=48 << 10,
        ),
    ),
    gate_dtypes=("bfloat16", "float16"),
    gate_tokens=2048,
    gate_ragged=(1, 63, 64, 65, 2047),
    block_size=64,
    max_batch_tokens=2048,
    copy_bytes=tuple(4096 << shift for shift in range(0, 17, 2)),
    many=(512 << 10, 256),
    product_tokens=(256, 512, 1024, 2048, 4096, 8192, 16384, 32768),
    attention_tokens=(4096, 16384),
    emulated_bytes_per_s=(6.9e9, 13.8e9, 27.6e9),
    emulated_tokens=16384,
    ttft_tokens=(16384, 4096),
    new_tokens=64,
    decode_batches=(1, 8, 32),
    decode_context=2048,
    decode_steps=256,
    beside_tokens=16384,
    speed_contexts=(512, 2048, 8192),
    repeats=10,
    flush_bytes=256 << 20,
    store_bytes=72 << 30,
)

TINY = Scale(
    name="tiny",
    models=(
        Model(shape="demo", dtype="bfloat16", contexts=(256, 512), pool_tokens=4096),
        Model(shape="demo", dtype="bfloat16", contexts=(512,), pool_tokens=2048, changes={"num_key_value_heads": 2}),
    ),
    gate_dtypes=("bfloat16", "float16"),
    gate_tokens=320,
    gate_ragged=(63, 65),
    block_size=16,
    max_batch_tokens=256,
    copy_bytes=(4096, 65536),
    many=(4096, 8),
    product_tokens=(64, 128),
    attention_tokens=(128,),
    emulated_bytes_per_s=(50e6,),
    emulated_tokens=256,
    ttft_tokens=(256,),
    new_tokens=16,
    decode_batches=(1, 2),
    decode_context=64,
    decode_steps=64,
    beside_tokens=512,
    speed_contexts=(96,),
    repeats=2,
    flush_bytes=1 << 20,
    store_bytes=256 << 20,
)

SCALES = {scale.name: scale for scale in (H200, TINY)}


def label(model: Model) -> str:
    """What rows call it."""
    heads = (model.changes or {}).get("num_key_value_heads")
    return f"{model.shape}-{heads}kv" if heads else model.shape
