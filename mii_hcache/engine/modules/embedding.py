"""Token (and learned position) embedding, and the output head, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mii_hcache.engine.modules.bases import EmbeddingModule, UnembeddingModule
from mii_hcache.engine.modules.norm import rms_norm


class Embedding(EmbeddingModule):
    """Rows of the embedding table, plus learned positions where the model has them (OPT)."""

    def embed(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        word_embeddings: torch.Tensor,
        position_embeddings: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`[num_tokens]` ids and positions to `[num_tokens, hidden_size]`."""
        embedded = F.embedding(token_ids, word_embeddings)
        if position_embeddings is not None:
            embedded = embedded + F.embedding(positions + self._config.positional_offset, position_embeddings)
        return embedded


class Unembedding(UnembeddingModule):
    """Final norm and output head for chosen rows."""

    norm_eps: float = 1e-5
    """Set by the model from its config: the host has no field for it."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        vocab_embedding: torch.Tensor,
        rows: torch.Tensor,
        gamma: torch.Tensor | None = None,
        beta: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden_states: `[num_tokens, hidden_size]`; rows: `[num_rows]`, int64. Returns `[num_rows, vocab_size]`."""
        chosen = hidden_states[rows]
        norm_type = getattr(self._config.norm_type, "value", self._config.norm_type)
        if norm_type == "rms_norm":
            assert gamma is not None
            chosen = rms_norm(chosen, gamma, self.norm_eps)
        elif norm_type == "layer_norm":
            chosen = F.layer_norm(chosen, chosen.shape[-1:], gamma, beta, self.norm_eps)
        return F.linear(chosen, vocab_embedding)
