"""MII's scheduler (continuous batching, Dynamic SplitFuse) with contexts that are evicted, restored and kept.

Around MII's loop: requests wait here until their blocks are free; a saved history is restored first, in slices between
steps; then MII sees a prompt whose first part is processed already. Preemption evicts (the state is saved) and resumes
by restoring, so no generated token is ever lost.
"""

from __future__ import annotations

import itertools
import logging
import queue
import time
from collections import deque
from typing import Any, Literal

import torch
from mii.batching.data_classes import RequestBatch
from mii.batching.ragged_batching import RaggedBatchBase

from mii_hcache.engine.job import Job, JobRequest
from mii_hcache.engine.ragged_engine import HCacheEngine
from mii_hcache.engine.residents import Residents
from mii_hcache.engine.sampling import make_generator, sample
from mii_hcache.errors import HCacheError
from mii_hcache.runtime.generation import FinishReason, RestoreReport
from mii_hcache.runtime.lookup import Lookup, look_up
from mii_hcache.runtime.restorer import Restore, Restorer
from mii_hcache.runtime.saver import Saver, StepSegment
from mii_hcache.runtime.stats import Counters
from mii_hcache.storage.base import ChunkStore

_log = logging.getLogger(__name__)

ALONE_SLICE_S = 0.1
"""Restore slice while nothing else runs: only new requests and cancellations wait for it."""
PENDING_WAIT_S = 5.0
"""Longest that a request waits for its own context's last spans to reach the store."""


