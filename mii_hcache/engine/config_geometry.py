"""A model's sizes from its config alone: no weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mii_hcache.core.geometry import DTYPE_BYTES, ModelGeometry
from mii_hcache.engine.checkpoint import why_no_folder
from mii_hcache.engine.rotary import head_size_of
from mii_hcache.errors import ConfigError

_GATED = {"llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "phi3", "gemma", "gemma2"}
"""Model types whose feed-forward part has gate, up and down: three matrices."""
_NO_MODEL = "model must be a folder with a config.json, that file, or a hub id, got {model!r}: {reason}"


def read_config(model: str) -> Any:
    """The transformers config of a checkpoint's folder, of a `config.json`, or of a hub id. Raises ConfigError."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    path = Path(model).expanduser()
    reason = why_no_folder(model)
    if reason is not None:
        raise ConfigError(_NO_MODEL.format(model=model, reason=reason))
    try:
        return AutoConfig.from_pretrained(str(path) if path.exists() else model, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(_NO_MODEL.format(model=model, reason=reason)) from error


def dtype_of_config(config: Any) -> str:
    """Torch's name of the dtype that the config asks for; float32 when it asks for none."""
    dtype = str(getattr(config, "dtype", None)).removeprefix("torch.")
    return dtype if dtype in DTYPE_BYTES else "float32"


def geometry_of_config(config: Any, dtype: str) -> ModelGeometry:
    """All sizes that bytes and FLOPs depend on. Raises ConfigError when the config lacks one.

    `ffn_weights` counts what one token uses: of a mixture of experts the active ones and the router. It is 0 (unknown)
    for model types whose feed-forward part this function does not know.
    """
    try:
        return ModelGeometry(
            num_layers=int(config.num_hidden_layers),
            hidden_size=int(config.hidden_size),
            num_heads=int(config.num_attention_heads),
            num_kv_heads=int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads),
            head_size=head_size_of(config),
            dtype=dtype,
            ffn_weights=_ffn_weights(config),
        )
    except (AttributeError, TypeError) as error:
        raise ConfigError(f"model must be a decoder with attention, got type {config.model_type!r}: {error}") from error


def _ffn_weights(config: Any) -> int:
    hidden_size: int = config.hidden_size
    if config.model_type == "opt":
        return 2 * hidden_size * int(config.ffn_dim)
    if config.model_type not in _GATED:
        return 0
    num_active = int(getattr(config, "num_experts_per_tok", None) or 0)
    if not num_active:
        return 3 * hidden_size * int(config.intermediate_size)
    width = int(getattr(config, "moe_intermediate_size", None) or config.intermediate_size)
    num_experts = int(getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0)
    return 3 * hidden_size * width * num_active + hidden_size * num_experts
