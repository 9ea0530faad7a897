"""Seeded random checkpoints in the shapes that experiments run: weights do not matter for time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

SHAPES: Mapping[str, Mapping[str, int]] = {
    "demo": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8},
    "250m": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16, "num_attention_heads": 16},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
    "llama2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama2-13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "llama3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
"""All Llama, with multi-head attention as in the paper where nothing else is said."""


def make_model(name: str, folder: Path) -> Path:
    """The checkpoint's folder, made in `folder` when it is not there; a name that is no shape is a folder already."""
    if name not in SHAPES:
        return Path(name)
    path = folder / name
    if path.exists():
        return path
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = dict(SHAPES[name])
    config = LlamaConfig(
        **settings,
        vocab_size=2048 if name == "demo" else 32000,
        max_position_embeddings=16384,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    dtype = torch.float32 if name == "demo" else torch.float16 if name.startswith("llama2") else torch.bfloat16
    staged = path.with_name(f".{name}.partial")
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(staged)
    staged.rename(path)
    return path
