"""Decoders on DeepSpeed's model classes, with what capture and restoration need and what the host leaves out.

A mixin overrides the host's model where it must: dtype (float32 too), norm epsilons from the config, rotary from
float32 inverse frequencies, heads that do not add up to the hidden size, sliding windows, norms on Q and K, a tap at
each layer's QKV input, and K and V projected from saved rows at any position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.inference.v2.inference_utils import ActivationType, DtypeEnum
from deepspeed.inference.v2.model_implementations.inference_transformer_base import DSTransformerModelBase
from deepspeed.inference.v2.model_implementations.llama_v2.model import Llama2InferenceModel
from deepspeed.inference.v2.model_implementations.mixtral.model import MixtralInferenceModel
from deepspeed.inference.v2.model_implementations.opt.model import OPTInferenceModel
from deepspeed.inference.v2.modules import heuristics
from deepspeed.inference.v2.modules.configs import (
    DSLinearConfig,
    DSNormConfig,
    PositionalEmbeddingType,
    RotateHalfConfig,
)

from mii_hcache.core.geometry import ModelGeometry
from mii_hcache.engine.modules.norm import norm_heads
from mii_hcache.engine.parallel.group import RankGroup
from mii_hcache.engine.parallel.shards import gather_vocab, shard_attn_out
from mii_hcache.engine.rotary import head_size_of, inverse_frequencies, windows_of
from mii_hcache.runtime.tap import QkvInputTap

_DTYPES = {torch.float32: DtypeEnum.fp32, torch.bfloat16: DtypeEnum.bf16, torch.float16: DtypeEnum.fp16}


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One layer's parameters as plain tensors (the host's subclass costs a dispatch per use)."""

    qkv_w: torch.Tensor
    attn_out_w: torch.Tensor
    attn_norm_gamma: torch.Tensor
    mlp_norm_gamma: torch.Tensor
    mlp_1_w: torch.Tensor | None = None
    mlp_2_w: torch.Tensor | None = None
    qkv_b: torch.Tensor | None = None
    attn_out_b: torch.Tensor | None = None
    mlp_1_b: torch.Tensor | None = None
    mlp_2_b: torch.Tensor | None = None
    attn_norm_beta: torch.Tensor | None = None
    mlp_norm_beta: torch.Tensor | None = None
    q_norm_gamma: torch.Tensor | None = None
    k_norm_gamma: torch.Tensor | None = None
    moe_gate: torch.Tensor | None = None
    moe_mlp_1: torch.Tensor | None = None
    moe_mlp_2: torch.Tensor | None = None


def _plain(container: Any, *names: str) -> torch.Tensor | None:
    """The first of a container's parameters that exists, as a plain tensor; None also for a bias that another rank
    adds."""
    for name in names:
        if name in container.annotation_attrs:
            parameter = getattr(container, name)
            return None if parameter is None else parameter.as_subclass(torch.Tensor)  # type: ignore[no-any-return]
    return None


