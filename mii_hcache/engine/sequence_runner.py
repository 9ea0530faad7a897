"""Sequences with saved state on a plain transformers model: look up, restore, run, save, one at a time."""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from mii_hcache.core.geometry import SPAN_TOKENS
from mii_hcache.core.identity import chain_seed, spans_of
from mii_hcache.core.methods import Method
from mii_hcache.engine.sampling import make_generator, sample
from mii_hcache.engine.transformers_adapter import TransformersEngine
from mii_hcache.errors import HCacheError
from mii_hcache.runtime.generation import RestoreReport, SamplingParams
from mii_hcache.runtime.lookup import Lookup, look_up
from mii_hcache.runtime.pieces import pieces_on
from mii_hcache.runtime.policy import make_policy
from mii_hcache.runtime.restorer import Restorer
from mii_hcache.runtime.saver import Saver, StepSegment
from mii_hcache.runtime.stats import Counters
from mii_hcache.storage.base import ChunkStore

_log = logging.getLogger(__name__)

PREFILL_TOKENS = 512
"""Longest chunk that a prompt is cut into."""
SAVE_WAIT = 1.0
"""Share of a prefill step that it may wait for room to save its state: nobody else waits here."""
PENDING_WAIT_S = 5.0
"""Longest that a prompt waits for its own context's last spans to reach the store."""


