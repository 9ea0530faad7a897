"""How many KV blocks a model gets, and how large they are, where nobody says so."""

from __future__ import annotations

from typing import Any

import torch

from mii_hcache.engine.parallel.group import RankGroup
from mii_hcache.engine.rotary import head_size_of
from mii_hcache.errors import ConfigError, UnsupportedModelError

DEFAULT_POOL_BYTES = 2 << 30
"""Most that the block pool takes on a CPU unless told otherwise."""
GPU_POOL_SHARE = 0.85
"""Share of the GPU memory left after loading the model that the block pool takes unless told otherwise."""


def default_num_blocks(
    config: Any, block_size: int, max_context_tokens: int, kernels: str, group: RankGroup | None
) -> int:
    """As many blocks as the memory set aside holds, on every rank."""
    size = 1 if group is None else group.size
    num_kv_heads = -(-(getattr(config, "num_key_value_heads", None) or config.num_attention_heads) // size)
    layer_numbers = block_size * 2 * num_kv_heads * head_size_of(config)
    block_bytes = config.num_hidden_layers * layer_numbers * config.dtype.itemsize
    if torch.cuda.is_available():
        free_bytes, _ = torch.cuda.mem_get_info()
        weights_bytes = _weights_bytes(config) // size
        budget_bytes = int((free_bytes - weights_bytes) * GPU_POOL_SHARE)
        # Offsets into a layer of the pool: the host's kernels have 32 bits for them, ours 64 (and 31 for block ids).
        most = 2**31 - 1
        if kernels == "stock":
            most //= layer_numbers
    else:
        budget_bytes = DEFAULT_POOL_BYTES // size
        most = -(-64 * max_context_tokens // block_size)
    num_blocks = int(min(budget_bytes // block_bytes, most))
    if group is not None:
        num_blocks = group.least(num_blocks)
    if num_blocks < 1:
        raise ConfigError(f"no memory for KV blocks: {budget_bytes} bytes left, a block takes {block_bytes}")
    return num_blocks


def _weights_bytes(config: Any) -> int:
    """Of all ranks together, norms and biases left out."""
    hidden_size, num_heads = config.hidden_size, config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    attention = hidden_size * head_size_of(config) * 2 * (num_heads + num_kv_heads)
    num_embedded = 2 * config.vocab_size
    if config.model_type == "opt":
        feed_forward = 2 * hidden_size * config.ffn_dim
        num_embedded += config.max_position_embeddings
    else:
        feed_forward = 3 * hidden_size * config.intermediate_size * getattr(config, "num_local_experts", 1)
    elements = config.num_hidden_layers * (attention + feed_forward) + num_embedded * hidden_size
    return int(elements * config.dtype.itemsize)


def stock_block_size(config: Any, model_path: str, max_context_tokens: int, num_blocks: int | None) -> int:
    """Tokens per block with DeepSpeed's kernels, which leave no choice. Raises when they cannot compute the model."""
    from mii_hcache.engine.modules import stock_limits

    reason = stock_limits.refusal_of(config, max_context_tokens)
    if reason is not None:
        raise UnsupportedModelError(
            f"model {model_path!r} cannot be computed by DeepSpeed's kernels (kernels='stock'): {reason}; take "
            "kernels='portable'"
        )
    most = stock_limits.most_blocks(config)
    if num_blocks is not None and num_blocks > most:
        raise ConfigError(f"kv_blocks is {num_blocks}; with kernels='stock' and this model at most {most} are found")
    return stock_limits.block_size_of(config)
