"""One engine of random weights with a store in host memory, driven by hand: the parts of a server without its threads.

What a server does around an engine step or a restore is done here by the caller, on one thread, so that what is timed
is known to begin and to end: the engine, the saver, the planner, the restorer and the store are the real ones.
"""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from experiments.common.checkpoints import SHAPES
from experiments.common.contenders import profile_store
from experiments.common.random_weights import random_engine
from experiments.gpu_restore.scales import Model, Scale, label
from experiments.gpu_restore.timing import Clock
from mii_hcache.core.cost import LayerCost
from mii_hcache.core.geometry import SPAN_TOKENS, ModelGeometry
from mii_hcache.core.identity import spans_of
from mii_hcache.core.methods import METHODS
from mii_hcache.core.plans import StoragePlan
from mii_hcache.engine.ragged_engine import HCacheEngine, token_tensors
from mii_hcache.runtime.lookup import look_up
from mii_hcache.runtime.policy import RestoreChoice, RestorePolicy, make_policy
from mii_hcache.runtime.profiler import ProfiledTier
from mii_hcache.runtime.restore import Restore, RestoreOutcome
from mii_hcache.runtime.restorer import Restorer
from mii_hcache.runtime.saver import Saver, StepSegment
from mii_hcache.runtime.span_memory import span_memory
from mii_hcache.runtime.stats import Counters
from mii_hcache.runtime.tap import SharedTap
from mii_hcache.storage.base import ChunkStore
from mii_hcache.storage.memory import MemoryStore
from mii_hcache.storage.records import SpanRecord
from mii_hcache.storage.throttled import ThrottledStore

SPARE_TOKENS = 1024
"""Context beyond the longest history, for prompts and answers behind it."""
DRAIN_S = 120.0
FULL = 0.85
"""Share of the store that kept histories may take."""


Pattern = tuple[object, ...]
"""A way to store layers."""


@dataclass(frozen=True, kw_only=True)
class History:
    """Tokens, and the spans that are saved of them in one way."""

    token_ids: list[int]
    records: list[SpanRecord]
    storage: StoragePlan

    @property
    def num_tokens(self) -> int:
        """Whole spans."""
        return len(self.records) * SPAN_TOKENS


