"""HCacheConfig: every setting of a server, in one frozen value. Python reads our environment variables here only."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from mii_hcache.core.methods import method_named
from mii_hcache.errors import ConfigError

KEEP_POLICIES = ("none", "lru")
DTYPE_NAMES = ("auto", "float32", "bfloat16", "float16")
IO_NAMES = ("auto", "uring", "threads", "cufile")
DURABILITY_NAMES = ("relaxed", "strict")
EVICTION_NAMES = ("lru", "cost")
SAVE_NAMES = ("two-stage", "direct")
KERNEL_NAMES = ("auto", "portable", "stock")


def default_state_dirs() -> tuple[str, ...]:
    """`$MII_HCACHE_STATE_DIR`, several separated by colons, else `mii_hcache/state` under `$XDG_CACHE_HOME` or
    `~/.cache`."""
    chosen = tuple(part for part in os.environ.get("MII_HCACHE_STATE_DIR", "").split(os.pathsep) if part)
    if chosen:
        return chosen
    cache_home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return (str(Path(cache_home) / "mii_hcache" / "state"),)


def environment_api_keys() -> list[str]:
    """Keys in `$MII_HCACHE_API_KEY`, separated by commas or white space."""
    return os.environ.get("MII_HCACHE_API_KEY", "").replace(",", " ").split()


def quiet_libraries() -> None:
    """Have libraries that are imported from here on say only what is wrong. `$TRANSFORMERS_VERBOSITY` is honoured."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("DeepSpeed").addFilter(_is_error)  # it sets its level when it is imported


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