class DecoderMixin(DSTransformerModelBase):  # type: ignore[misc]
    """What every family shares. Comes before the host's model class in the bases."""

    def __init__(self, config: Any, engine_config: Any, base_mp_group: Any, group: RankGroup | None = None) -> None:
        """`group`: the ranks that this model's heads, inner rows and vocabulary are split over."""
        self.group = group if group is not None and group.size > 1 else None
        super().__init__(config=config, engine_config=engine_config, base_mp_group=base_mp_group)
        self.logits_via: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
        """Called in place of `joined_logits`: ranks do not know by themselves of which rows logits are wanted."""
        self.qkv_input_tap: QkvInputTap | None = None
        self.output_tap: Callable[[torch.Tensor], None] | None = None
        """Called with the last layer's output, `[num_tokens, hidden_size]`, before the final norm."""
        self.windows = windows_of(config)
        self.inv_freq: torch.Tensor | None = None
        if self.positional_embedding_type is PositionalEmbeddingType.rotate_half:
            self.inv_freq = inverse_frequencies(config)
        self.layers: list[LayerWeights] = []

    # --- what the host asks -------------------------------------------------------------------------------------

    @property
    def tp_rank(self) -> int:
        return 0 if self.group is None else self.group.rank

    @property
    def tp_size(self) -> int:
        return 1 if self.group is None else self.group.size

    @property
    def activation_dtype(self) -> DtypeEnum:
        return _DTYPES[self._config.dtype]

    @property
    def max_sequence_length(self) -> int:
        return int(self._config.max_seq_length)

    @property
    def head_size(self) -> int:
        return head_size_of(self._config)

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

    def make_qkv_layer(self) -> None:
        self.qkv = self._make_linear(self.model_dim, (self.n_heads_q + 2 * self.n_heads_kv) * self.head_size)

    def make_attn_out_layer(self) -> None:
        self.attn_out = self._make_linear(self.n_heads_q * self.head_size, self.model_dim)

    def _make_linear(self, in_channels: int, out_channels: int) -> Any:
        """The host's own asserts that the heads add up to the hidden size."""
        linear = DSLinearConfig(
            max_tokens=self._engine_config.state_manager.max_ragged_batch_size,
            in_channels=in_channels,
            out_channels=out_channels,
            input_dtype=self.activation_dtype,
            output_dtype=self.activation_dtype,
        )
        return heuristics.instantiate_linear(linear, self._engine_config)

    def transform_attn_out_param(self, param: torch.Tensor) -> Any:
        sharded = shard_attn_out(param, self)
        return None if sharded is None else self.attn_out.transform_param(sharded)

    def make_unembedding_layer(self) -> None:
        super().make_unembedding_layer()
        self._comm_logits = self._return_logits = None  # the host's, as large as its largest batch, and never used
        self.unembed.norm_eps = self.norm_eps

    def set_parameters(self, *args: Any, **kwargs: Any) -> None:
        super().set_parameters(*args, **kwargs)
        names = [field.name for field in fields(LayerWeights)]
        self.layers = [LayerWeights(**{name: _plain(layer, name) for name in names}) for layer in self._transformer]
        ends = self._non_transformer
        self.word_emb = _plain(ends, "word_emb")
        self.word_emb_pos = _plain(ends, "word_emb_pos")
        self.word_unembed = _plain(ends, "word_unembed")
        self.final_norm_gamma = _plain(ends, "final_norm", "final_norm_w")
        self.final_norm_beta = _plain(ends, "final_norm_b")
        if self.inv_freq is not None:
            self.inv_freq = self.inv_freq.to(self.layers[0].qkv_w.device)
        self.attn.prepare(self.inv_freq, self.max_sequence_length, self.windows)

    def get_kv_requirements(self, sequence: Any, max_new_tokens: int, max_new_blocks: int) -> tuple[int, int]:
        """As the host, but never negative: a sequence may hold more blocks than its next tokens need."""
        num_tokens, num_blocks = super().get_kv_requirements(sequence, max_new_tokens, max_new_blocks)
        return num_tokens, max(0, num_blocks)

    def maybe_allocate_kv(self, sequence: Any, n_new_tokens: int) -> None:
        """As the host (the engine has checked that the blocks are there), but behind the blocks the sequence holds."""
        held = sequence.cur_allocated_blocks
        missing = -(-(sequence.seen_tokens + n_new_tokens) // self.attn.kv_block_size) - held
        if missing > 0:
            last = int(sequence.kv_cache_ids(on_device=False)[0, held - 1]) if held else None
            sequence.extend_kv_cache(self.state_manager._kv_cache._allocators[0].allocate(missing, after=last))

    def get_remaining_block_capacity(self, sequence: Any) -> int:
        """Tokens that fit into the blocks the sequence holds (the host assumes that it holds no spare ones)."""
        return sequence.cur_allocated_blocks * self.attn.kv_block_size - sequence.seen_tokens  # type: ignore[no-any-return]

    def prepare_batch(self, wrapped_batch: Any) -> None:
        """Plan attention for a finalized batch. The host's batch carries only pointers into the table of block ids."""
        table = self.state_manager._all_block_ids[0]
        shadow = self.state_manager._all_block_ids_shadow[0]
        row_bytes = table.stride(0) * table.element_size()
        slots = [(pointer - table.data_ptr()) // row_bytes for pointer in wrapped_batch.table_pointers]
        self.attn.build_atoms(wrapped_batch, [shadow[slot, 0] for slot in slots])

    # --- forward ------------------------------------------------------------------------------------------------

    def embed_tokens(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """`[num_tokens]` ids and absolute positions to the residual stream that enters layer 0."""
        return self.embed.embed(token_ids, positions, self.word_emb, self.word_emb_pos)  # type: ignore[no-any-return]

    def project_qkv(self, layer: LayerWeights, hidden: torch.Tensor) -> torch.Tensor:
        """QKV of one layer before rotation: `[num_tokens, (num_heads + 2 * num_kv_heads) * head_size]`."""
        qkv = F.linear(hidden, layer.qkv_w, layer.qkv_b)
        if layer.q_norm_gamma is None or layer.k_norm_gamma is None:
            return qkv
        norm = getattr(self.attn, "norm_heads", norm_heads)  # a kernel of its own, where the modules have one
        return norm(  # type: ignore[no-any-return]
            qkv, layer.q_norm_gamma, layer.k_norm_gamma, self.n_heads_kv_local, self.norm_eps
        )

    def feed_forward(self, layer: LayerWeights, hidden: torch.Tensor) -> torch.Tensor:
        """What a layer's second half adds to the residual stream."""
        inner = self.mlp_1.forward(hidden, layer.mlp_1_w, layer.mlp_1_b)
        return self.mlp_2.forward(inner, layer.mlp_2_w, layer.mlp_2_b)  # type: ignore[no-any-return]

    def _joined(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum of what the ranks computed from their shares of a row."""
        return partial if self.group is None else self.group.all_reduce(partial)

    def _norm_for(
        self, layer_idx: int, residual: torch.Tensor, delta: torch.Tensor | None, tap: QkvInputTap | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream after what is added to it, and the layer's QKV input, which lies where `tap` wants it,
        or in the norm's own buffer until the next norm."""
        layer = self.layers[layer_idx]
        rows = None if tap is None else tap.rows_for(layer_idx, residual.shape[0])
        residual, hidden = self.norm.forward(residual, delta, layer.attn_norm_gamma, layer.attn_norm_beta, rows)
        if tap is not None:
            tap.tap(layer_idx, hidden)
        return residual, hidden

    def _run_layers(
        self, wrapped_batch: Any, stop_layer: int, tap: QkvInputTap | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Layers `[0, stop_layer)` of a batch. Returns the residual stream behind them, and the QKV input of layer
        `stop_layer` (in the norm's own buffer; of no meaning behind the last layer): `[num_tokens, hidden_size]`."""
        plan = self.attn.plan
        scale = self.attn._config.scale_factor
        token_ids = wrapped_batch.input_ids() if plan.token_ids is None else plan.token_ids
        # Straight to what modules do, here and below: torch's call around it is a microsecond, hundreds of times.
        attend, join_heads, norm = self.attn.forward, self.attn_out.forward, self.norm.forward
        residual = self.embed_tokens(token_ids, plan.positions)
        residual, hidden = self._norm_for(0, residual, None, tap)
        for layer_idx, layer in enumerate(self.layers[:stop_layer]):
            kv_cache = self.state_manager.get_cache(layer_idx)
            qkv = self.project_qkv(layer, hidden)
            attended = attend(qkv, kv_cache, wrapped_batch, self.inv_freq, scale, window=self.windows[layer_idx])
            attended = self._joined(join_heads(attended, layer.attn_out_w, layer.attn_out_b))
            residual, hidden = norm(residual, attended, layer.mlp_norm_gamma, layer.mlp_norm_beta)
            delta = self._joined(self.feed_forward(layer, hidden))
            if layer_idx + 1 < len(self.layers):
                residual, hidden = self._norm_for(layer_idx + 1, residual, delta, tap)
            else:
                residual.add_(delta)
        return residual, hidden

    def forward(self, wrapped_batch: Any) -> torch.Tensor:
        """One ragged batch. Returns logits of each sequence's last token, `[num_sequences, vocab_size]`."""
        residual, _ = self._run_layers(wrapped_batch, len(self.layers), self.qkv_input_tap)
        if self.output_tap is not None:
            self.output_tap(residual)
        return self.logits_of(residual, self.attn.plan.last_rows)

    def fill(self, wrapped_batch: Any, num_layers: int) -> None:
        """Write K and V of a batch's tokens in layers `[0, num_layers)`: a forward without logits, whose last layer
        is only a projection. Nothing is captured."""
        last = num_layers - 1
        plan = self.attn.plan
        _, hidden = self._run_layers(wrapped_batch, last, None)
        self.restore_kv(last, hidden, plan.positions, plan.slots)

    def logits_of(self, output: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Logits of chosen rows (`[num_rows]`, int64) of the last layer's output: `[num_rows, vocab_size]`."""
        return (self.logits_via or self.joined_logits)(output, rows)

    def joined_logits(self, output: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The same, by all ranks together: each must call."""
        logits = self.unembed(output, self.word_unembed, rows, self.final_norm_gamma, self.final_norm_beta)
        return logits if self.group is None else gather_vocab(logits, self.vocab_size, self.group)

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
        return self.norm.normalize(embedded, first.attn_norm_gamma, first.attn_norm_beta)  # type: ignore[no-any-return]

    def restore_kv(self, layer_idx: int, hidden: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> None:
        """Write K (normed and rotated) and V of saved rows (HCache equation 3) into the blocks, as a forward would.

        hidden: `[num_tokens, hidden_size]`, the layer's QKV input; positions: `[num_tokens]`, absolute; slots:
        `[num_tokens]`, rows of the layer's cache seen as `[num_blocks * block_size, ...]`; both int64. Runs on the
        current stream: the projection's output is of that stream's allocations, and nothing else uses it.
        """
        layer = self.layers[layer_idx]
        num_q = self.n_heads_q_local * self.head_size
        bias = None if layer.qkv_b is None else layer.qkv_b[num_q:]
        kv = F.linear(hidden, layer.qkv_w[num_q:], bias)
        kv_cache = self.state_manager.get_cache(layer_idx)
        self.attn.place(kv, kv_cache, positions, slots, self.inv_freq, layer.k_norm_gamma, self.norm_eps)


class LlamaModel(DecoderMixin, Llama2InferenceModel):  # type: ignore[misc]
    """RMSNorm, rotary, gated SiLU, MHA or GQA; with or without QKV biases, norms on Q and K, sliding windows."""


class GemmaModel(LlamaModel):
    """Gemma 1: norms store gamma - 1, the embedding is scaled, the gate is a tanh-approximated GELU."""

    @property
    def mlp_activation_fn(self) -> ActivationType:
        return ActivationType.GEGLU

    def make_mlp_1_layer(self) -> None:
        super().make_mlp_1_layer()
        self.mlp_1.activation = lambda x: F.gelu(x, approximate="tanh")

    def transform_norm_param(self, param: torch.Tensor) -> Any:
        return super().transform_norm_param((param.float() + 1.0).to(param.dtype))

    def embed_tokens(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        embedded = super().embed_tokens(token_ids, positions)
        return embedded * torch.tensor(self.model_dim**0.5, dtype=embedded.dtype)


class MixtralModel(DecoderMixin, MixtralInferenceModel):  # type: ignore[misc]
    """Llama's attention with a mixture of experts behind it."""

    def feed_forward(self, layer: LayerWeights, hidden: torch.Tensor) -> torch.Tensor:
        return self.moe(hidden, layer.moe_gate, layer.moe_mlp_1, layer.moe_mlp_2)  # type: ignore[no-any-return]


class OptModel(DecoderMixin, OPTInferenceModel):  # type: ignore[misc]
    """OPT with norms before the blocks: LayerNorm, learned positions, biases, ReLU."""