class Rig:
    """Close it before the next one is made: two do not fit into one GPU. One thread."""

    def __init__(self, model: Model, scale: Scale, *, num_layers: int | None = None, dtype: str | None = None) -> None:
        """`num_layers`, `dtype`: instead of the model's."""
        self.model, self.scale, self.name = model, scale, label(model)
        longest = max(*model.contexts, scale.gate_tokens, scale.beside_tokens) + SPARE_TOKENS
        changes = {**(model.changes or {}), "max_position_embeddings": longest}
        if num_layers is not None:
            changes["num_hidden_layers"] = num_layers
        self.engine: HCacheEngine = random_engine(
            model.shape,
            dtype=dtype or model.dtype,
            num_blocks=model.pool_tokens // scale.block_size,
            changes=changes,
            block_size=scale.block_size,
            max_batch_tokens=scale.max_batch_tokens,
            max_sequences=2 * max(scale.decode_batches) + 8,
        )
        self.engine.poison_free_blocks()
        self.clock = Clock(self.engine.device, scale.flush_bytes)
        self.counters = Counters()
        self.store = MemoryStore(scale.store_bytes, memory=span_memory())
        self._restorers: dict[tuple[int, bool], Restorer] = {}
        self._kept: dict[tuple[int, Pattern], History] = {}
        """By length and way, the longest unused first."""
        self._num_uids = 0

    @cached_property
    def geometry(self) -> ModelGeometry:
        """With the feed-forward weights, which the engine's own does not know."""
        shape = {**SHAPES[self.model.shape], **(self.model.changes or {})}
        return replace(
            self.engine.geometry, ffn_weights=3 * int(shape["hidden_size"]) * int(shape["intermediate_size"])
        )

    @property
    def vocab(self) -> range:
        """Tokens to draw from."""
        return range(3, int(self.engine.model().vocab_size))

    def tokens(self, num_tokens: int, seed: int | str) -> list[int]:
        """Random ones, the same for the same seed."""
        return random.Random(f"gpu_restore/{seed}").choices(self.vocab, k=num_tokens)

    def new_uid(self) -> int:
        """Of a sequence that was never there."""
        self._num_uids += 1
        return self._num_uids

    def close(self) -> None:
        """Give everything back: the next engine needs the device's memory."""
        while self._restorers:  # they hold the engine
            self._restorers.popitem()[1].stop()
        self.store.close()
        del self.engine
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # --- running and saving -----------------------------------------------------------------------------------------

    def step(self, uids: Sequence[int], tokens: Sequence[Sequence[int]], savers: Sequence[Saver] = ()) -> torch.Tensor:
        """One forward, saved by `savers`. Logits `[num_sequences, vocab]`; the device has computed them when it
        returns."""
        segments = [StepSegment(uid=uid, token_ids=ids) for uid, ids in zip(uids, tokens, strict=True)]
        for saver in savers:
            saver.begin_step(segments)
        self.engine.model().qkv_input_tap = SharedTap(savers) if savers else None
        try:
            logits = self.engine.put(uids, token_tensors(tokens))
            self.clock.settle()
        except BaseException:
            for saver in savers:
                saver.abort_step()
            raise
        finally:
            self.engine.model().qkv_input_tap = None
        for saver in savers:
            saver.end_step()
        return logits

    def prefill(
        self, uid: int, token_ids: Sequence[int], *, chunk: int | None = None, savers: Sequence[Saver] = ()
    ) -> torch.Tensor:
        """A sequence's next tokens, in pieces of `chunk`. Logits of the last one, `[vocab]`."""
        chunk = min(chunk or self.engine.max_batch_tokens, self.engine.max_batch_tokens)
        logits = torch.empty(0)
        for start in range(0, len(token_ids), chunk):
            logits = self.step([uid], [token_ids[start : start + chunk]], savers)
        return logits[0]

    def prefill_freely(self, uid: int, token_ids: Sequence[int]) -> torch.Tensor:
        """The same in the largest pieces, without waiting for the device between them: for what is timed."""
        logits = torch.empty(0)
        for start in range(0, len(token_ids), self.engine.max_batch_tokens):
            logits = self.engine.put([uid], token_tensors([token_ids[start : start + self.engine.max_batch_tokens]]))
        return logits[0]

    def new_saver(self, storage: StoragePlan, *, save_wait: float = 1e6) -> Saver:
        """`save_wait`: as in `Saver`; the default waits for room rather than lose anything. Stop it."""
        return Saver(
            adapter=self.engine,
            store=self.store,
            plan=storage,
            max_batch_tokens=self.engine.max_batch_tokens,
            counters=self.counters,
            save_wait=save_wait,
        )

    def save(
        self, uid: int, token_ids: list[int], storages: Mapping[str, StoragePlan], *, chunk: int | None = None
    ) -> tuple[dict[str, History], torch.Tensor]:
        """Prefill a sequence, which stays live, and save it in several ways at once: by name, what lies in the store.
        Equal ways share theirs. Also the logits of its last token. Raises RuntimeError when anything of it was lost."""
        savers: dict[Pattern, Saver] = {}
        try:
            for storage in storages.values():
                if _pattern(storage) not in savers:
                    saver = savers[_pattern(storage)] = self.new_saver(storage)
                    saver.open(uid, seed=self._seed(storage, token_ids), token_ids=[])
            logits = self.prefill(uid, token_ids, chunk=chunk, savers=list(savers.values()))
            for saver in savers.values():
                if not saver.drain(DRAIN_S):
                    raise RuntimeError(f"saving {len(token_ids)} tokens took more than {DRAIN_S:.0f} s")
                saver.close(uid)
        finally:
            for saver in savers.values():
                saver.stop()
        found = {}
        for name, storage in storages.items():
            spans = list(spans_of(self._seed(storage, token_ids), token_ids))
            records = look_up(self.store, spans, max_tokens=len(token_ids)).records
            if len(records) != len(spans):
                raise RuntimeError(f"{len(records)} of {len(spans)} spans were saved as {name}")
            found[name] = History(token_ids=token_ids, records=records, storage=storage)
        return found, logits

    def _seed(self, storage: StoragePlan, token_ids: Sequence[int]) -> bytes:
        return f"{self.name}/{_pattern(storage)}/{len(token_ids)}".encode()

    def forget(self, histories: Mapping[str, History]) -> None:
        """Make room in the store."""
        for history in histories.values():
            self.store.delete([record.span_id for record in history.records])

    def history(self, num_tokens: int) -> list[int]:
        """The tokens that `saved` is about."""
        return self.tokens(num_tokens, f"history/{num_tokens}")

    def saved(self, num_tokens: int, storages: Mapping[str, StoragePlan]) -> dict[str, History]:
        """`save` of `history(num_tokens)`, which does not stay live; what lies in the store already is not saved again,
        for filling and pinning tens of gigabytes takes longer than what is measured with them. As much is kept as fits:
        nobody is to forget it."""
        token_ids = self.history(num_tokens)
        missing = {name: one for name, one in storages.items() if not self._is_kept(num_tokens, one)}
        for storage in storages.values():  # those come to the end of what may go
            found = self._kept.pop((num_tokens, _pattern(storage)), None)
            if found is not None:
                self._kept[num_tokens, _pattern(storage)] = found
        if missing:
            self._make_room(num_tokens * sum(_bytes_per_token(self.geometry, missing.values())), len(storages))
            uid = self.new_uid()
            found_now, _ = self.save(uid, token_ids, missing)
            self.engine.evict(uid)
            self._kept |= {(num_tokens, _pattern(storages[name])): history for name, history in found_now.items()}
        return {name: self._kept[num_tokens, _pattern(storage)] for name, storage in storages.items()}

    def _is_kept(self, num_tokens: int, storage: StoragePlan) -> bool:
        """Whether all of it is still there: a store evicts."""
        history = self._kept.get((num_tokens, _pattern(storage)))
        return history is not None and all(self.store.find(record.span_id) for record in history.records)

    def _make_room(self, num_bytes: float, num_wanted: int) -> None:
        """For so many bytes more, without the `num_wanted` last of what is kept."""
        while len(self._kept) > num_wanted:
            stats = self.store.stats()
            if stats.num_bytes + num_bytes <= FULL * stats.capacity_bytes:
                return
            self.forget({"": self._kept.pop(next(iter(self._kept)))})

    # --- planning and restoring -------------------------------------------------------------------------------------

    def throttled(self, read_bytes_per_s: float) -> ChunkStore:
        """The same store behind an emulated device."""
        return ThrottledStore(self.store, read_bytes_per_s)

    @cached_property
    def costs(self) -> dict[str, LayerCost]:
        """Of this engine and its store, measured once."""
        return self.costs_of(self.store)

    def costs_of(self, store: ChunkStore) -> dict[str, LayerCost]:
        """Of this engine and a store, measured now."""
        return profile_store(self.engine, ProfiledTier(store=store, forget=lambda: None))

    def policy(self, method: str, costs: Mapping[str, LayerCost]) -> RestorePolicy:
        """A method's rule."""
        return make_policy(
            method=METHODS[method],
            geometry=self.engine.geometry,
            costs=costs,
            max_context_tokens=max(self.model.contexts),
            counters=self.counters,
            max_fill_tokens=self.engine.max_fill_tokens,
        )

    def restorer(self, store: ChunkStore | None = None, *, is_urgent: bool = False) -> Restorer:
        """Of a store; the same one again for the same, so that its buffers are warm."""
        store = store or self.store
        key = id(store), is_urgent
        if key not in self._restorers:
            self._restorers[key] = Restorer(
                adapter=self.engine,
                store=store,
                counters=self.counters,
                read_deadline_s=math.inf,
                is_urgent=is_urgent,
            )
        return self._restorers[key]

    def choose(self, policy: RestorePolicy, history: History) -> RestoreChoice:
        """How to bring it back."""
        tiers = [self.store.tier_of(record.span_id) or self.store.name for record in history.records]
        return policy.choose(history.records, tiers)

    def start(self, uid: int, history: History, choice: RestoreChoice, restorer: Restorer | None = None) -> Restore:
        """Reserve blocks and begin to read, as admission does."""
        self.engine.reserve(uid, history.num_tokens)
        restore = (restorer or self.restorer()).start(
            self.engine.target(uid),
            history.records,
            history.token_ids,
            recompute_tokens=choice.recompute_tokens,
            recompute_layers=choice.recompute_layers,
        )
        restore.read_ahead()
        return restore

    def restore(
        self, uid: int, history: History, choice: RestoreChoice, restorer: Restorer | None = None
    ) -> tuple[RestoreOutcome, Restore]:
        """From nothing to a sequence that can go on. Raises RuntimeError when not all of it came back."""
        restore = self.start(uid, history, choice, restorer)
        outcome: RestoreOutcome | None = None
        while outcome is None:
            outcome = restore.step(math.inf, wait=True)
        if outcome.num_tokens != history.num_tokens:
            raise RuntimeError(f"{outcome.num_tokens} of {history.num_tokens} tokens came back: {outcome.cut_reason}")
        return outcome, restore


def _pattern(storage: StoragePlan) -> Pattern:
    """What two methods that store the same have in common."""
    return storage.kinds, storage.other_kinds, storage.other_share


def _bytes_per_token(geometry: ModelGeometry, storages: Iterable[StoragePlan]) -> list[float]:
    """Of each way in which a token is stored, once."""
    return [one.bytes_per_token(geometry) for one in {_pattern(storage): storage for storage in storages}.values()]
