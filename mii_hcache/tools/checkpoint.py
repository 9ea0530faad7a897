"""A checkpoint's `config.json`, before anything of it is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mii_hcache.core.geometry import DTYPE_BYTES, ModelGeometry
from mii_hcache.errors import ConfigError


def read_config(model: str) -> dict[str, Any]:
    """The `config.json` of a checkpoint: a folder or a hub id. Raises ConfigError."""
    try:
        if Path(model).expanduser().is_dir():
            path = Path(model).expanduser() / "config.json"
        else:
            from huggingface_hub import hf_hub_download
            from huggingface_hub.errors import HfHubHTTPError

            try:
                path = Path(hf_hub_download(model, "config.json"))
            except HfHubHTTPError as error:
                raise ConfigError(f"model {model!r} cannot be looked up: {error}") from error
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"model {model!r} cannot be looked up: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"model {model!r} has a config.json that is no object")
    return config


def geometry_of(config: dict[str, Any]) -> ModelGeometry:
    """Sizes as a checkpoint's config tells them. Raises ConfigError when one is missing."""
    dtype = config.get("dtype") or config.get("torch_dtype")
    try:
        num_heads = int(config["num_attention_heads"])
        return ModelGeometry(
            num_layers=int(config["num_hidden_layers"]),
            hidden_size=int(config["hidden_size"]),
            num_heads=num_heads,
            num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
            head_size=int(config.get("head_dim") or config["hidden_size"] // num_heads),
            dtype=dtype if dtype in DTYPE_BYTES else "float32",
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"the model's config lacks a size ({error})") from error
