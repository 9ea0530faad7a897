"""HCacheConfig: every setting of a server, in one frozen value. The only reader of the environment."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from mii_hcache.core.methods import method_named
from mii_hcache.errors import ConfigError

KEEP_POLICIES = ("none", "lru")
DTYPE_NAMES = ("auto", "float32", "bfloat16", "float16")
IO_NAMES = ("auto", "uring", "threads", "cufile")


def default_state_dir() -> str:
    """`$MII_HCACHE_STATE_DIR`, else `mii_hcache/state` under `$XDG_CACHE_HOME` or `~/.cache`."""
    chosen = os.environ.get("MII_HCACHE_STATE_DIR")
    if chosen:
        return chosen
    cache_home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return str(Path(cache_home) / "mii_hcache" / "state")


def environment_api_keys() -> list[str]:
    """Keys in `$MII_HCACHE_API_KEY`, separated by commas or white space."""
    return os.environ.get("MII_HCACHE_API_KEY", "").replace(",", " ").split()


def quiet_libraries() -> None:
    """Have libraries that are imported from here on say only what is wrong, unless the environment says otherwise."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@dataclass(frozen=True, kw_only=True)
class HCacheConfig:
    """Settings of an engine with saved state. Sizes in bytes, times in seconds."""

    model: str | None = None
    """Directory or hub id of a Hugging Face checkpoint; None makes a small random demo model."""
    served_model_name: str | None = None
    """Name that the API answers to; None derives it from `model`."""
    dtype: str = "auto"
    """`auto` takes the checkpoint's own, else float32, bfloat16 or float16."""
    state_dir: str | None = None
    """Where state is kept; None is `default_state_dir()`. One server at a time."""
    state_capacity_bytes: int = 20 << 30
    """Most that saved state may take on disk; least recently used goes first."""
    dram_capacity_bytes: int = 2 << 30
    """Most that saved state may take in host memory, in front of the disk."""
    io: str = field(default_factory=lambda: os.environ.get("MII_HCACHE_IO") or "auto")
    """How state gets to the disk and back: `uring` (native, around the page cache), `threads` (plain Python) or `auto`,
    which is `uring` where it was built and is allowed. `cufile` is `auto` and lets a GPU be read into (GPUDirect
    Storage; never run on a GPU by its authors). `$MII_HCACHE_IO`. The files are the same."""
    method: str | None = None
    """How state is saved and restored (`core.methods`); None is `auto`: planned from what this machine measures."""
    keep: str = "lru"
    """`lru`: finished contexts stay in GPU memory until their blocks are needed. `none`: evicted after every turn."""
    kv_blocks: int | None = None
    """Blocks in the pool; None takes what memory allows."""
    block_size: int = 16
    """Tokens per block."""
    max_batch_tokens: int = 768
    """Most tokens of one engine step."""
    max_sequences: int = 256
    """Most requests that run at once."""
    max_waiting: int = 1024
    """Most requests that wait for a place; one more is refused."""
    max_context_tokens: int | None = None
    """Most tokens of one sequence; None is the model's limit."""
    save_wait: float = 0.1
    """Share of a prefill step that it may wait for room to save its state; decode never waits."""
    save_after: int = 0
    """Save a span only once this many earlier prompts had it; 0 saves everything at once. For one-shot traffic."""
    save_threads: int = 2
    """Background threads that put spans into the store."""
    restore_slice_s: float = 0.010
    """Longest that a restore holds up running sequences at a time."""
    emulated_read_bytes_per_s: float | None = None
    """Slow all reads of saved state down to this, to see what another device would do; None reads as fast as may be."""
    trace: str | None = None
    """File that every restore's timeline is written to, for Perfetto or chrome://tracing."""
    poison_blocks: bool = field(default_factory=lambda: os.environ.get("MII_HCACHE_POISON_BLOCKS", "") == "1")
    """Fill free KV blocks with NaN, to hunt corruption: `MII_HCACHE_POISON_BLOCKS=1`."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_NAMES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPE_NAMES)}, got {self.dtype!r}")
        if self.keep not in KEEP_POLICIES:
            raise ConfigError(f"keep must be one of {', '.join(KEEP_POLICIES)}, got {self.keep!r}")
        if self.io not in IO_NAMES:
            raise ConfigError(f"io must be one of {', '.join(IO_NAMES)}, got {self.io!r}")
        if self.method is not None:
            method_named(self.method)
        for name in ("block_size", "max_batch_tokens", "max_sequences", "max_waiting", "save_threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("state_capacity_bytes", "dram_capacity_bytes"):
            if getattr(self, name) < 1 << 20:
                raise ConfigError(f"{name} must be at least 1 MiB, got {getattr(self, name)} bytes")
        if self.save_after < 0:
            raise ConfigError(f"save_after must be >= 0, got {self.save_after}")
        for name in ("kv_blocks", "max_context_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be >= 1, got {value}")
        if not 0 <= self.save_wait <= 10:
            raise ConfigError(f"save_wait must be between 0 and 10 (a share of the step), got {self.save_wait}")
        rate = self.emulated_read_bytes_per_s
        if rate is not None and not 0 < rate < math.inf:
            raise ConfigError(f"emulated_read_bytes_per_s must be > 0, got {rate}")
        if not 0 < self.restore_slice_s < math.inf:
            raise ConfigError(f"restore_slice_s must be > 0, got {self.restore_slice_s}")

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> HCacheConfig:
        """From keyword settings; an unknown one is refused by name."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(settings) - known)
        if unknown:
            raise ConfigError(f"unknown setting {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        return cls(**settings)
