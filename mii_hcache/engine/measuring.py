"""The measured profile of an engine on its machine: made once, kept in the state directory, made anew when it no longer
fits."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from mii_hcache.core.cost import MeasuredProfile
from mii_hcache.core.geometry import ChunkKind
from mii_hcache.engine.parallel.engine import ParallelEngine
from mii_hcache.engine.parallel.state import SharedState
from mii_hcache.engine.ragged_engine import HCacheEngine
from mii_hcache.errors import ConfigError
from mii_hcache.runtime.machine import device_name, num_usable_cpus
from mii_hcache.runtime.ports import KVTarget
from mii_hcache.runtime.profiled_tier import ProfiledTier
from mii_hcache.runtime.profiler import MAX_CONTEXT_TOKENS, TILE_TOKENS, h2d_bytes_per_s, profile_layer
from mii_hcache.runtime.span_memory import span_memory
from mii_hcache.storage.base import ChunkStore
from mii_hcache.storage.memory import MemoryStore
from mii_hcache.storage.open import open_state
from mii_hcache.storage.open_io import choose_io
from mii_hcache.storage.state_dir import PROFILE_FILE
from mii_hcache.storage.throttled import ThrottledStore

_log = logging.getLogger(__name__)

_SCRATCH = "profile-scratch"
_UID = 0
"""Of the sequence that is measured with; the scheduler's start at 1."""


def machine_of(engine: HCacheEngine) -> str:
    """What the costs depend on, besides the model."""
    kernels = "" if engine.device.type == "cpu" else f", {engine.kernels} kernels"
    return f"{device_name(engine.device)}, {num_usable_cpus()} cores{kernels}"


def can_measure(engine: HCacheEngine) -> bool:
    """Whether the engine's pool is large enough."""
    return engine.max_context_tokens >= TILE_TOKENS


def measured_profile(
    engine: HCacheEngine,
    state_dirs: Sequence[Path],
    fingerprint: bytes,
    *,
    io_bytes: int = 32 << 20,
    repeats: int = 5,
    anew: bool = False,
    emulated_read_bytes_per_s: float | None = None,
    io: str = "auto",
    on_progress: Callable[[str], None] = lambda what: None,
    shared: SharedState | None = None,
) -> MeasuredProfile:
    """What the first of `state_dirs` remembers of this machine and model, else measured now (seconds; the engine must
    be idle) and remembered. `anew` measures in any case; a doubtful profile is not believed twice.
    `emulated_read_bytes_per_s` slows every tier's reads down. `shared`: of an engine over several ranks, all of which
    then read, gather and place, as they restore; they read from files only. Raises ConfigError when the engine's pool
    is too small to measure with."""
    path = state_dirs[0] / PROFILE_FILE
    machine, model = f"{machine_of(engine)}, files by {choose_io(io)[0]}", fingerprint.hex()
    if len(state_dirs) > 1:
        machine += f" in {len(state_dirs)} directories"
    if emulated_read_bytes_per_s is not None:
        machine += f", reads emulated at {emulated_read_bytes_per_s / 1e6:g} MB/s"
    if shared is not None:
        machine += f", {shared.peers.num_ranks} ranks"
    known = None if anew else _read(path)
    if known is not None and (known.machine, known.model) == (machine, model) and not known.is_doubtful:
        return known
    num_tokens = min(MAX_CONTEXT_TOKENS, engine.max_context_tokens) // TILE_TOKENS * TILE_TOKENS
    if not can_measure(engine):
        raise ConfigError(
            f"kv_blocks and max_context_tokens must leave room for {TILE_TOKENS} tokens to measure this machine with, "
            f"got {engine.max_context_tokens}; or choose --method hidden, kv or recompute, which need no measuring"
        )
    engine.reserve(_UID, num_tokens)
    try:
        folders = [directory / _SCRATCH for directory in state_dirs]
        with _scratch_tiers(engine, folders, io_bytes, emulated_read_bytes_per_s, io) as tiers:
            target: KVTarget = engine.target(_UID)
            if shared is not None:
                assert isinstance(engine, ParallelEngine)
                target = ranks_target = shared.target_of(engine, _UID)
                files = tiers["file"]
                tiers = {"file": replace(files, store=shared.read_by_all(files.store))}
            costs, spread = profile_layer(
                adapter=engine.own,
                target=target,
                num_target_tokens=num_tokens,
                tiers=tiers,
                io_bytes=io_bytes,
                repeats=repeats,
                on_progress=on_progress,
            )
            if shared is not None:
                costs = ranks_target.with_gather(costs)
    finally:
        engine.evict(_UID)
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    profile = MeasuredProfile(
        machine=machine,
        model=model,
        date=date,
        tiers=costs,
        shape=engine.geometry.shape,
        spread=round(spread, 2),
        h2d_bytes_per_s=h2d_bytes_per_s(engine),
    )
    _write(path, profile)
    return profile


@contextmanager
def _scratch_tiers(
    engine: HCacheEngine,
    folders: Sequence[Path],
    io_bytes: int,
    emulated_read_bytes_per_s: float | None,
    io: str,
) -> Iterator[dict[str, ProfiledTier]]:
    """Stores of the same kinds, on the same disks, for the time of a `with` block."""
    for one in folders:
        shutil.rmtree(one, ignore_errors=True)
    span_bytes = max(engine.geometry.span_bytes(kind) for kind in ChunkKind)
    capacity_bytes = 4 * max(io_bytes, span_bytes) + (64 << 20)
    files = open_state(folders, capacity_bytes * len(folders), 0, io=io)
    memory = MemoryStore(capacity_bytes, memory=span_memory())

    def slowed(store: ChunkStore) -> ChunkStore:
        return ThrottledStore(store, emulated_read_bytes_per_s) if emulated_read_bytes_per_s else store

    def forget() -> None:
        for one in folders:
            forget_files(one)

    try:
        yield {
            "memory": ProfiledTier(store=slowed(memory), forget=lambda: None),
            "file": ProfiledTier(store=slowed(files.store), forget=forget),
        }
    finally:
        memory.close()
        files.close()
        for one in folders:
            shutil.rmtree(one, ignore_errors=True)


def forget_files(folder: Path) -> None:
    """Ask the kernel to drop the files from its page cache, so that a read is a read."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def _read(path: Path) -> MeasuredProfile | None:
    try:
        return MeasuredProfile.from_json(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        _log.warning("the profile %s cannot be used (%s): measuring anew", path, error)
        return None


def _write(path: Path, profile: MeasuredProfile) -> None:
    staged = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        staged.write_text(profile.to_json())
        os.replace(staged, path)
    except OSError as error:
        _log.warning("the profile %s cannot be written (%s): it will be measured again", path, error)
