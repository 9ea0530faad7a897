"""From a configuration to a running engine with its saved state: everything a server needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mii_hcache.config import HCacheConfig, default_state_dir
from mii_hcache.core.methods import Method, default_method, method_named
from mii_hcache.engine.fingerprint import model_fingerprint
from mii_hcache.engine.ragged_engine import build_engine
from mii_hcache.engine.service import EngineService
from mii_hcache.engine.tokenizer import Tokenizer
from mii_hcache.storage.open import OpenedState, open_state


@dataclass(kw_only=True)
class OpenedService:
    """What a server needs, opened and running."""

    service: EngineService
    tokenizer: Tokenizer
    state: OpenedState
    model_name: str
    method: Method
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


def open_service(config: HCacheConfig) -> OpenedService:
    """Load the model, open its saved state, start the engine thread. Raises HCacheError."""
    state_dir = Path(config.state_dir or default_state_dir())
    state = open_state(state_dir, config.state_capacity_bytes, config.dram_capacity_bytes)
    try:
        return _open_engine(config, state, state_dir)
    except BaseException:
        state.close()
        raise


def _open_engine(config: HCacheConfig, state: OpenedState, state_dir: Path) -> OpenedService:
    notes = list(state.notes)
    model = config.model
    model_name = config.served_model_name or (Path(model).name if model and Path(model).is_dir() else model)
    if model is None:
        from mii_hcache.engine.demo_model import ensure_demo_model

        model = str(ensure_demo_model(state_dir.parent / "demo-model"))
        model_name = config.served_model_name or "mii-hcache-demo"
        notes.append(
            "No --model was given: this is a small model with random weights. It talks gibberish; it exists to "
            "exercise the machinery."
        )
    engine = build_engine(
        model,
        dtype=config.dtype,
        num_blocks=config.kv_blocks,
        block_size=config.block_size,
        max_batch_tokens=config.max_batch_tokens,
        max_sequences=config.max_sequences,
        max_context_tokens=config.max_context_tokens,
    )
    if config.poison_blocks:
        engine.poison_free_blocks()
        notes.append("Free blocks are poisoned with NaN (MII_HCACHE_POISON_BLOCKS=1).")
    method = method_named(config.method) if config.method else default_method(engine.geometry)
    fingerprint = model_fingerprint(
        model_dir=Path(engine.checkpoint_dir),
        config=engine.model().config,
        dtype=engine.geometry.dtype,
        norm_eps=engine.model().norm_eps,
        cache_file=state_dir / "weight-digests.json",
    )
    tokenizer = Tokenizer(model)
    service = EngineService(engine=engine, store=state.store, method=method, fingerprint=fingerprint, config=config)
    assert model_name is not None
    return OpenedService(
        service=service, tokenizer=tokenizer, state=state, model_name=model_name, method=method, notes=notes
    )
