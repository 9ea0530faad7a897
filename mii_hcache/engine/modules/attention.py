"""Causal attention over paged K and V, in plain PyTorch.

The protocol, fixed for every implementation:

    attn(qkv, kv_cache, batch, inv_freq, scale, softcap=None, window=None, query_positions=None)

qkv: `[num_tokens, (num_heads + 2 * num_kv_heads) * head_size]`; kv_cache: `[num_blocks, block_size, 2, num_kv_heads,
head_size]`; inv_freq: `[rotary_dim / 2]` float32, or None for models without rotary embedding. Rotates q and k, writes
k and v into the blocks, attends. Returns `[num_tokens, num_heads * head_size]`. qkv is the module's to overwrite.

    attn.place(kv, kv_cache, positions, slots, inv_freq, k_gamma=None, eps=0.0)

writes restored rows, with the same arithmetic: kv `[num_tokens, 2 * num_kv_heads * head_size]` as projected (bias in;
overwritten at will); positions, slots `[num_tokens]`, int64: absolute, and in the cache seen as `[num_blocks *
block_size, ...]`; k_gamma `[head_size]`: weight of the norm over each key head, None for models without. No plan is
needed, and nothing of the module's is written but the blocks: it may run on another stream, beside a step.

    attn.prepare(inv_freq, num_positions, windows)

comes once, before all else: the model's frequencies, how many positions there are, the windows of its layers.

    attn.norm_heads(qkv, q_gamma, k_gamma, num_kv_heads, eps)

is there where a set of modules has something faster than `norm.norm_heads`, with the same arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch

from mii_hcache.engine.modules.attend import attend_gathered, attend_in_place, can_attend_in_place
from mii_hcache.engine.modules.bases import AttentionModule
from mii_hcache.engine.modules.norm import rms_norm
from mii_hcache.engine.modules.rope import rotary_tables, rotate


class PagedAttention(AttentionModule):
    """In plain torch, and the base of the Triton one."""

    block_size: int = 16
    """Tokens per KV block; set before an engine is built."""

    def __init__(self, config: Any, implementation_config: dict[str, Any]) -> None:
        super().__init__(config, implementation_config)
        self._block_size = type(self).block_size

    @property
    def kv_block_size(self) -> int:
        return self._block_size

    @property
    def q_block_size(self) -> int:
        return self._block_size

    def place(
        self,
        kv: torch.Tensor,
        kv_cache: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        inv_freq: torch.Tensor | None,
        k_gamma: torch.Tensor | None = None,
        eps: float = 0.0,
    ) -> None:
        rows = kv_cache.view(-1, *kv_cache.shape[2:])
        kv = kv.view(-1, *rows.shape[1:])
        if k_gamma is not None:
            kv[:, 0] = rms_norm(kv[:, 0], k_gamma, eps)
        if inv_freq is not None:
            kv[:, 0] = rotate(kv[:, 0], *rotary_tables(positions, inv_freq))
        rows[slots] = kv

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
        is_plain = softcap is None and query_positions is None
        for sequence in plan.sequences:
            own = slice(sequence.start, sequence.start + sequence.num_tokens)
            if is_plain and can_attend_in_place(kv_cache, sequence, window):
                out[own] = attend_in_place(q[own], k[own], v[own], kv_cache, sequence, scale, window)
            else:
                chosen = query_positions[own] if query_positions is not None else None
                out[own] = attend_gathered(q[own], kv_cache, sequence, chosen, scale, softcap, window)
        return out.view(num_tokens, num_heads * head_size)
