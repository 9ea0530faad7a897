"""The runtime's ports over plain Hugging Face transformers: a way in without DeepSpeed, and an oracle for tests.

One sequence per forward. Rows are those of the ragged engine, but a fingerprint of its own keeps the two engines' state
apart: their kernels round differently. Programs come in through `mii_hcache.attach`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
import transformers
from transformers import DynamicCache

from mii_hcache.core.geometry import ModelGeometry
from mii_hcache.engine.fingerprint import CAPTURE_POINT, STATE_FORMAT
from mii_hcache.engine.rotary import head_size_of
from mii_hcache.errors import RequestError, UnsupportedModelError
from mii_hcache.runtime.streams import Stream

_log = logging.getLogger(__name__)

FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "phi3")
"""What `model_type` may be: rotary decoders whose layers have an `input_layernorm` right before `self_attn`."""
ROTARY = ("default", "linear", "llama3", "yarn")
"""Rotary variants that turn a position the same way however long the sequence is."""
KERNELS = f"transformers-{transformers.__version__}"


class SequenceCache:
    """One sequence's DynamicCache by absolute position (`runtime.ports.KVTarget`).

    Restored K and V are staged, for DynamicCache can only grow at its end, layer by layer; `commit` hands them over.
    """

    def __init__(self, engine: TransformersEngine) -> None:
        self.cache = DynamicCache()  # without a config: sliding layers too keep every token
        self._engine = engine
        self._staged: list[torch.Tensor] = []

    def reserve(self, num_tokens: int) -> None:
        """Make room for the first `num_tokens` tokens of a restore."""
        geometry = self._engine.geometry
        shape = (2, 1, geometry.num_kv_heads, num_tokens, geometry.head_size)
        self._staged = [
            torch.empty(shape, dtype=self._engine.dtype, device=self._engine.device) for _ in range(geometry.num_layers)
        ]

    def prepare(self) -> None:
        pass  # what is staged was made by `reserve`

    def fill(self, start: int, token_ids: torch.Tensor, num_layers: int) -> None:
        if num_layers > 1:
            raise NotImplementedError("a transformers model fills its first layer only")
        self.project_hidden(0, start, self._engine.first_hidden(token_ids))

    def project_hidden(self, layer_idx: int, start: int, hidden: torch.Tensor) -> None:
        kv = self._engine.project_kv(layer_idx, start, hidden)
        self._rows(layer_idx, start, kv.shape[0]).copy_(kv)

    def write_kv(self, layer_idx: int, start: int, kv: torch.Tensor, stream: Stream) -> None:
        stream.copy(self._rows(layer_idx, start, kv.shape[0]), kv)

    def _rows(self, layer_idx: int, start: int, num_tokens: int) -> torch.Tensor:
        """`[num_tokens, 2, num_kv_heads, head_size]` of what is staged."""
        return self._staged[layer_idx][:, 0, :, start : start + num_tokens].permute(2, 0, 1, 3)

    def read_kv(self, layer_idx: int, start: int, out: torch.Tensor) -> None:
        layer: Any = self.cache.layers[layer_idx]
        rows = [states[0, :, start : start + out.shape[0]].transpose(0, 1) for states in (layer.keys, layer.values)]
        out.copy_(torch.stack(rows, dim=1), non_blocking=True)

    def gather_kv(self, layers: Sequence[int], start: int, out: torch.Tensor) -> None:
        for layer_idx, rows in zip(layers, out, strict=True):
            self.read_kv(layer_idx, start, rows)

    def commit(self, num_tokens: int) -> None:
        staged, self._staged = self._staged, []
        while staged and num_tokens:
            keys, values = staged.pop(0)[..., :num_tokens, :]
            self.cache.update(keys, values, self._engine.geometry.num_layers - len(staged) - 1)


class TransformersEngine:
    """A Hugging Face causal LM that holds sequences in caches (`runtime.ports.EngineAdapter`). One thread at a time.

    Raises UnsupportedModelError, which says what is served.
    """

    max_fill_tokens = 0

    def __init__(self, model: Any) -> None:
        reason = _refusal(model)
        if reason is not None:
            raise UnsupportedModelError(f"this model cannot be attached: {reason}. Served: {', '.join(FAMILIES)}")
        config = model.config
        self.model = model
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.geometry = ModelGeometry(
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_size=head_size_of(config),
            dtype=str(model.dtype).removeprefix("torch."),
        )
        self._putting_thread: int | None = None
        self._sequences: dict[int, SequenceCache] = {}
        self._rotate: Any = sys.modules[type(model.model.layers[0].self_attn).__module__].apply_rotary_pos_emb
        self._hooks: list[Any] = []

    def start(self, tap: Callable[[int, torch.Tensor], None]) -> None:
        """From now on `put` calls `tap(layer_idx, hidden)` with each layer's QKV input, `[num_tokens, hidden_size]`."""

        def on_normed(layer_idx: int, module: Any, args: Any, hidden: torch.Tensor) -> None:
            if self._putting_thread == threading.get_ident():  # else the model's owner runs it for something else
                tap(layer_idx, hidden[0])

        for layer_idx, layer in enumerate(self.model.model.layers):
            self._hooks.append(layer.input_layernorm.register_forward_hook(partial(on_normed, layer_idx)))

    def check(self, token_ids: list[int], num_new: int) -> None:
        """Raise RequestError unless the model can run these tokens and `num_new` more."""
        vocab_size, limit = self.model.config.vocab_size, self.model.config.max_position_embeddings
        if not token_ids:
            raise RequestError("the prompt has no tokens", param="prompt")
        if min(token_ids) < 0 or max(token_ids) >= vocab_size:
            raise RequestError(f"token ids must be in [0, {vocab_size})", param="prompt")
        if len(token_ids) + num_new > limit:
            raise RequestError(
                f"the context holds {limit} tokens, got {len(token_ids)} in the prompt and {num_new} to generate",
                param="max_new_tokens",
                code="context_length_exceeded",
            )

    def open(self, uid: int) -> SequenceCache:
        """Make a sequence live, without tokens."""
        self._sequences[uid] = SequenceCache(self)
        return self._sequences[uid]

    def target(self, uid: int) -> SequenceCache:
        """A live sequence's cache."""
        return self._sequences[uid]

    def close(self, uid: int) -> None:
        """Drop a sequence; unknown uids are ignored."""
        self._sequences.pop(uid, None)

    @torch.no_grad()
    def put(self, uid: int, token_ids: Sequence[int]) -> torch.Tensor:
        """Run tokens of one sequence. Returns logits of the last one, `[vocab_size]`."""
        ids = torch.tensor([token_ids], dtype=torch.int64, device=self.device)
        self._putting_thread = threading.get_ident()
        try:
            cache = self._sequences[uid].cache
            logits = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        finally:
            self._putting_thread = None
        return logits[0, -1]  # type: ignore[no-any-return]

    @torch.no_grad()
    def first_hidden(self, token_ids: torch.Tensor) -> torch.Tensor:
        """QKV input of layer 0 from ids `[num_tokens]`: `[num_tokens, hidden_size]`."""
        decoder = self.model.model
        return decoder.layers[0].input_layernorm(decoder.embed_tokens(token_ids.to(self.device)))  # type: ignore[no-any-return]

    @torch.no_grad()
    def project_kv(self, layer_idx: int, start: int, hidden: torch.Tensor) -> torch.Tensor:
        """K (normed and rotated) and V of saved rows, by the model's own modules: `[num_tokens, 2, num_kv_heads,
        head_size]`. hidden: `[num_tokens, hidden_size]`, the layer's QKV input from position `start` on."""
        decoder = self.model.model
        attention = decoder.layers[layer_idx].self_attn
        heads = (-1, self.geometry.num_kv_heads, self.geometry.head_size)
        if hasattr(attention, "qkv_proj"):  # fused: computes Q too
            num_q = self.geometry.num_heads * self.geometry.head_size
            keys, values = (part.view(heads) for part in attention.qkv_proj(hidden)[:, num_q:].chunk(2, dim=-1))
        else:
            keys, values = attention.k_proj(hidden).view(heads), attention.v_proj(hidden).view(heads)
        if hasattr(attention, "k_norm"):
            keys = attention.k_norm(keys)
        positions = torch.arange(start, start + hidden.shape[0], device=hidden.device)
        cos, sin = decoder.rotary_emb(hidden[None], positions[None])
        keys = keys.transpose(0, 1)[None]  # [1, num_kv_heads, num_tokens, head_size]
        keys = self._rotate(keys, keys, cos, sin)[1][0].transpose(0, 1)
        return torch.stack([keys, values], dim=1)

    def stop(self) -> None:
        """Leave the model as it was found."""
        for hook in self._hooks:
            hook.remove()
        self._sequences.clear()


