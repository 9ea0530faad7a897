"""A model's fingerprint: state saved under one is never restored under another.

It covers whatever changes the numbers in a chunk: the config, the content of every weight shard, the dtype and the norm
epsilon as served, the kernels (rotary implementation included), the point where hidden states are taken, the format.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)

_PORTABLE = "portable-torch.1;rope=float32-inv-freq,float32-rotate.1"
KERNELS = {"torch": _PORTABLE, "triton": _PORTABLE, "cuda": _PORTABLE, "stock": "deepspeed-cuda.1"}
"""By what computes (`modules.REGISTRABLE`). Our torch and Triton modules take the angles from the same float32 table
and round in the same places, so rows of one are rows of the other but for the order of sums, which is the noise that a
batch of another shape makes, too: a state directory may move between a CPU and a GPU. DeepSpeed's kernels rotate by
their own arithmetic; their K under our queries would be wrong where nobody sees it, and a miss costs a prefill."""
CAPTURE_POINT = "qkv-input-after-norm.1"
STATE_FORMAT = "span64.rows.1"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt")
_READ_BYTES = 8 << 20


def model_fingerprint(
    *, model_dir: Path, config: Any, dtype: str, norm_eps: float, kernels: str, cache_file: Path | None
) -> bytes:
    """32 bytes. `config`: the transformers config; `kernels`: what computes. `cache_file` remembers shard digests by
    path, size, mtime and inode, so that a restart does not read every weight again."""
    ignored = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "max_seq_length"}
    described = {name: value for name, value in config.to_dict().items() if name not in ignored}
    digest = hashlib.blake2b(digest_size=32, person=b"hcache.model.v1")
    parts = {
        "config": described,
        "weights": weight_digests(model_dir, cache_file),
        "dtype": dtype,
        "norm_eps": norm_eps,
        "kernels": KERNELS[kernels],
        "capture": CAPTURE_POINT,
        "format": STATE_FORMAT,
    }
    digest.update(json.dumps(parts, sort_keys=True, default=str).encode())
    return digest.digest()


def weight_digests(model_dir: Path, cache_file: Path | None) -> dict[str, str]:
    """BLAKE2b of each weight shard, by file name."""
    known = _read_cache(cache_file)
    fresh: dict[str, str] = {}
    digests: dict[str, str] = {}
    for path in sorted(model_dir.iterdir()):
        if path.suffix not in _WEIGHT_SUFFIXES or not path.is_file():
            continue
        status = path.stat()
        key = f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}|{status.st_ino}"
        digests[path.name] = fresh[key] = known.get(key) or _digest_file(path)
    if cache_file is not None and fresh != known:
        _write_cache(cache_file, fresh)
    return digests


def _digest_file(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=32)
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _read_cache(cache_file: Path | None) -> dict[str, str]:
    if cache_file is None or not cache_file.exists():
        return {}
    try:
        cached = json.loads(cache_file.read_text())
        return {str(key): str(value) for key, value in cached.items()}
    except (OSError, ValueError, AttributeError) as error:
        _log.warning("digest cache %s is unreadable (%s): the weights are read again", cache_file, error)
        return {}


def _write_cache(cache_file: Path, digests: dict[str, str]) -> None:
    staged = cache_file.with_suffix(f".{os.getpid()}.tmp")
    try:
        descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(digests, file)
        os.replace(staged, cache_file)
    except OSError as error:
        _log.warning("digest cache %s cannot be written: %s", cache_file, error)
