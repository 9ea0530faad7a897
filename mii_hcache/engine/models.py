"""Decoders on DeepSpeed's model classes, with what capture and restoration need and what the host leaves out.

A mixin overrides the host's model where it must: dtype (float32 too), norm epsilons from the config, rotary from
float32 inverse frequencies, a tap at each layer's QKV input, and K and V projected from saved rows at any position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.inference.v2.inference_utils import DtypeEnum
from deepspeed.inference.v2.model_implementations.inference_transformer_base import DSTransformerModelBase
from deepspeed.inference.v2.model_implementations.llama_v2.model import Llama2InferenceModel
from deepspeed.inference.v2.model_implementations.opt.model import OPTInferenceModel
from deepspeed.inference.v2.modules import heuristics
from deepspeed.inference.v2.modules.configs import DSNormConfig, PositionalEmbeddingType, RotateHalfConfig

from mii_hcache.core.geometry import ModelGeometry
from mii_hcache.engine.modules.rope import rotary_tables, rotate
from mii_hcache.errors import UnsupportedModelError

_DTYPES = {torch.float32: DtypeEnum.fp32, torch.bfloat16: DtypeEnum.bf16, torch.float16: DtypeEnum.fp16}

QkvInputTap = Callable[[int, torch.Tensor], None]
"""Called as `tap(layer_idx, hidden)` with hidden `[num_tokens, hidden_size]`. The buffer is reused by the next norm:
copy on the same stream before returning."""


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One layer's parameters as plain tensors (the host's subclass costs a dispatch per use)."""

    qkv_w: torch.Tensor
    attn_out_w: torch.Tensor
    mlp_1_w: torch.Tensor
    mlp_2_w: torch.Tensor
    attn_norm_gamma: torch.Tensor
    mlp_norm_gamma: torch.Tensor
    qkv_b: torch.Tensor | None = None
    attn_out_b: torch.Tensor | None = None
    mlp_1_b: torch.Tensor | None = None
    mlp_2_b: torch.Tensor | None = None
    attn_norm_beta: torch.Tensor | None = None
    mlp_norm_beta: torch.Tensor | None = None


def _plain(parameter: Any) -> torch.Tensor | None:
    return None if parameter is None else parameter.as_subclass(torch.Tensor)