def _refusal(model: Any) -> str | None:
    """Why a model cannot be served right, None when it can."""
    config = getattr(model, "config", None)
    if not isinstance(model, transformers.PreTrainedModel) or config is None:
        return f"{type(model).__name__} is not a transformers PreTrainedModel (compiled or wrapped: not served)"
    if config.model_type not in FAMILIES or not hasattr(model, "lm_head"):
        return f"{type(model).__name__} of model type {config.model_type!r}"
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", None):
        return "bidirectional attention"
    if model.training:
        return "it is in training mode, call model.eval() first"
    rope_type = model.model.rotary_emb.rope_type
    if rope_type not in ROTARY:
        return f"rotary scaling {rope_type!r} (served: {', '.join(ROTARY)})"
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) > 1 or model.device.type not in ("cpu", "cuda"):
        return f"weights on {', '.join(sorted(devices))} (served: all on one CPU or one CUDA device)"
    return None


def fingerprint_of(model: Any) -> bytes:
    """32 bytes: state saved under one is never restored under another. Covers all that changes the numbers in a chunk:
    config, every weight and buffer, transformers' version, the attention implementation.

    Reads all weights once, hashed side by side: about a second per GB and core. Weights that change later (training,
    merging an adapter) are not noticed: attach anew.
    """
    ignored = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "pad_token_id"}
    described = {name: value for name, value in model.config.to_dict().items() if name not in ignored}
    tensors = {**model.state_dict(), **dict(model.named_buffers())}  # the latter: rotary frequencies
    with ThreadPoolExecutor() as pool:
        weights = sorted(pool.map(_digest, tensors.items()))
    parts = {
        "config": described,
        "weights": weights,
        "kernels": f"{KERNELS};attention={model.config._attn_implementation}",
        "capture": CAPTURE_POINT,
        "format": STATE_FORMAT,
    }
    content = json.dumps(parts, sort_keys=True, default=str).encode()
    return hashlib.blake2b(content, digest_size=32, person=b"hcache.hfmodel.1").digest()


def _digest(named: tuple[str, torch.Tensor]) -> str:
    name, tensor = named
    content = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
    digest = hashlib.blake2b(content.data, digest_size=32).hexdigest()
    return f"{name} {tensor.dtype} {list(tensor.shape)} {digest}"
