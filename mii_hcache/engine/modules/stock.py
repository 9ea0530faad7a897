"""DeepSpeed's own CUDA kernels in the places of our modules: `--kernels stock`.

Never run on a GPU. What was shown is that the kernels are called as their C++ bindings and launchers read (deepspeed
0.19.8), by stand-ins that check every argument and compute what the kernels compute.

The kernels are called by the host's wrappers, not by the host's modules: those share one output buffer each, which a
restore on another stream would overwrite, take the norm's epsilon only in part, and have the frequencies of the rotary
embedding truncated. Every call here returns fresh memory of the current stream, or what it is given to write in. A
mixture of experts stays ours, in plain torch. `engine.modules.stock_limits` says what is needed and which models can be
served.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.inference.v2.inference_utils import ActivationType, is_gated
from deepspeed.inference.v2.kernels.core_ops import (
    CUDAFPLN,
    BlasLibLinear,
    CUDABiasActivation,
    CUDAFPPreLN,
    CUDAGatedActivation,
    CUDARMSNorm,
    CUDARMSPreNorm,
)
from deepspeed.inference.v2.kernels.ragged_ops import RaggedEmbeddingKernel
from deepspeed.inference.v2.modules import interfaces

from mii_hcache.engine.modules import torch_dtype
from mii_hcache.engine.modules.bases import (
    EmbeddingModule,
    LayerNormModule,
    LinearModule,
    NormModule,
    RMSNormModule,
    UnembeddingModule,
)
from mii_hcache.engine.modules.stock_attention import StockAttention
from mii_hcache.engine.modules.stock_limits import why_not_stock
from mii_hcache.engine.modules.stock_rows import batch_of_rows
from mii_hcache.errors import ConfigError


def register_stock() -> None:
    """Put DeepSpeed's kernels into its registries, in the place of the portable modules. Raises ConfigError that says
    what is missing here and what to do."""
    reason = why_not_stock()
    if reason is not None:
        raise ConfigError(f"kernels='stock' cannot run here: {reason}; or take kernels='portable'")
    interfaces.DSSelfAttentionRegistry.register_module(StockAttention)
    interfaces.DSEmbeddingRegistry.register_module(StockEmbedding)
    interfaces.DSUnembedRegistry.register_module(StockUnembedding)
    interfaces.DSLinearRegistry.register_module(StockLinear)
    interfaces.DSPreNormRegistry.register_module(StockPreLayerNorm)
    interfaces.DSPreNormRegistry.register_module(StockPreRMSNorm)


class _StockNorm(NormModule):
    """By two kernels: the norm alone, and the norm of a sum that stays in the residual."""

    kernels: tuple[type, type]

    def __init__(self, config: Any, implementation_config: dict[str, Any]) -> None:
        super().__init__(config, implementation_config)
        dtype = torch_dtype(config.residual_dtype)
        self._norm, self._add_and_norm = (kernel(config.channels, dtype, epsilon=config.eps) for kernel in self.kernels)

    def normalize(
        self, x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor | None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self._norm(torch.empty_like(x) if out is None else out, x, *_given(gamma, beta))  # type: ignore[no-any-return]

    def forward(
        self,
        residual: torch.Tensor,
        hidden_states: torch.Tensor | None,
        gamma: torch.Tensor,
        beta: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if hidden_states is None:
            return residual, self.normalize(residual, gamma, beta, out)
        normed = torch.empty_like(residual) if out is None else out
        self._add_and_norm(residual, normed, residual, hidden_states, *_given(gamma, beta))
        return residual, normed


class StockPreRMSNorm(_StockNorm, RMSNormModule):
    """RMSNorm by DeepSpeed's kernels."""

    kernels = (CUDARMSNorm, CUDARMSPreNorm)


class StockPreLayerNorm(_StockNorm, LayerNormModule):
    """LayerNorm by DeepSpeed's kernels."""

    kernels = (CUDAFPLN, CUDAFPPreLN)


def _given(gamma: torch.Tensor, beta: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """A norm's parameters, as many as it has."""
    return (gamma,) if beta is None else (gamma, beta)


class StockLinear(LinearModule):
    """By cuBLAS and DeepSpeed's activations, which want the rows of gate and up interleaved, as the host's loader
    leaves them. GELU is the tanh approximation, gated or not."""

    def __init__(self, config: Any, implementation_config: dict[str, Any]) -> None:
        super().__init__(config, implementation_config)
        dtype = torch_dtype(config.output_dtype)
        activation = ActivationType(config.activation)
        self._is_gated = is_gated(activation)
        self._multiply = BlasLibLinear(dtype)
        kernel = CUDAGatedActivation if self._is_gated else CUDABiasActivation
        self._activate = kernel(config.out_channels, dtype, activation)

    def forward(self, hidden_states: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        product = hidden_states.new_empty(hidden_states.shape[0], w.shape[0])
        self._multiply(product, hidden_states, w)
        if not self._is_gated:
            self._activate(product, b)
            return product
        out = hidden_states.new_empty(hidden_states.shape[0], self._config.out_channels)
        self._activate(out, product, b)
        return out


class StockEmbedding(EmbeddingModule):
    """Rows of the embedding table, plus learned positions where the model has them (OPT)."""

    def __init__(self, config: Any, implementation_config: dict[str, Any]) -> None:
        super().__init__(config, implementation_config)
        dtype = torch_dtype(config.residual_dtype)
        self._embed = RaggedEmbeddingKernel(dtype, torch.int32, config.embedding_dim)

    def embed(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        word_embeddings: torch.Tensor,
        position_embeddings: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`[num_tokens]` ids and positions to `[num_tokens, hidden_size]`. Ids must lie within the table: the kernel
        writes nothing for others."""
        out = word_embeddings.new_empty(token_ids.numel(), word_embeddings.shape[1])
        batch = batch_of_rows(positions, token_ids=token_ids)
        self._embed(out, batch, word_embeddings, position_embeddings, self._config.positional_offset)
        return out


class StockUnembedding(UnembeddingModule):
    """Final norm and output head for chosen rows."""

    def __init__(self, config: Any, implementation_config: dict[str, Any]) -> None:
        super().__init__(config, implementation_config)
        dtype = torch_dtype(config.dtype)
        norm_type = getattr(config.norm_type, "value", config.norm_type)
        norm = {"rms_norm": CUDARMSNorm, "layer_norm": CUDAFPLN, None: None}[norm_type]
        self._norm = None if norm is None else norm(config.model_dim, dtype)
        self._multiply = BlasLibLinear(dtype)

    @property
    def norm_eps(self) -> float:
        """Set by the model from its config: the host has no field for it."""
        return float(self._norm.epsilon) if self._norm is not None else 0.0

    @norm_eps.setter
    def norm_eps(self, value: float) -> None:
        if self._norm is not None:
            self._norm.epsilon = value

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
        if self._norm is not None:
            assert gamma is not None
            self._norm(chosen, chosen, *_given(gamma, beta))
        out = chosen.new_empty(chosen.shape[0], vocab_embedding.shape[0])
        self._multiply(out, chosen, vocab_embedding)
        return out