def inverse_frequencies(config: Any) -> torch.Tensor:
    """Rotary inverse frequencies of a transformers config: `[rotary_dim / 2]`, float32. Raises UnsupportedModelError
    for variants that depend on the sequence length or rescale attention."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = getattr(config, "rope_parameters", None) or {}
    rope_type = parameters.get("rope_type", "default")
    if rope_type == "default":
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rotary_dim = int(head_size * parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).to(torch.float32) / rotary_dim
        return 1.0 / (float(parameters["rope_theta"]) ** exponents)
    if rope_type not in ("linear", "llama3"):
        raise UnsupportedModelError(f"rotary scaling {rope_type!r} is not served; served: default, linear, llama3")
    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"))
    if attention_factor != 1.0:
        raise UnsupportedModelError(f"rotary scaling {rope_type!r} rescales attention by {attention_factor:g}")
    return inv_freq.to(torch.float32)


class DecoderMixin(DSTransformerModelBase):  # type: ignore[misc]
    """What every family shares. Comes before the host's model class in the bases."""

    def __init__(self, config: Any, engine_config: Any, base_mp_group: Any) -> None:
        super().__init__(config=config, engine_config=engine_config, base_mp_group=base_mp_group)
        self.qkv_input_tap: QkvInputTap | None = None
        self.inv_freq: torch.Tensor | None = None
        if self.positional_embedding_type is PositionalEmbeddingType.rotate_half:
            self.inv_freq = inverse_frequencies(config)
        self.layers: list[LayerWeights] = []

    # --- what the host asks -------------------------------------------------------------------------------------

    @property
    def activation_dtype(self) -> DtypeEnum:
        return _DTYPES[self._config.dtype]

    @property
    def head_size(self) -> int:
        return getattr(self._config, "head_dim", None) or self.model_dim // self.n_heads

    @property
    def norm_eps(self) -> float:
        """Epsilon of every norm, from the model's config."""
        return float(getattr(self._config, "rms_norm_eps", 1e-5))

    @property
    def positional_embedding_config(self) -> RotateHalfConfig | None:
        if self.positional_embedding_type is not PositionalEmbeddingType.rotate_half:
            return None
        return RotateHalfConfig(use_trained_freqs=True)

    def make_norm_layer(self) -> None:
        self.norm = heuristics.instantiate_pre_norm(
            DSNormConfig(
                max_tokens=self._engine_config.state_manager.max_ragged_batch_size,
                type=self.norm_type,
                channels=self.model_dim,
                residual_dtype=self.activation_dtype,
                input_dtype=self.activation_dtype,
                output_dtype=self.activation_dtype,
                eps=self.norm_eps,
            ),
            self._engine_config,
        )

    def make_unembedding_layer(self) -> None:
        super().make_unembedding_layer()
        self.unembed.norm_eps = self.norm_eps

    def set_parameters(self, *args: Any, **kwargs: Any) -> None:
        super().set_parameters(*args, **kwargs)
        names = [field.name for field in fields(LayerWeights)]
        self.layers = [
            LayerWeights(**{name: _plain(getattr(layer, name, None)) for name in names}) for layer in self._transformer
        ]
        ends = self._non_transformer
        self.word_emb = _plain(ends.word_emb)
        self.word_emb_pos = _plain(getattr(ends, "word_emb_pos", None))
        self.word_unembed = _plain(ends.word_unembed)
        self.final_norm_gamma = _plain(
            getattr(ends, "final_norm", None) if hasattr(ends, "final_norm") else ends.final_norm_w
        )
        self.final_norm_beta = _plain(getattr(ends, "final_norm_b", None))
        if self.inv_freq is not None:
            self.inv_freq = self.inv_freq.to(self.word_emb.device)

    def get_kv_requirements(self, sequence: Any, max_new_tokens: int, max_new_blocks: int) -> tuple[int, int]:
        """As the host, but never negative: a sequence may hold more blocks than its next tokens need."""
        num_tokens, num_blocks = super().get_kv_requirements(sequence, max_new_tokens, max_new_blocks)
        return num_tokens, max(0, num_blocks)

    def get_remaining_block_capacity(self, sequence: Any) -> int:
        """Tokens that fit into the blocks the sequence holds (the host assumes that it holds no spare ones)."""
        return sequence.cur_allocated_blocks * self.attn.kv_block_size - sequence.seen_tokens

    def prepare_batch(self, wrapped_batch: Any) -> None:
        """Plan attention for a finalized batch. The host's batch carries only pointers into the table of block ids."""
        table = self.state_manager._all_block_ids[0]
        shadow = self.state_manager._all_block_ids_shadow[0]
        row_bytes = table.stride(0) * table.element_size()
        pointers = wrapped_batch.kv_ptrs(on_device=False)[: wrapped_batch.current_sequences].tolist()
        slots = [(pointer - table.data_ptr()) // row_bytes for pointer in pointers]
        self.attn.build_atoms(wrapped_batch, [shadow[slot, 0] for slot in slots])

    # --- forward ------------------------------------------------------------------------------------------------

    def embed_tokens(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """`[num_tokens]` ids and absolute positions to the residual stream that enters layer 0."""
        return self.embed.embed(token_ids, positions, self.word_emb, self.word_emb_pos)

    def project_qkv(self, layer_idx: int, hidden: torch.Tensor) -> torch.Tensor:
        """QKV of one layer before rotation: `[num_tokens, (num_heads + 2 * num_kv_heads) * head_size]`."""
        layer = self.layers[layer_idx]
        return F.linear(hidden, layer.qkv_w, layer.qkv_b)

    def forward(self, wrapped_batch: Any) -> torch.Tensor:
        """One ragged batch. Returns logits of each sequence's last token, `[num_sequences, vocab_size]`."""
        plan = self.attn.plan
        scale = self.attn._config.scale_factor
        residual = self.embed_tokens(wrapped_batch.input_ids(), plan.positions)
        first = self.layers[0]
        residual, hidden = self.norm(residual, None, first.attn_norm_gamma, first.attn_norm_beta)
        for layer_idx, layer in enumerate(self.layers):
            if self.qkv_input_tap is not None:
                self.qkv_input_tap(layer_idx, hidden)
            kv_cache = self.state_manager.get_cache(layer_idx)
            qkv = self.project_qkv(layer_idx, hidden)
            attended = self.attn(qkv, kv_cache, wrapped_batch, self.inv_freq, scale)
            attended = self.attn_out(attended, layer.attn_out_w, layer.attn_out_b)
            residual, hidden = self.norm(residual, attended, layer.mlp_norm_gamma, layer.mlp_norm_beta)
            delta = self.mlp_2(self.mlp_1(hidden, layer.mlp_1_w, layer.mlp_1_b), layer.mlp_2_w, layer.mlp_2_b)
            if layer_idx + 1 < len(self.layers):
                following = self.layers[layer_idx + 1]
                residual, hidden = self.norm(residual, delta, following.attn_norm_gamma, following.attn_norm_beta)
            else:
                residual.add_(delta)
        last_rows = torch.tensor(
            [sequence.start + sequence.num_tokens - 1 for sequence in plan.sequences], device=residual.device
        )
        return self.unembed(residual, self.word_unembed, last_rows, self.final_norm_gamma, self.final_norm_beta)

    # --- restoration --------------------------------------------------------------------------------------------

    @property
    def geometry(self) -> ModelGeometry:
        """Sizes that decide what one token's state weighs."""
        return ModelGeometry(
            num_layers=self.num_layers,
            hidden_size=self.model_dim,
            num_heads=self.n_heads_q,
            num_kv_heads=self.n_heads_kv,
            head_size=self.head_size,
            dtype=str(self._config.dtype).removeprefix("torch."),
        )

    def first_hidden(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """QKV input of layer 0, `[num_tokens, hidden_size]`, in memory of its own."""
        first = self.layers[0]
        embedded = self.embed_tokens(token_ids, positions)
        return self.norm.normalize(embedded, first.attn_norm_gamma, first.attn_norm_beta)

    def project_kv(self, layer_idx: int, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """K (rotated) and V of saved rows (HCache equation 3): `[num_tokens, 2, num_kv_heads, head_size]`.

        hidden: `[num_tokens, hidden_size]`, the layer's QKV input; positions: `[num_tokens]`, absolute.
        """
        layer = self.layers[layer_idx]
        num_q = self.n_heads_q_local * self.head_size
        bias = None if layer.qkv_b is None else layer.qkv_b[num_q:]
        projected = F.linear(hidden, layer.qkv_w[num_q:], bias)
        kv = projected.view(hidden.shape[0], 2, self.n_heads_kv_local, self.head_size)
        if self.inv_freq is not None:
            kv[:, 0] = rotate(kv[:, 0], *rotary_tables(positions, self.inv_freq))
        return kv


class LlamaModel(DecoderMixin, Llama2InferenceModel):  # type: ignore[misc]
    """Llama 1 to 3.2: RMSNorm, rotary (scaled or not), gated SiLU, MHA or GQA."""


class OptModel(DecoderMixin, OPTInferenceModel):  # type: ignore[misc]
    """OPT with norms before the blocks: LayerNorm, learned positions, biases, ReLU."""
