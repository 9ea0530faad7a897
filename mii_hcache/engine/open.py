"""From a configuration to a running engine with its saved state: everything a server needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from mii_hcache.config import HCacheConfig
from mii_hcache.core.cost import MeasuredProfile
from mii_hcache.core.methods import Method, default_method, method_named
from mii_hcache.core.plans import StoragePlan
from mii_hcache.engine.fingerprint import model_fingerprint
from mii_hcache.engine.measuring import can_measure, measured_profile
from mii_hcache.engine.parallel.engine import ParallelEngine
from mii_hcache.engine.parallel.opening import open_parallel_engine
from mii_hcache.engine.parallel.state import SharedState
from mii_hcache.engine.ragged_engine import HCacheEngine, build_engine
from mii_hcache.engine.service import EngineService
from mii_hcache.engine.tokenizer import Tokenizer
from mii_hcache.errors import ConfigError, RankLostError
from mii_hcache.runtime.span_memory import span_memory
from mii_hcache.storage.base import ChunkStore
from mii_hcache.storage.disk_space import why_scarce
from mii_hcache.storage.open import OpenedState, open_state
from mii_hcache.storage.throttled import ThrottledStore


@dataclass(kw_only=True)
class OpenedService:
    """What a server needs, opened and running."""

    service: EngineService
    tokenizer: Tokenizer
    state: OpenedState
    model_name: str
    method: Method
    why_method: str
    """For people: `chosen by --method`, `planned from ...`."""
    storage: StoragePlan | None
    """What is saved; None when nothing is."""
    notes: list[str] = field(default_factory=list)
    """What the operator should know, one sentence each."""

    @property
    def transcripts(self) -> object:
        """Rendered texts and their token ids (`storage.transcripts.Transcripts`)."""
        return self.state.transcripts

    def close(self, drain: bool = True) -> None:
        """Finish (or cancel) requests, make saved state durable, release the state directory."""
        self.service.close(drain=drain)
        self.state.close()


Progress = Callable[[str, int, int], None]
"""`progress(what, num_done, num_all)`: something begins or goes on; 0 of 0 where it cannot be counted."""


OnLost = Callable[[RankLostError], None]
"""Hears, once and on a thread of its own, that a rank of a model over several is gone: the engine never runs again."""


def _quiet(what: str, num_done: int, num_all: int) -> None:
    pass


def _unheard(error: RankLostError) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class LoadedEngine:
    """A model, ready to run, and what it is called."""

    engine: HCacheEngine
    fingerprint: bytes
    path: str
    """Directory or hub id that it was loaded from."""
    name: str
    """What clients call it."""
    notes: list[str] = field(default_factory=list)


def load_engine(
    config: HCacheConfig, state_dir: Path, progress: Progress = _quiet, on_lost: OnLost = _unheard
) -> LoadedEngine:
    """Load the model, on as many ranks as it is to be split over. `state_dir` remembers digests of its weights. The
    engine is the caller's to close. Raises HCacheError."""
    notes = []
    model = config.model
    name = config.served_model_name or (Path(model).name if model and Path(model).is_dir() else model)
    if model is None:
        from mii_hcache.engine.demo_model import ensure_demo_model

        model = str(ensure_demo_model(state_dir.parent / "demo-model"))
        name = config.served_model_name or "mii-hcache-demo"
        notes.append(
            "No --model was given: this is a small model with random weights. It talks gibberish; it exists to "
            "exercise the machinery."
        )
    build = build_engine
    if config.tensor_parallel > 1:
        build = partial(open_parallel_engine, size=config.tensor_parallel, on_lost=on_lost, progress=progress)
    engine = build(
        model,
        dtype=config.dtype,
        num_blocks=config.kv_blocks,
        block_size=config.block_size,
        kernels=config.kernels,
        max_batch_tokens=config.max_batch_tokens,
        max_sequences=config.max_sequences,
        max_context_tokens=config.max_context_tokens,
    )
    try:
        return _named(config, engine, model, name, state_dir, notes, progress)
    except BaseException:
        engine.close()
        raise


def _named(
    config: HCacheConfig,
    engine: HCacheEngine,
    model: str,
    name: str | None,
    state_dir: Path,
    notes: list[str],
    progress: Progress,
) -> LoadedEngine:
    if config.poison_blocks:
        engine.poison_free_blocks()
        notes.append("Free blocks are poisoned with NaN (MII_HCACHE_POISON_BLOCKS=1).")
    progress("making sure of the weights", 0, 0)
    fingerprint = model_fingerprint(
        model_dir=Path(engine.checkpoint_dir),
        config=engine.model().config,
        dtype=engine.geometry.dtype,
        norm_eps=engine.model().norm_eps,
        kernels=engine.kernels,
        cache_file=state_dir / "weight-digests.json",
    )
    assert name is not None
    return LoadedEngine(engine=engine, fingerprint=fingerprint, path=model, name=name, notes=notes)


