"""Saved state of one kind, opened as a server opens it, with what saves into it and restores from it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mii_hcache.config import HCacheConfig
from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind
from mii_hcache.core.identity import chain_seed, spans_of
from mii_hcache.core.plans import uniform_storage
from mii_hcache.engine.ragged_engine import HCacheEngine
from mii_hcache.errors import HCacheError
from mii_hcache.runtime.lookup import look_up
from mii_hcache.runtime.restorer import Restorer
from mii_hcache.runtime.saver import Saver
from mii_hcache.runtime.span_memory import span_memory
from mii_hcache.runtime.stats import Counters
from mii_hcache.storage.open import open_state
from mii_hcache.tools.device_passes import drop_pages

_log = logging.getLogger(__name__)

DRAIN_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Brought:
    """What came back of a history."""

    num_tokens: int = 0
    read_bytes: int = 0
    kinds: tuple[str, ...] = ()
    tiers: tuple[str, ...] = ()
    why_short: str | None = None
    """Why it was not all."""


class SavedState:
    """A state directory for contexts of up to `max_tokens` tokens, `num_contexts` of them. Engine thread only."""

    def __init__(
        self,
        engine: HCacheEngine,
        directory: Path,
        *,
        kind: ChunkKind,
        max_tokens: int,
        num_contexts: int = 2,
        in_memory: bool = True,
        is_patient: bool = True,
    ) -> None:
        """`in_memory` False leaves out DRAM: what is read comes from files. `is_patient`: the engine is to wait before
        each batch until all before it is saved, so that nothing is dropped and healed; a server does not wait so."""
        self.is_patient = is_patient
        self.kind = kind
        self._engine = engine
        payload_bytes = num_contexts * (1 + max_tokens // SPAN_TOKENS) * engine.geometry.span_bytes(kind)
        capacity_bytes = 4 * payload_bytes + (64 << 20)  # slots are larger than chunks; nothing is to be evicted
        self._state = open_state(
            directory,
            capacity_bytes,
            (payload_bytes + (1 << 20)) if in_memory else 0,
            io=HCacheConfig().io,
            memory=span_memory(),
        )
        self._directory = directory
        counters = Counters()
        self.saver = Saver(
            adapter=engine,
            store=self._state.store,
            plan=uniform_storage(engine.geometry, kind),
            max_batch_tokens=engine.max_batch_tokens,
            counters=counters,
        )
        self._restorer = Restorer(adapter=engine, store=self._state.store, counters=counters)
        self._seed = chain_seed(b"selfcheck")

    def __enter__(self) -> SavedState:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start_over(self, salt: str) -> None:
        """From now on save and look for contexts of another tenant: nothing of them is saved yet."""
        self._seed = chain_seed(b"selfcheck", salt.encode())

    def bring_back(self, uid: int, prompt: Sequence[int], max_tokens: int) -> Brought:
        """Restore what there is of the prompt's first `max_tokens` tokens into a new sequence, as the server does: also
        in that a restore that fails leaves all of it to be prefilled."""
        lookup = look_up(self._state.store, list(spans_of(self._seed, prompt)), max_tokens=max_tokens)
        self._engine.reserve(uid, lookup.num_tokens)
        if not lookup.records:
            return Brought(why_short=lookup.why_missing)
        restore = self._restorer.start(self._engine.target(uid), lookup.records, prompt)
        try:
            while (outcome := restore.step(60.0, wait=True)) is None:
                pass
        except Exception as error:
            _log.exception("a restore failed")
            return Brought(why_short=f"{type(error).__name__}: {error}")
        return Brought(
            num_tokens=outcome.num_tokens,
            read_bytes=outcome.read_bytes,
            kinds=tuple(outcome.kinds),
            tiers=tuple(outcome.tiers),
            why_short=outcome.cut_reason or lookup.why_missing,
        )

    def open(self, uid: int, token_ids: Sequence[int]) -> None:
        """Save what the sequence runs from now on; `token_ids` are in its blocks already."""
        self.saver.open(uid, seed=self._seed, token_ids=token_ids)

    def leave(self, uid: int) -> None:
        """The sequence's turn is over: make sure that all of it is saved. Its blocks stay as they are."""
        self.drain()
        self.saver.heal(uid)
        self.saver.close(uid)
        self.drain()

    def drain(self) -> None:
        """Wait for the background threads. Raises HCacheError when they hang."""
        if not self.saver.drain(DRAIN_S):
            raise HCacheError(f"saved state did not reach {self._directory} within {DRAIN_S:g} s; is the disk hanging?")

    def drop_page_cache(self) -> None:
        """Ask the kernel to forget the files' pages, so that the next read comes from the disk. No promise."""
        drop_pages((self._directory / "segments").glob("*.seg"))

    def close(self) -> None:
        """Make everything durable and end all threads. Idempotent."""
        self.saver.stop()
        self._restorer.stop()
        self._state.close()
