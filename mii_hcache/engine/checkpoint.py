"""A checkpoint as people name it: a folder, or an id on the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mii_hcache.errors import ConfigError


def why_no_folder(model: str) -> str | None:
    """What is wrong with a name that can only mean a folder; None when nothing is, and for what may be a hub id.

    transformers takes a folder that is not there for an id and looks for it on the hub, so that somebody who mistyped a
    path hears of the network, or of letters that an id may not have.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if (path / "config.json").exists():
            return None
        inside = sorted(found.parent for found in [*path.glob("*/config.json"), *path.glob("snapshots/*/config.json")])
        return "there is no config.json in it" + (f"; there is one in {inside[0]}" if inside else "")
    if path.exists() or not _is_path(model):
        return None
    return f"there is no {'folder' if path.suffix != '.json' else 'file'} {path.absolute()}"


def _is_path(model: str) -> bool:
    """Hub ids have at most one slash, and begin with a letter or a digit."""
    return model.startswith((".", "~", os.sep)) or model.endswith(os.sep) or model.count(os.sep) > 1


def open_checkpoint(model_path: str) -> Any:
    """The host's view of a checkpoint, which is fetched if need be. Raises ConfigError."""
    from mii_hcache.engine import compat

    compat.install()
    from deepspeed.inference.v2.checkpoint import HuggingFaceCheckpointEngine
    from huggingface_hub.errors import StrictDataclassError

    reason = why_no_folder(model_path)
    if reason is not None:
        raise ConfigError(f"model {model_path!r} cannot be loaded: {reason}")
    folder = Path(model_path)
    if folder.is_dir() and not any([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]):
        raise ConfigError(f"model {model_path!r} has no weights: neither *.safetensors nor pytorch_model*.bin is there")
    try:
        return HuggingFaceCheckpointEngine(model_path)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise ConfigError(f"model {model_path!r} cannot be loaded: {error}") from error