def open_service(config: HCacheConfig, progress: Progress = _quiet, on_lost: OnLost = _unheard) -> OpenedService:
    """Load the model, open its saved state, start the engine thread. `on_lost`: requests end with the error by
    themselves; what is left to do is to close. Raises HCacheError."""
    _check_parallel(config)
    services: list[EngineService] = []

    def lost(error: RankLostError) -> None:
        on_lost(error)
        for service in services:
            service.lose(error)

    state = open_state(
        config.state_dirs,
        config.state_capacity_bytes,
        config.dram_capacity_bytes if config.tensor_parallel == 1 else 0,
        io=config.io,
        deadline_s=config.disk_deadline_s,
        durability=config.durability,
        evict=config.evict,
        expire_after_s=config.expire_after_s,
        memory=span_memory(),
    )
    with ExitStack() as opening:
        opening.callback(state.close)
        if not state.directories:
            raise ConfigError(f"state_dir: none of {', '.join(config.state_dirs)} can be used; {' '.join(state.notes)}")
        state_dir = state.directories[0]
        loaded = load_engine(config, state_dir, progress, lost)
        opening.callback(loaded.engine.close)
        share_bytes = config.state_capacity_bytes // len(config.state_dirs)
        scarce = [why_scarce(directory, share_bytes) for directory in state.directories]
        notes = [*state.notes, *filter(None, scarce), *loaded.notes]
        if config.tensor_parallel > 1:
            notes.append(
                "Saved state is not kept in DRAM in front of the files: ranks share only files. A --state-dir on a "
                "tmpfs does the same."
            )
        tokenizer = Tokenizer(loaded.path)
        shared = _open_shared(config, loaded.engine, state.store)
        method, why, profile = _choose_method(config, loaded, state.directories, notes, progress, shared)
        store = state.store
        if config.emulated_read_bytes_per_s is not None:
            store = ThrottledStore(store, config.emulated_read_bytes_per_s)
            notes.append(
                f"Reads of saved state are slowed down to {config.emulated_read_bytes_per_s / 1e6:.0f} MB/s: times are "
                "emulated, not this machine's."
            )
        service = EngineService(
            engine=loaded.engine,
            store=store,
            method=method,
            fingerprint=loaded.fingerprint,
            config=config,
            costs=None if profile is None else profile.tiers,
            shared=shared,
        )
        opening.pop_all()
    services.append(service)
    if loaded.engine.lost is not None:  # before there was a service to tell
        service.lose(loaded.engine.lost)
    return OpenedService(
        service=service,
        tokenizer=tokenizer,
        state=state,
        model_name=loaded.name,
        method=method,
        why_method=why,
        storage=service.policy.storage,
        notes=notes,
    )


def _check_parallel(config: HCacheConfig) -> None:
    """What several ranks cannot do yet."""
    if config.tensor_parallel == 1:
        return
    if config.save == "direct":
        raise ConfigError(f"save is 'direct' and tensor_parallel {config.tensor_parallel}: only one rank can save so")


def _open_shared(config: HCacheConfig, engine: HCacheEngine, store: ChunkStore) -> SharedState | None:
    """The way to the other ranks' state, where there are any and something is saved."""
    if not isinstance(engine, ParallelEngine) or not method_named(config.method or "auto").saves:
        return None
    return SharedState(engine, store, io=config.io, emulated_read_bytes_per_s=config.emulated_read_bytes_per_s)


def _choose_method(
    config: HCacheConfig,
    loaded: LoadedEngine,
    state_dirs: Sequence[Path],
    notes: list[str],
    progress: Progress,
    shared: SharedState | None,
) -> tuple[Method, str, MeasuredProfile | None]:
    """The method, why it is that one, and the costs that it plans with."""
    method = method_named(config.method or "auto")
    why = "chosen by --method" if config.method else "the default"
    if not method.needs_costs:
        return method, why, None
    if config.method is None and not can_measure(loaded.engine):
        method = default_method(loaded.engine.geometry)
        notes.append(
            "The pool of KV blocks is too small to measure this machine with, so nothing is planned: "
            f"{method.name} was chosen because it takes the least bytes."
        )
        return method, "the smaller of hidden and kv", None
    profile = measured_profile(
        loaded.engine,
        state_dirs,
        loaded.fingerprint,
        emulated_read_bytes_per_s=config.emulated_read_bytes_per_s,
        io=config.io,
        shared=shared,
        on_progress=lambda what: progress(f"measuring this machine, once: {what}", 0, 0),
    )
    if profile.is_doubtful:
        notes.append(
            f"The machine was busy when it was measured (the same work took up to {profile.spread:.1f} times as long): "
            "plans may be poor. It is measured again at the next start, or with `python -m mii_hcache profile`."
        )
    return method, f"{why}, planned from what this machine measured on {profile.date[:10]}", profile
