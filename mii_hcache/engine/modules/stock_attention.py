"""Attention by DeepSpeed's kernels: rotary and placing (`kv_trained_rotary_embeddings`), then blocked FlashAttention.

Never run on a GPU. The protocol is that of `engine.modules.attention`.

The kernel with given frequencies is used, never the one that computes them itself: that one truncates them to 16 bits
for K, and with grouped queries for one query head of each group only (`experiments/rope_drift` has numbers). So the
frequencies are float32 here as in our own modules, and scaled ones (Llama 3) work. DeepSpeed compiles with
`--use_fast_math`: sine and cosine lose accuracy as the angle grows, up to about 0.01 rad at position 100,000.

Restored K goes through the same kernel, with Q = K: each thread loads 16 bytes of both before it stores any, so the two
may be one tensor, and the bits are those that a forward writes.

Not known without a GPU: whether FlashAttention reads rows behind the end of a sequence's last block. With
`MII_HCACHE_POISON_BLOCKS=1` these hold NaN, and requests would fail that are right without it.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.inference.v2.kernels.ragged_ops import (
    AtomBuilder,
    BlockedFlashAttn,
    BlockedTrainedRotaryEmbeddings,
    LinearBlockedKVCopy,
    get_kv_block_size,
    get_q_block_size,
)
from deepspeed.inference.v2.modules.configs import PositionalEmbeddingType

from mii_hcache.engine.modules.bases import AttentionModule
from mii_hcache.engine.modules.norm import rms_norm
from mii_hcache.engine.modules.stock_rows import batch_of_rows
from mii_hcache.errors import HCacheError

_ATOM_INTS = 8
"""int32 of one atom, the unit of work of the host's FlashAttention: at most `q_block_size` queries of a sequence."""


class StockAttention(AttentionModule):
    """Outputs are fresh tensors, so a restore on another stream shares no buffer with it. `prepare` has nothing to do:
    `stock_limits.refusal_of` has seen to what the kernels cannot do of windows and positions."""

    def __init__(self, config: Any, implementation_config: dict[str, Any]) -> None:
        super().__init__(config, implementation_config)
        heads = (config.head_size, config.n_heads_q, config.n_heads_kv, config.input_dtype)
        rotates = PositionalEmbeddingType(config.positional_embedding_type) is PositionalEmbeddingType.rotate_half
        self._place = BlockedTrainedRotaryEmbeddings(*heads) if rotates else LinearBlockedKVCopy(*heads)
        self._attend = BlockedFlashAttn(config.head_size, config.input_dtype)
        self._build_atoms = AtomBuilder()
        self._kv_block_size = int(get_kv_block_size(config.head_size))
        self._q_block_size = int(get_q_block_size(config.head_size))
        self._longest = 0

    @property
    def kv_block_size(self) -> int:
        return self._kv_block_size

    @property
    def q_block_size(self) -> int:
        return self._q_block_size

    def build_atoms(self, ragged_batch: Any, block_tables: list[torch.Tensor]) -> None:
        rows = ragged_batch.descriptors
        self._longest = max(seen + count for _, count, seen in rows)
        # The host's module has room for one atom a sequence, which a few long prompts overrun.
        most = sum(-(-count // self._q_block_size) for _, count, _ in rows)
        atoms = torch.zeros(most, _ATOM_INTS, dtype=torch.int32)
        _, num_atoms = self._build_atoms(atoms, ragged_batch, self._q_block_size, self._kv_block_size)
        assert num_atoms == most
        self.plan = self._plan_of(ragged_batch, block_tables, extra=[atoms])

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
        """As the protocol says; rotates q and k within `qkv`. Raises HCacheError for what the kernels cannot do."""
        assert self.plan is not None
        if softcap is not None:
            raise HCacheError("DeepSpeed's attention kernel has no softcap")
        if query_positions is not None:
            raise HCacheError("DeepSpeed's attention kernel knows queries only at the end of their sequence")
        if window is not None and self._longest > window:
            raise HCacheError(f"DeepSpeed's attention kernel has no window; a sequence is longer than this of {window}")
        if inv_freq is not None:
            self._place(kv_cache, qkv, batch, inv_freq)
        else:
            self._place(kv_cache, qkv, batch)
        q = qkv[:, : self._config.n_heads_q * self._config.head_size]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        self._attend(out, q, kv_cache[:, :, 0], kv_cache[:, :, 1], self.plan.extra[0], scale)
        return out

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
        """As the protocol says."""
        rows = kv_cache.view(-1, *kv_cache.shape[2:])
        kv = kv.view(-1, *rows.shape[1:])
        if k_gamma is not None:
            kv[:, 0] = rms_norm(kv[:, 0], k_gamma, eps)
        if inv_freq is None:
            rows[slots] = kv
            return
        batch = batch_of_rows(positions, slots=slots)
        k, v = kv[:, 0].flatten(1), kv[:, 1].flatten(1)  # one stride for both, which the kernel takes from its Q
        self._place.kernel(
            rows[:, None],
            k,
            k,
            v,
            inv_freq,
            batch.batch_metadata_buffer(),
            batch.inflight_seq_descriptors(),
            batch.tokens_to_seq(),
            batch.kv_ptrs(),
        )
