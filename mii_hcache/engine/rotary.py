"""Rotary settings of a transformers config."""

from __future__ import annotations

from typing import Any

import torch

from mii_hcache.errors import UnsupportedModelError

SERVED_ROTARY = ("default", "linear", "llama3")


def head_size_of(config: Any) -> int:
    """Elements per attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def inverse_frequencies(config: Any) -> torch.Tensor:
    """Rotary inverse frequencies: `[rotary_dim / 2]`, float32.

    Raises UnsupportedModelError for variants that depend on the sequence's length or rescale attention.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = getattr(config, "rope_parameters", None) or {}
    rope_type = parameters.get("rope_type", "default")
    if rope_type not in SERVED_ROTARY:
        raise UnsupportedModelError(f"rotary scaling {rope_type!r} (served: {', '.join(SERVED_ROTARY)})")
    if rope_type == "default":
        rotary_dim = int(head_size_of(config) * parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).to(torch.float32) / rotary_dim
        return 1.0 / (float(parameters["rope_theta"]) ** exponents)
    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"))
    if attention_factor != 1.0:
        raise UnsupportedModelError(f"rotary scaling {rope_type!r} that rescales attention by {attention_factor:g}")
    return inv_freq.to(torch.float32)


def windows_of(config: Any) -> list[int | None]:
    """Each layer's sliding window in tokens (a query sees itself and the `window - 1` before it), None for all."""
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return [window] * config.num_hidden_layers
    return [window if layer_type == "sliding_attention" else None for layer_type in layer_types]
