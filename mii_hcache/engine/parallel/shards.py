"""Which part of a model a rank holds, where the host leaves that open or gets it wrong.

Heads are split, groups of query heads together with their kv head; where there are fewer kv heads than ranks, ranks of
one group hold the same kv head. Inner rows of the feed-forward part are split in pieces of 32, the vocabulary of the
output head row by row. Embeddings and norms are whole everywhere. Biases behind a sum over ranks are rank 0's to add.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.inference.v2.model_implementations.sharding.types import DEFAULT_SHARD_GRANULARITY
from deepspeed.inference.v2.model_implementations.sharding.unembed import sharded_unembed_dim

from mii_hcache.engine.parallel.group import RankGroup


def heads_of(rank: int, size: int, num_heads: int, num_kv_heads: int) -> tuple[range, range]:
    """Query heads and kv heads of a rank, as the host's QKV sharding cuts them."""
    ratio = num_heads // num_kv_heads
    if num_kv_heads >= size:
        share = num_kv_heads // size
        return range(rank * share * ratio, (rank + 1) * share * ratio), range(rank * share, (rank + 1) * share)
    ranks_of_head = size // num_kv_heads
    kv_head, place = divmod(rank, ranks_of_head)
    share, more = divmod(ratio, ranks_of_head)
    start = kv_head * ratio + place * share + min(place, more)
    return range(start, start + share + (place < more)), range(kv_head, kv_head + 1)


def shard_attn_out(param: torch.Tensor, model: Any) -> torch.Tensor | None:
    """This rank's columns of the attention output's weight, its bias on rank 0 and else None. The host's own asserts
    that the heads add up to the hidden size."""
    if model.group is None:
        return param
    if param.dim() == 1:
        return param if model.tp_rank == 0 else None
    heads, _ = heads_of(model.tp_rank, model.tp_size, model.n_heads_q, model.n_heads_kv)
    columns = param[:, heads.start * model.head_size : heads.stop * model.head_size]
    return columns.contiguous()  # the host lays parameters out one behind the other, by their strides


def gather_vocab(logits: torch.Tensor, vocab_size: int, group: RankGroup) -> torch.Tensor:
    """Every rank's columns side by side. logits: `[num_rows, share of the vocabulary]`; returns `[num_rows,
    vocab_size]`."""
    shares = [sharded_unembed_dim(vocab_size, rank, group.size) for rank in range(group.size)]
    num_rows, widest = logits.shape[0], max(shares)
    own = logits.new_zeros(num_rows, widest)
    own[:, : logits.shape[1]] = logits
    gathered = logits.new_empty(group.size * num_rows, widest)
    group.all_gather_rows(gathered, own)
    parts = gathered.view(group.size, num_rows, widest)
    return torch.cat([parts[rank, :, :share] for rank, share in enumerate(shares)], dim=-1)


def split_refusal(config: Any, size: int) -> str | None:
    """Why a model cannot be split over so many ranks, from its transformers config; None when it can."""
    num_heads = int(config.num_attention_heads)
    num_kv_heads = int(getattr(config, "num_key_value_heads", None) or num_heads)
    inner = int(getattr(config, "intermediate_size", None) or config.ffn_dim)
    reason = None
    if num_heads < size:
        reason = f"it has {num_heads} heads"
    elif num_kv_heads >= size and num_kv_heads % size:
        reason = f"its {num_kv_heads} kv heads are no multiple of that"
    elif num_kv_heads < size and size % num_kv_heads:
        reason = f"that is no multiple of its {num_kv_heads} kv heads"
    elif num_kv_heads < size and num_heads // num_kv_heads < size // num_kv_heads:
        reason = f"a kv head has {num_heads // num_kv_heads} query heads"
    elif inner % DEFAULT_SHARD_GRANULARITY or inner < size * DEFAULT_SHARD_GRANULARITY:
        reason = f"its inner size {inner} is not cut into pieces of {DEFAULT_SHARD_GRANULARITY}, one for each rank"
    return None if reason is None else f"this {config.model_type} model cannot be split over {size} ranks: {reason}"