@dataclass(frozen=True, kw_only=True)
class HCacheConfig:
    """Settings of an engine with saved state. Sizes in bytes, times in seconds."""

    model: str | None = None
    """Directory or hub id of a Hugging Face checkpoint; None makes a small random demo model."""
    served_model_name: str | None = None
    """Name that the API answers to; None derives it from `model`."""
    dtype: str = "auto"
    """`auto` takes the checkpoint's own, else float32, bfloat16 or float16."""
    kernels: str = "auto"
    """What computes (`engine.modules`): `portable` is our own, Triton on a GPU and plain torch on a CPU; `stock` is
    DeepSpeed's CUDA kernels; `auto` is `portable` until both were measured on GPUs."""
    state_dir: str | Sequence[str] | None = None
    """Where state is kept; None is `default_state_dirs()`. One server at a time. Several directories, each on a disk of
    its own, are striped over; with `tensor_parallel`, each rank has some of them for its hidden states, as far as there
    are enough (`storage/turns.py`)."""
    state_capacity_bytes: int = 20 << 30
    """Most that saved state may take on disk, in all directories together, each having an equal share; what goes first
    is `evict`'s to say."""
    dram_capacity_bytes: int = 2 << 30
    """Most that saved state may take in host memory, in front of the disk."""
    evict: str = "lru"
    """Which saved state goes when its room is needed (`storage.eviction`): `lru`, the least recently used, or `cost`,
    what saves least per byte for how likely it is used again."""
    expire_after_s: float | None = None
    """Saved state that was not used for so long is deleted, also while the server is down; None keeps it until its room
    is needed."""
    io: str = field(default_factory=lambda: os.environ.get("MII_HCACHE_IO") or "auto")
    """How state gets to the disk and back: `uring` (native, around the page cache), `threads` (plain Python) or `auto`,
    which is `uring` where it was built and is allowed. `cufile` is `auto` and lets a GPU be read into (GPUDirect
    Storage; never run on a GPU by its authors). `$MII_HCACHE_IO`. The files are the same."""
    disk_deadline_s: float = 10.0
    """A disk that takes longer for one batch of reads or writes hangs: the request is served without what lies there,
    and others do without it until it answers."""
    durability: str = "relaxed"
    """What of the saved state outlives a power cut (`storage.format`): `strict` all that was flushed, `relaxed` what
    the disk had by then; the rest is a miss. A crash of the server alone costs neither anything."""
    method: str | None = None
    """How state is saved and restored (`core.methods`); None is `auto`: planned from what this machine measures."""
    keep: str = "lru"
    """`lru`: finished contexts stay in GPU memory until their blocks are needed. `none`: evicted after every turn."""
    kv_blocks: int | None = None
    """Blocks in the pool; None takes what memory allows."""
    tensor_parallel: int = 1
    """Ranks that the model is split over: processes on this machine, each on a GPU of its own where there are any. All
    of them end with this one."""
    block_size: int | None = None
    """Tokens per block; None is 16 on a CPU and 64 on a GPU, where a span's chunk then is one piece of a layer."""
    max_batch_tokens: int = 768
    """Most tokens of one engine step."""
    max_sequences: int = 256
    """Most requests that run at once."""
    max_waiting: int = 1024
    """Most requests that wait for a place; one more is refused."""
    max_context_tokens: int | None = None
    """Most tokens of one sequence; None is the model's limit."""
    save: str = "two-stage"
    """`two-stage`: state is snapshot within the step and written behind its back. `direct`: each step waits until its
    rows are on the device, past DRAM; slower, for measuring what the two stages spare."""
    save_wait: float = 0.1
    """Share of a prefill step that it may wait for room to save its state; decode never waits."""
    save_after: int = 0
    """Save a span only once this many earlier prompts had it; 0 saves everything at once. For one-shot traffic."""
    save_threads: int = 2
    """Background threads that put spans into the store."""
    scatter_threads: int | None = None
    """Threads that gather the rows of one step into spans, where the native engine was built; None is half the cores, 8
    at most. Few rows are gathered by one of them."""
    restore_slice_s: float = 0.010
    """Longest that a restore holds up running sequences at a time."""
    emulated_read_bytes_per_s: float | None = None
    """Slow all reads of saved state down to this, to see what another device would do; None reads as fast as may be."""
    trace: str | None = None
    """File that every restore's timeline is written to, for Perfetto or chrome://tracing."""
    poison_blocks: bool = field(default_factory=lambda: os.environ.get("MII_HCACHE_POISON_BLOCKS", "") == "1")
    """Fill free KV blocks with NaN, to hunt corruption: `MII_HCACHE_POISON_BLOCKS=1`."""

    def __post_init__(self) -> None:
        if self.state_dir is not None:
            object.__setattr__(self, "state_dir", _directories(self.state_dir))
        if self.dtype not in DTYPE_NAMES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPE_NAMES)}, got {self.dtype!r}")
        if self.kernels not in KERNEL_NAMES:
            raise ConfigError(f"kernels must be one of {', '.join(KERNEL_NAMES)}, got {self.kernels!r}")
        if self.keep not in KEEP_POLICIES:
            raise ConfigError(f"keep must be one of {', '.join(KEEP_POLICIES)}, got {self.keep!r}")
        if self.save not in SAVE_NAMES:
            raise ConfigError(f"save must be one of {', '.join(SAVE_NAMES)}, got {self.save!r}")
        if self.io not in IO_NAMES:
            raise ConfigError(f"io must be one of {', '.join(IO_NAMES)}, got {self.io!r}")
        if self.evict not in EVICTION_NAMES:
            raise ConfigError(f"evict must be one of {', '.join(EVICTION_NAMES)}, got {self.evict!r}")
        if self.expire_after_s is not None and not 0 < self.expire_after_s < math.inf:
            raise ConfigError(f"expire_after_s must be > 0, got {self.expire_after_s}")
        if self.durability not in DURABILITY_NAMES:
            raise ConfigError(f"durability must be one of {', '.join(DURABILITY_NAMES)}, got {self.durability!r}")
        if self.method is not None:
            method_named(self.method)
        for name in ("tensor_parallel", "max_batch_tokens", "max_sequences", "max_waiting", "save_threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("state_capacity_bytes", "dram_capacity_bytes"):
            if getattr(self, name) < 1 << 20:
                raise ConfigError(f"{name} must be at least 1 MiB, got {getattr(self, name)} bytes")
        if self.save_after < 0:
            raise ConfigError(f"save_after must be >= 0, got {self.save_after}")
        for name in ("block_size", "kv_blocks", "max_context_tokens", "scatter_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be >= 1, got {value}")
        if not 0 <= self.save_wait <= 10:
            raise ConfigError(f"save_wait must be between 0 and 10 (a share of the step), got {self.save_wait}")
        if not 0 < self.disk_deadline_s < math.inf:
            raise ConfigError(f"disk_deadline_s must be > 0, got {self.disk_deadline_s}")
        rate = self.emulated_read_bytes_per_s
        if rate is not None and not 0 < rate < math.inf:
            raise ConfigError(f"emulated_read_bytes_per_s must be > 0, got {rate}")
        if not 0 < self.restore_slice_s < math.inf:
            raise ConfigError(f"restore_slice_s must be > 0, got {self.restore_slice_s}")

    @property
    def state_dirs(self) -> tuple[str, ...]:
        """`state_dir`, or the default, as what it means: at least one directory."""
        if self.state_dir is None:
            return default_state_dirs()
        return (self.state_dir,) if isinstance(self.state_dir, str) else tuple(self.state_dir)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> HCacheConfig:
        """From keyword settings; an unknown one is refused by name."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(settings) - known)
        if unknown:
            raise ConfigError(f"unknown setting {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        return cls(**settings)


def _directories(given: Any) -> str | tuple[str, ...]:
    """A directory as it is, several as a tuple. Raises ConfigError for anything else."""
    try:
        if isinstance(given, (str, os.PathLike)):
            return str(os.fspath(given))
        several = tuple(str(os.fspath(one)) for one in given)
    except TypeError:
        several = ()
    if not several or "" in several:
        raise ConfigError(f"state_dir must be a directory or several, got {given!r}")
    return several
