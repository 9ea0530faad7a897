"""A model of random weights that never was a file: they are drawn where the engine computes, layer by layer.

A checkpoint of 7 billion parameters is 13 GB to write and to read; what is measured does not depend on its values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from experiments.common.checkpoints import SHAPES
from mii_hcache.engine.ragged_engine import DTYPES, HCacheEngine, build_engine

VOCAB_SIZE = 32000
MAX_CONTEXT_TOKENS = 16384


def random_engine(
    shape: str,
    *,
    dtype: str,
    num_blocks: int,
    num_kv_heads: int | None = None,
    seed: int = 0,
    changes: Mapping[str, Any] | None = None,
    drawn_in: str | None = None,
    **settings: Any,
) -> HCacheEngine:
    """An engine with a Llama of `SHAPES[shape]`, seeded; the same settings as `build_engine`. `num_kv_heads`: fewer
    than heads, for grouped queries. `changes`: other fields of the config, as fewer layers or a longer context.
    `drawn_in`: dtype that the weights are drawn in before they are the engine's, None for the engine's own.

    `build_engine` opens its checkpoint with DeepSpeed's reader; for the time of this call the reader is one that draws.
    """
    from deepspeed.inference.v2 import checkpoint

    original = checkpoint.HuggingFaceCheckpointEngine
    changes = {**(changes or {}), **({"num_key_value_heads": num_kv_heads} if num_kv_heads else {})}

    def reader(_: str) -> RandomCheckpoint:
        return RandomCheckpoint(shape, seed, changes, drawn_in)

    checkpoint.HuggingFaceCheckpointEngine = reader
    try:
        return build_engine(f"random weights in the shape of {shape}", dtype=dtype, num_blocks=num_blocks, **settings)
    finally:
        checkpoint.HuggingFaceCheckpointEngine = original


class RandomCheckpoint:
    """What the engine asks of a checkpoint's reader: a config, and parameters by name."""

    def __init__(
        self, shape: str, seed: int = 0, changes: Mapping[str, Any] | None = None, drawn_in: str | None = None
    ) -> None:
        from transformers import LlamaConfig

        settings: dict[str, Any] = {
            "vocab_size": VOCAB_SIZE,
            "max_position_embeddings": MAX_CONTEXT_TOKENS,
            "tie_word_embeddings": False,
            **SHAPES[shape],
            **(changes or {}),
        }
        settings.setdefault("num_key_value_heads", settings["num_attention_heads"])
        self.model_config: Any = LlamaConfig(**settings)
        self.model_config.max_seq_length = settings["max_position_embeddings"]
        self._local_checkpoint_dir = shape
        self._seed = seed
        self._drawn_in = None if drawn_in is None else DTYPES[drawn_in]

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """One at a time, in the dtype that the engine has chosen by now."""
        from transformers import AutoModelForCausalLM

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        chance = torch.Generator(device).manual_seed(self._seed)
        dtype = self.model_config.dtype
        std = 0.64 * self.model_config.hidden_size**-0.5  # numbers keep their size from layer to layer, at any width
        with torch.device("meta"):
            names = AutoModelForCausalLM.from_config(self.model_config).state_dict()
        for name, parameter in names.items():
            made = torch.empty(parameter.shape, dtype=self._drawn_in or dtype, device=device)
            made = made.fill_(1.0) if parameter.dim() == 1 else made.normal_(0.0, std, generator=chance)
            yield name, made.to(dtype)