class SequenceRunner:
    """Runs sequences with saved state through an engine, one at a time: look up, restore, run, save.

    Any thread may call; `sequence` makes the others wait for the end of its block.
    """

    def __init__(self, *, engine: TransformersEngine, store: ChunkStore, method: Method, fingerprint: bytes) -> None:
        """Takes the engine over."""
        self.engine = engine
        self.method = method
        self.counters = Counters()
        self._store = store
        self._fingerprint = fingerprint
        policy = make_policy(
            method=method,
            geometry=engine.geometry,
            costs=None,
            max_context_tokens=engine.model.config.max_position_embeddings,
            counters=self.counters,
            max_fill_tokens=engine.max_fill_tokens,
            pieces=pieces_on(engine.device),
        )
        self._is_saving = policy.storage is not None
        self._saver = Saver(
            adapter=engine,
            store=store,
            plan=policy.storage,
            max_batch_tokens=PREFILL_TOKENS,
            counters=self.counters,
            save_wait=SAVE_WAIT,
        )
        self._restorer = Restorer(adapter=engine, store=store, counters=self.counters)
        self._uids = itertools.count(1)
        self._lock = threading.RLock()
        self._is_closed = False
        engine.start(self._saver.tap)

    def look_up(self, token_ids: list[int], tenant_salt: bytes, *, max_tokens: int) -> Lookup:
        """What can be restored of `token_ids`, at most `max_tokens`; waits for what is on its way to the store."""
        if self._is_closed:
            raise HCacheError("this was closed: attach the model again")
        if not self._is_saving:
            return Lookup(records=[], next_span=None, why_missing=self.method.name)
        spans = list(spans_of(chain_seed(self._fingerprint, tenant_salt), token_ids))
        if self._saver.is_pending([span_id for span_id, _ in spans]):
            self._saver.drain(PENDING_WAIT_S)
        return look_up(self._store, spans, max_tokens=max_tokens)

    @contextmanager
    def sequence(
        self, token_ids: list[int], tenant_salt: bytes, *, max_restored: int
    ) -> Iterator[tuple[int, RestoreReport]]:
        """A live sequence with what could be restored of `token_ids`, for the time of a `with` block. What `run` then
        adds to it is saved; of a block that fails, what was saved by then."""
        with self._lock:
            uid = next(self._uids)
            try:
                report = self._restore(uid, token_ids, self.look_up(token_ids, tenant_salt, max_tokens=max_restored))
                seed = chain_seed(self._fingerprint, tenant_salt)
                self._saver.open(uid, seed=seed, token_ids=token_ids[: report.restored_tokens])
                yield uid, report
                if not self._saver.heal(uid):
                    self._saver.give_up(uid)
            finally:
                self._saver.close(uid)
                self.engine.close(uid)

    def _restore(self, uid: int, token_ids: list[int], lookup: Lookup) -> RestoreReport:
        """Open the sequence with the tokens of `lookup`, or without any: then they are prefilled."""
        is_new = lookup.why_missing in (None, "not_saved") and lookup.records
        report = RestoreReport(miss_reason=None if is_new else lookup.why_missing or "too_short")
        target = self.engine.open(uid)
        if not lookup.records:
            return report
        started_s = time.perf_counter()
        try:
            target.reserve(lookup.num_tokens)
            outcome = self._restorer.start(target, lookup.records, token_ids).step(math.inf, wait=True)
            assert outcome is not None
        except Exception:
            _log.exception("a restore failed; the history is prefilled instead")
            self.counters.add("restore_errors_total")
            report.miss_reason = "restore_failed"
            self.engine.open(uid)
            return report
        report.restored_tokens = outcome.num_tokens
        report.restore_ms = 1e3 * (time.perf_counter() - started_s)
        report.miss_reason = outcome.cut_reason or report.miss_reason
        if outcome.num_tokens:
            report.restored_from = "+".join(outcome.tiers)
            report.method = "+".join(outcome.kinds)
        self.counters.add("restores_total")
        self.counters.add("restored_tokens_total", outcome.num_tokens)
        return report

    def generate(
        self, prompt: list[int], sampling: SamplingParams, tenant_salt: bytes
    ) -> tuple[list[int], RestoreReport]:
        """Continue a prompt: restore what is saved of it, prefill the rest, decode; all of it is saved. Returns the
        generated tokens, a stop token included."""
        started_s = time.perf_counter()
        generator = make_generator(sampling)
        token_ids: list[int] = []
        with self.sequence(prompt, tenant_salt, max_restored=len(prompt) - 1) as (uid, report):
            report.prefill_tokens = len(prompt) - report.restored_tokens
            logits = self.run(uid, prompt[report.restored_tokens :])
            while True:
                token_ids.append(int(logits.argmax()) if generator is None else sample(logits, sampling, generator))
                if report.ttft_ms is None:
                    report.ttft_ms = 1e3 * (time.perf_counter() - started_s)
                if token_ids[-1] in sampling.stop_token_ids or len(token_ids) == sampling.max_new_tokens:
                    return token_ids, report
                logits = self.run(uid, token_ids[-1:])

    def run(self, uid: int, token_ids: Sequence[int]) -> torch.Tensor:
        """Run tokens (at least one) of a live sequence. Returns logits of the last one, `[vocab_size]`."""
        for start in range(0, len(token_ids), PREFILL_TOKENS):
            logits = self._step(uid, token_ids[start : start + PREFILL_TOKENS])
        return logits

    def _step(self, uid: int, token_ids: Sequence[int]) -> torch.Tensor:
        self._saver.begin_step([StepSegment(uid=uid, token_ids=token_ids)])
        try:
            logits = self.engine.put(uid, token_ids)
            if not torch.isfinite(logits.to(torch.float32).sum()):
                raise HCacheError("the model gave logits that are not finite; the state of this step was thrown away")
        except BaseException:
            self._saver.abort_step()
            raise
        self._saver.end_step()
        return logits

    def save(self, token_ids: list[int], tenant_salt: bytes) -> int:
        """Run and save what is not saved yet of the whole spans of `token_ids`. Returns how many tokens are saved."""
        token_ids = token_ids[: len(token_ids) // SPAN_TOKENS * SPAN_TOKENS]
        num_saved = self.look_up(token_ids, tenant_salt, max_tokens=len(token_ids)).num_tokens
        if num_saved < len(token_ids) and self._is_saving:
            with self.sequence(token_ids, tenant_salt, max_restored=len(token_ids) - 1) as (uid, report):
                self.run(uid, token_ids[report.restored_tokens :])
        self._saver.drain()
        self._store.flush()
        return self.look_up(token_ids, tenant_salt, max_tokens=len(token_ids)).num_tokens

    def close(self) -> None:
        """Let all that was saved reach the store and leave the model as it was found. Idempotent."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._saver.stop()
                self._restorer.stop()
                self.engine.stop()
