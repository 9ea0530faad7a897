"""Causal attention over paged K and V, in plain PyTorch.

The protocol, fixed for every implementation:

    attn(qkv, kv_cache, batch, inv_freq, scale, softcap=None, window=None, query_positions=None)

qkv: `[num_tokens, (num_heads + 2 * num_kv_heads) * head_size]`; kv_cache: `[num_blocks, block_size, 2, num_kv_heads,
head_size]`; inv_freq: `[rotary_dim / 2]` float32, or None for models without rotary embedding. Rotates q and k, writes
k and v into the blocks, attends. Returns `[num_tokens, num_heads * head_size]`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.inference.v2.modules.interfaces import DSSelfAttentionBase

from mii_hcache.engine.modules.batch_plan import BatchPlan, BatchSequence, make_plan
from mii_hcache.engine.modules.rope import rotate


class PagedAttention(DSSelfAttentionBase):  # type: ignore[misc]
    """One ragged batch at a time: `build_atoms` plans it, then each layer calls `forward`."""

    block_size: int = 16
    """Tokens per KV block; set before an engine is built."""

    def __init__(self, config: Any, implementation_config: dict[str, Any]) -> None:
        super().__init__(config, implementation_config)
        self._block_size = type(self).block_size
        self.plan: BatchPlan | None = None

    @staticmethod
    def name() -> str:
        return "dense_blocked_attention"

    @staticmethod
    def supports_config(config: Any) -> bool:
        return True

    @property
    def kv_block_size(self) -> int:
        return self._block_size

    @property
    def q_block_size(self) -> int:
        return self._block_size

    def build_atoms(self, ragged_batch: Any, block_tables: list[torch.Tensor] | None = None) -> None:
        """Plan a finalized batch. `block_tables[i]`: host block ids of sequence `i` of the batch."""
        assert block_tables is not None
        num_sequences = ragged_batch.current_sequences
        rows = ragged_batch.inflight_seq_descriptors(on_device=False)[:num_sequences].tolist()
        self.plan = make_plan(
            [(start, count, seen) for start, count, seen, _ in rows],
            block_tables,
            self._block_size,
            ragged_batch.input_ids().device,
        )

    def forward(
        self,
        qkv: torch.Tensor,
        kv_cache: torch.Tensor,
        batch: Any,
        inv_freq: torch.Tensor | None,
        scale: float,
        softcap: float | None = None,
        window: int | None = None,
        query_positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        plan = self.plan
        assert plan is not None
        num_tokens = qkv.shape[0]
        num_heads, num_kv_heads, head_size = self._config.n_heads_q, self._config.n_heads_kv, self._config.head_size
        q, k, v = qkv.split([num_heads * head_size, num_kv_heads * head_size, num_kv_heads * head_size], dim=-1)
        q = q.view(num_tokens, num_heads, head_size)
        k = k.view(num_tokens, num_kv_heads, head_size)
        v = v.view(num_tokens, num_kv_heads, head_size)
        if inv_freq is not None:
            cos, sin = plan.rotary(inv_freq)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        rows = kv_cache.view(-1, 2, num_kv_heads, head_size)
        rows[plan.slots] = torch.stack([k, v], dim=1)

        out = torch.empty_like(q)
        for sequence in plan.sequences:
            stop = sequence.start + sequence.num_tokens
            chosen = query_positions[sequence.start : stop] if query_positions is not None else None
            out[sequence.start : stop] = _attend(
                q[sequence.start : stop], kv_cache, sequence, chosen, scale, softcap, window
            )
        return out.view(num_tokens, num_heads * head_size)


def _causal_mask(positions: torch.Tensor, num_total: int, window: int | None) -> torch.Tensor:
    """`[num_queries, num_total]`: which keys each query may see."""
    key_positions = torch.arange(num_total, device=positions.device)
    mask = key_positions[None] <= positions[:, None]
    if window is not None:
        mask &= key_positions[None] > positions[:, None] - window
    return mask


def _attend(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    sequence: BatchSequence,
    positions: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> torch.Tensor:
    """q: `[num_tokens, num_heads, head_size]` of one sequence; positions: of its queries, None when they are the
    sequence's last tokens in order. Returns the shape of q."""
    num_kv_heads, head_size = kv_cache.shape[-2:]
    num_total = sequence.num_total
    kv = kv_cache[sequence.block_ids].view(-1, 2, num_kv_heads, head_size)[:num_total]
    keys, values = kv[:, 0].transpose(0, 1)[None], kv[:, 1].transpose(0, 1)[None]
    queries = q.transpose(0, 1)[None]
    is_gqa = queries.shape[1] != num_kv_heads

    sees_all = positions is None and sequence.num_tokens == 1 and window is None
    is_whole_prompt = positions is None and sequence.num_seen == 0 and window is None
    mask = None
    if not sees_all and (softcap is not None or not is_whole_prompt):
        at = torch.arange(sequence.num_seen, num_total, device=q.device) if positions is None else positions
        mask = _causal_mask(at, num_total, window)
    if softcap is None:
        attended = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None and not sees_all,
            scale=scale,
            enable_gqa=is_gqa,
        )
        return attended[0].transpose(0, 1)
    if is_gqa:
        group = queries.shape[1] // num_kv_heads
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    scores = softcap * torch.tanh((queries.float() @ keys.float().transpose(-1, -2)) * (scale / softcap))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ values.float()).to(q.dtype)[0].transpose(0, 1)