class HCacheScheduler(RaggedBatchBase):  # type: ignore[misc]
    """Everything between a submitted job and its last token. Engine thread only."""

    def __init__(
        self,
        *,
        engine: HCacheEngine,
        store: ChunkStore,
        saver: Saver,
        restorer: Restorer,
        counters: Counters,
        keep: Literal["none", "lru"],
        restore_slice_s: float,
        max_sequences: int,
    ) -> None:
        # MII's own __init__ opens a socket on all interfaces, sleeps a second and calls CUDA: one process needs none.
        self.inference_engine = engine
        self.request_queue: queue.Queue[JobRequest] = queue.Queue()
        self.result_queues: dict[int, Any] = {}
        self.scheduled_requests = RequestBatch()
        self.buffer: deque[JobRequest] = deque()
        self.scheduled_length = self.scheduled_seq_num = self.scheduled_req_blocks = 0
        self._num_generated_tokens = 0
        self.profile_model_time = self.sync_debug = False

        self._engine = engine
        self._store = store
        self._saver = saver
        self._restorer = restorer
        self._counters = counters
        self._keep = keep
        self._restore_slice_s = restore_slice_s
        self._max_sequences = max_sequences
        self._uids = itertools.count(1)
        self._waiting: deque[Job] = deque()
        self._restoring: deque[tuple[Job, Restore]] = deque()
        self._active: dict[int, Job] = {}
        self._residents = Residents()
        engine.model().qkv_input_tap = saver.tap

    # --- what the service calls ---------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether `iterate` has anything to do."""
        return bool(self._waiting or self._restoring or self._active)

    def add(self, job: Job) -> None:
        """Queue a job."""
        job.generator = make_generator(job.request.sampling)
        self._waiting.append(job)

    def cancel(self, job: Job) -> None:
        """End a job at the next chance."""
        job.is_cancelled = True

    def iterate(self) -> None:
        """Admit, restore a slice, run one engine step. A failed step fails its jobs; the loop lives on."""
        self._drop_cancelled()
        self._admit()
        self._restore()
        if not self._active:
            if self._waiting and not self._restoring:
                time.sleep(0.0005)  # its context's last spans are on their way to the store
            return
        try:
            self.generate()
        except Exception as error:
            _log.exception("an engine step failed")
            self._counters.add("step_errors_total")
            self._fail_active(HCacheError(f"the engine step failed: {error}"))

    def gauges(self) -> dict[str, float]:
        """Sizes at this moment."""
        return {
            "blocks": self._engine.num_blocks,
            "blocks_free": self._engine.num_free_blocks,
            "requests_waiting": len(self._waiting),
            "requests_restoring": len(self._restoring),
            "requests_running": len(self._active),
            "resident_contexts": len(self._residents),
            "spans_pending": self._saver.num_pending,
        }

    def close(self) -> None:
        """Cancel what is left and evict every context, saving what is missing."""
        for job, restore in self._restoring:
            restore.cancel()
            self._leave(job, FinishReason.CANCELLED)
        self._restoring.clear()
        for job in [*self._waiting, *self._active.values()]:
            self._leave(job, FinishReason.CANCELLED)
        self._waiting.clear()
        while (uid := self._residents.oldest()) is not None:
            self._evict_resident(uid)

    # --- admission ----------------------------------------------------------------------------------------------

    def _drop_cancelled(self) -> None:
        for job in [job for job in self._waiting if job.is_cancelled]:
            self._waiting.remove(job)
            self._leave(job, FinishReason.CANCELLED)
        for job, restore in [pair for pair in self._restoring if pair[0].is_cancelled]:
            self._restoring.remove((job, restore))
            restore.cancel()
            self._leave(job, FinishReason.CANCELLED)

    def _admit(self) -> None:
        while self._waiting and len(self._active) + len(self._restoring) < self._max_sequences:
            if not self._try_admit(self._waiting[0]):
                return
            self._waiting.popleft()

    def _try_admit(self, job: Job) -> bool:
        """Give the job its blocks and its history. False: not yet (strictly first come, first served)."""
        max_reused = len(job.token_ids) - 1  # the last token must run to give logits
        if self._saver.is_pending(job.span_ids()) and time.perf_counter() - job.submitted_s < PENDING_WAIT_S:
            return False
        if self._saver.kind is None:
            lookup = Lookup(records=[], next_span=None, why_missing="recompute")
        else:
            lookup = look_up(self._store, job.spans(), max_tokens=max_reused)
        found = self._residents.best(job.seed, job.token_ids, max_reused)
        if found is not None and found[1] < lookup.num_tokens:
            found = None
        adopted_uid = found[0].uid if found is not None else None
        if not self._make_room(job, adopted_uid):
            return False
        job.admitted_s = time.perf_counter()
        if job.num_generated == 0:
            job.report = RestoreReport(miss_reason=self._miss_reason(job, lookup, found[1] if found else 0))
        if found is not None:
            self._adopt(job, found[0].uid, found[1])
        elif lookup.records:
            job.uid = next(self._uids)
            self._engine.reserve(job.uid, lookup.num_tokens)
            restore = self._restorer.start(self._engine.target(job.uid), lookup.records, job.token_ids)
            self._restoring.append((job, restore))
        else:
            job.uid = next(self._uids)
            self._engine.reserve(job.uid, 0)
            self._start(job, 0)
        return True

    def _miss_reason(self, job: Job, lookup: Lookup, num_resident: int) -> str | None:
        if job.request.miss_hint is not None:
            return job.request.miss_hint
        if max(num_resident, lookup.num_tokens) == 0:
            return lookup.why_missing or "too_short"
        is_new = lookup.why_missing in (None, "not_saved", "recompute")
        return None if is_new or num_resident >= lookup.num_tokens else lookup.why_missing

    def _make_room(self, job: Job, adopted_uid: int | None) -> bool:
        """Free blocks and a tracking slot for the job, evicting residents; evicts none when that would not be enough.

        Blocks promised to prompts that are still being prefilled do not count as free, and every running sequence may
        soon need one more.
        """
        engine = self._engine
        held = engine.blocks_of(adopted_uid) if adopted_uid is not None else 0
        wanted = engine.blocks_for(len(job.token_ids) + 1) - held
        others = [*self._active.values(), *(job for job, _ in self._restoring)]
        for other in others:
            assert other.uid is not None
            wanted += max(1, engine.blocks_for(len(other.token_ids) + 1) - engine.blocks_of(other.uid))
        evictable = [uid for uid in self._residents.uids if uid != adopted_uid]
        if engine.num_free_blocks + sum(engine.blocks_of(uid) for uid in evictable) < wanted and others:
            return False
        while engine.num_free_blocks < wanted or engine.num_tracked >= engine.max_tracked:
            if not evictable:
                return not others and engine.num_free_blocks >= wanted
            self._evict_resident(evictable.pop(0))
        return True

    def _adopt(self, job: Job, uid: int, num_tokens: int) -> None:
        """Hand a resident to the job, truncated to what they share."""
        self._residents.take(uid)
        if self._engine.seen_tokens(uid) > num_tokens:
            self._saver.heal(uid)
            self._saver.truncate(uid, num_tokens)
            self._engine.truncate(uid, num_tokens)
        job.uid = uid
        if job.num_generated == 0:
            job.report.resident_tokens = num_tokens
        self._counters.add("resident_tokens_total", num_tokens)
        self._enqueue(job, num_tokens)

    def _start(self, job: Job, num_present: int) -> None:
        """The job's sequence holds its first `num_present` tokens: let MII run the rest."""
        assert job.uid is not None
        self._saver.open(job.uid, seed=job.seed, token_ids=job.token_ids[:num_present])
        self._enqueue(job, num_present)

    def _enqueue(self, job: Job, num_present: int) -> None:
        assert job.uid is not None
        if job.num_generated == 0:
            job.report.prefill_tokens = job.num_prompt - num_present
        self._counters.add("prefill_tokens_total", len(job.token_ids) - num_present)
        self._active[job.uid] = job
        self.request_queue.put(JobRequest.of(job, num_present))

    # --- restoring ----------------------------------------------------------------------------------------------

    def _restore(self) -> None:
        """One slice of the oldest restore; more when nothing else could run meanwhile."""
        if not self._restoring:
            return
        job, restore = self._restoring[0]
        is_alone = not self._active
        try:
            outcome = restore.step(ALONE_SLICE_S if is_alone else self._restore_slice_s, wait=is_alone)
        except Exception:
            _log.exception("a restore failed; the history is prefilled instead")
            self._counters.add("restore_errors_total")
            self._restoring.popleft()
            job.report.miss_reason = "restore_failed"
            self._start(job, 0)
            return
        if outcome is None:
            return
        self._restoring.popleft()
        elapsed_s = time.perf_counter() - job.admitted_s
        self._counters.add("restored_tokens_total", outcome.num_tokens)
        self._counters.add("restored_bytes_total", outcome.read_bytes)
        self._counters.add("restore_seconds_total", elapsed_s)
        self._counters.add("restores_total")
        if job.num_generated == 0:
            job.report.restored_tokens = outcome.num_tokens
            job.report.restore_ms = 1e3 * elapsed_s
            if outcome.num_tokens:
                job.report.restored_from = "+".join(outcome.tiers)
                job.report.method = "+".join(outcome.kinds)
            job.report.miss_reason = outcome.cut_reason or job.report.miss_reason
        self._start(job, outcome.num_tokens)

    # --- leaving ------------------------------------------------------------------------------------------------

    def _leave(self, job: Job, reason: FinishReason | None = None) -> None:
        """A job is over: keep or evict its context, tell the caller."""
        job.finish_reason = job.finish_reason or reason
        uid, job.uid = job.uid, None
        if uid is not None:
            was_running = self._active.pop(uid, None) is not None
            if job.finish_reason is FinishReason.ERROR:
                self._forget(uid, job)
            elif was_running and self._keep == "lru" and self._engine.seen_tokens(uid) > 0:
                self._saver.heal(uid)
                self._residents.add(uid, job.seed, job.token_ids[: self._engine.seen_tokens(uid)])
            else:
                self._evict(uid)
        self._counters.add(f"requests_{job.finish_reason.value if job.finish_reason else 'error'}_total")
        job.request.on_finish(job.result())

    def _evict(self, uid: int) -> None:
        self._saver.heal(uid)
        self._saver.close(uid)
        self._engine.evict(uid)

    def _evict_resident(self, uid: int) -> None:
        self._residents.take(uid)
        self._evict(uid)
        self._counters.add("evicted_residents_total")

    def _forget(self, uid: int, job: Job) -> None:
        """The job's state cannot be trusted: neither its blocks nor what was saved of it."""
        self._saver.close(uid)
        self._engine.evict(uid)
        self._saver.drain(PENDING_WAIT_S)
        self._store.delete(job.span_ids())

    def _fail_active(self, error: HCacheError) -> None:
        self.buffer.clear()
        self.scheduled_requests = RequestBatch()
        while not self.request_queue.empty():
            self.request_queue.get_nowait()
        for job in list(self._active.values()):
            if job.finish_reason is None:
                job.fail(error)
            self._leave(job)

    # --- MII's loop ---------------------------------------------------------------------------------------------

    @property
    def is_rank_0(self) -> bool:
        return True

    def _bcast_requests(self, force: bool = False) -> tuple[RequestBatch, bool]:
        return self.scheduled_requests, force

    def put(self, uids: list[int], tokenized_input: list[torch.Tensor]) -> torch.Tensor:
        segments = [
            StepSegment(uid=uid, token_ids=tokens.tolist()) for uid, tokens in zip(uids, tokenized_input, strict=True)
        ]
        self._saver.begin_step(segments)
        try:
            logits = self._engine.put(uids, tokenized_input)
        except BaseException:
            self._saver.abort_step()
            raise
        self._saver.end_step()
        self._counters.add("steps_total")
        return logits

    def _process_logits(
        self, next_token_logits: torch.Tensor, running_requests: RequestBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        greedy = next_token_logits.argmax(-1).cpu()
        # argmax ignores nothing: a NaN anywhere in a row makes its sum NaN.
        is_sound = torch.isfinite(next_token_logits.to(torch.float32).sum(-1)).cpu()
        for row, request in enumerate(running_requests):
            if not request.last_in_prompt:
                continue
            job: Job = request.job
            if not is_sound[row]:
                job.fail(HCacheError("the model gave logits that are not finite; this state was thrown away"))
            elif job.generator is not None:
                greedy[row] = sample(next_token_logits[row], job.request.sampling, job.generator)
        return greedy, torch.zeros(len(greedy), dtype=torch.bool)

    def _generate_output(self, r: JobRequest) -> bool:
        job = r.job
        if job.finish_reason is None:
            self._counters.add("generated_tokens_total")
            job.accept(int(r.next_token))
        if job.finish_reason is not None:
            self._leave(job)
        return True

    def schedule_requests(self) -> None:
        self._free_blocks_for_decode()
        super().schedule_requests()

    def _free_blocks_for_decode(self) -> None:
        """Running sequences come before residents."""
        engine = self._engine
        wanted = sum(engine.get_remaining_block_capacity(uid) == 0 for uid in self._active)
        while engine.num_free_blocks < wanted and (uid := self._residents.oldest()) is not None:
            self._evict_resident(uid)

    def reset_request_status(self) -> None:
        """Nothing could be scheduled: free blocks. Residents first, then a restore, then the youngest running job."""
        if (uid := self._residents.oldest()) is not None:
            self._evict_resident(uid)
            return
        self._counters.add("preemptions_total")
        if self._restoring:
            job, restore = self._restoring.pop()
            restore.cancel()
            assert job.uid is not None
            self._engine.evict(job.uid)
            job.uid = None
            self._waiting.appendleft(job)
            return
        holders = [request for request in self.buffer if self._engine.blocks_of(request.uid) > 0]
        if not holders:
            return
        victim = max(holders, key=lambda request: request.job.order)
        self.buffer.remove(victim)
        job = victim.job
        del self._active[job.uid]
        self._evict(job.uid)
        job.uid = None
        self._waiting.appendleft(job)
