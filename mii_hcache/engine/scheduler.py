"""MII's scheduler (continuous batching, Dynamic SplitFuse) over contexts that are evicted, restored and kept.

Jobs pass `admission` first; then MII sees a prompt of which a first part is processed already. Preemption evicts (the
state is saved) and resumes by restoring, so no generated token is ever lost.
"""

from __future__ import annotations

import logging
import queue
import time
from collections import deque
from functools import partial
from typing import Any, Literal

import torch
from mii.batching.data_classes import RequestBatch
from mii.batching.ragged_batching import RaggedBatchBase

from mii_hcache.core.geometry import SPAN_TOKENS
from mii_hcache.core.identity import SpanId
from mii_hcache.engine.admission import Admission
from mii_hcache.engine.job import Job, JobRequest
from mii_hcache.engine.ragged_engine import HCacheEngine
from mii_hcache.engine.sampling import logprobs_of, make_generator, sample
from mii_hcache.errors import HCacheError, RankLostError
from mii_hcache.runtime.generation import FinishReason
from mii_hcache.runtime.policy import RestorePolicy
from mii_hcache.runtime.restorer import Restorer
from mii_hcache.runtime.saver import Saver, StepSegment
from mii_hcache.runtime.sightings import Sightings
from mii_hcache.runtime.stats import Counters
from mii_hcache.runtime.streams import Event
from mii_hcache.runtime.timeline import TraceFile
from mii_hcache.storage.base import ChunkStore

_log = logging.getLogger(__name__)

POISONED_WAIT_S = 1.0
"""Longest wait for a poisoned sequence's spans to reach the store, from where they are deleted. Those that have not by
then are deleted when they do."""
LOGIT_ROWS = 128
"""Prompt positions whose logits are held at once."""


class HCacheScheduler(RaggedBatchBase):  # type: ignore[misc]
    """Everything between a submitted job and its last token. Engine thread only."""

    def __init__(
        self,
        *,
        engine: HCacheEngine,
        store: ChunkStore,
        saver: Saver,
        restorer: Restorer,
        policy: RestorePolicy,
        trace: TraceFile | None,
        counters: Counters,
        keep: Literal["none", "lru"],
        restore_slice_s: float,
        max_sequences: int,
        sightings: Sightings,
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
        self._policy = policy
        self._saver = saver
        self._counters = counters
        self._keep = keep
        self._sightings = sightings
        self._running: dict[int, Job] = {}
        self._prefill: tuple[int, int, Event] | None = None
        """Sequence, tokens and start of a step that only prefills one of them."""
        self._poisoned: set[SpanId] = set()
        """Spans of poisoned sequences that were on their way to the store when the others were deleted."""
        self._admission = Admission(
            engine=engine,
            store=store,
            saver=saver,
            restorer=restorer,
            policy=policy,
            trace=trace,
            counters=counters,
            restore_slice_s=restore_slice_s,
            max_sequences=max_sequences,
            running=self._running,
            enqueue=self._enqueue,
            poisoned=self._poisoned,
        )
        engine.model().qkv_input_tap = saver

    # --- what the service calls ---------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether `iterate` has anything to do."""
        return bool(self._running) or self._admission.is_busy

    def tidy(self) -> bool:
        """As `Admission.tidy`: for when there is nothing else to do."""
        return self._admission.tidy()

    @property
    def num_waiting(self) -> int:
        """Jobs that wait for a place."""
        return len(self._admission.waiting)

    def add(self, job: Job) -> None:
        """Queue a job."""
        job.generator = make_generator(job.request.sampling)
        self._sightings.note(job.span_ids())
        self._admission.waiting.append(job)

    def cancel(self, job: Job) -> None:
        """End a job at the next chance."""
        job.is_cancelled = True

    def iterate(self) -> None:
        """Admit, restore a slice, run one engine step. A failed step fails its jobs; the loop lives on. Raises
        RankLostError, which is the engine's end."""
        self._forget_poisoned()
        for job in self._admission.withdraw_cancelled():
            self._leave(job, FinishReason.CANCELLED)
        self._admission.step()
        if not self._running:
            if not self._admission.restoring:
                time.sleep(0.0005)  # spans are on their way to the store: a context's last ones, or healed ones
            return
        try:
            self.generate()
        except RankLostError:
            raise
        except Exception as error:
            _log.exception("an engine step failed")
            self._counters.add("step_errors_total")
            self._fail_running(HCacheError(f"the engine step failed: {error}"))

    def gauges(self) -> dict[str, float]:
        """Sizes at this moment."""
        return {
            "blocks": self._engine.num_blocks,
            "block_tokens": self._engine.block_size,
            "blocks_free": self._engine.num_free_blocks,
            "requests_waiting": len(self._admission.waiting),
            "requests_restoring": len(self._admission.restoring),
            "requests_running": len(self._running),
            "resident_contexts": len(self._admission.residents),
            "spans_pending": self._saver.num_pending,
        }

    def close(self) -> None:
        """Cancel what is left and evict every context, saving what is missing."""
        for job in [*self._admission.withdraw_all(), *self._running.values()]:
            self._leave(job, FinishReason.CANCELLED)
        self._admission.evict_all()
        if self._poisoned:
            self._saver.drain(POISONED_WAIT_S)
            self._forget_poisoned()

    def abandon(self) -> None:
        """The engine is lost: let go of what restores hold. The caller ends the jobs."""
        self._admission.withdraw_all()

    # --- the life of a running job ------------------------------------------------------------------------------

    def _enqueue(self, job: Job, num_present: int) -> None:
        """A job comes in with `num_present` tokens in its blocks: MII runs the rest."""
        assert job.uid is not None
        if job.num_generated == 0:
            job.report.prefill_tokens = job.num_prompt - num_present
        self._counters.add("prefill_tokens_total", len(job.token_ids) - num_present)
        self._running[job.uid] = job
        self.request_queue.put(JobRequest.of(job, num_present))

    def _leave(self, job: Job, reason: FinishReason | None = None) -> None:
        """A job is over: keep or evict its context, tell the caller."""
        job.finish_reason = job.finish_reason or reason
        uid, job.uid = job.uid, None
        if uid is not None:
            was_running = self._running.pop(uid, None) is not None
            if job.finish_reason is FinishReason.ERROR:
                self._throw_away(uid, job)
            elif was_running and self._keep == "lru" and self._engine.seen_tokens(uid) > 0:
                self._saver.heal(uid, 0.0)  # what finds no room now is healed when the resident is evicted
                self._admission.residents.add(uid, job.seed, job.token_ids[: self._engine.seen_tokens(uid)])
            else:
                self._admission.evict(uid)
        self._counters.add(f"requests_{job.finish_reason.value if job.finish_reason else 'error'}_total")
        job.request.on_finish(job.result())

    def _throw_away(self, uid: int, job: Job) -> None:
        """The sequence's state cannot be trusted: free its blocks unsaved; a poisoned one is forgotten on disk too."""
        self._saver.close(uid)
        self._engine.evict(uid)
        if job.is_poisoned:
            self._saver.drain(POISONED_WAIT_S)
            # asked before: what comes in between is deleted twice
            self._poisoned |= {span_id for span_id in job.span_ids() if self._saver.is_pending([span_id])}
            self._store.delete(job.span_ids())

    def _forget_poisoned(self) -> None:
        """Delete what had not reached the store in time, and has now."""
        late = [span_id for span_id in self._poisoned if not self._saver.is_pending([span_id])]
        if late:
            self._store.delete(late)
            self._poisoned.difference_update(late)

    def _fail_running(self, error: HCacheError) -> None:
        self.buffer.clear()
        self.scheduled_requests = RequestBatch()
        while not self.request_queue.empty():
            self.request_queue.get_nowait()
        for job in list(self._running.values()):
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
        is_one = len(segments) == 1 and len(segments[0].token_ids) >= SPAN_TOKENS
        main = self._saver.streams.main  # which may have work left from before the step
        self._prefill = (uids[0], len(segments[0].token_ids), main.record(is_timed=True)) if is_one else None
        wants_all = any(self._running[uid].wants_prompt_logprobs for uid in uids)
        self._engine.model().output_tap = partial(self._read_prompt_logprobs, segments) if wants_all else None
        try:
            logits = self._engine.put(uids, tokenized_input)
        except BaseException:
            self._saver.abort_step()
            raise
        self._saver.end_step()
        self._counters.add("steps_total")
        return logits

    def _read_prompt_logprobs(self, segments: list[StepSegment], output: torch.Tensor) -> None:
        """How likely the prompt tokens were that follow those of this step. A few rows at a time: a row of logits may
        be larger than a token's whole state."""
        first_row = 0
        for segment in segments:
            job = self._running[segment.uid]
            num_rows = len(segment.token_ids)
            done = len(job.prompt_logprobs)  # row i of the segment is for token `done + i`
            following = job.token_ids[done : done + num_rows] if job.wants_prompt_logprobs else []
            for at in range(0, len(following), LOGIT_ROWS):
                told = torch.tensor(following[at : at + LOGIT_ROWS])
                rows = torch.arange(first_row + at, first_row + at + len(told), device=output.device)
                logits = self._engine.model().logits_of(output, rows)
                job.prompt_logprobs += logprobs_of(logits, told, job.request.num_top_logprobs or 0)
            first_row += num_rows

    def _process_logits(
        self, next_token_logits: torch.Tensor, running_requests: RequestBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # argmax ignores nothing: a NaN anywhere in a row makes its sum NaN. One copy, and so one wait, for both.
        is_finite = torch.isfinite(next_token_logits.sum(-1, dtype=torch.float32))
        greedy, is_sound = torch.stack([next_token_logits.argmax(-1), is_finite.to(torch.int64)]).cpu()
        if self._prefill is not None:  # the step is over on a GPU, too, now that its logits are here
            uid, num_tokens, started = self._prefill
            start = self._engine.seen_tokens(uid) - num_tokens
            self._policy.learn_prefill(start, num_tokens, time.perf_counter() - started.passed_s)
            self._prefill = None
        for row, request in enumerate(running_requests):
            if not request.last_in_prompt:
                continue
            job: Job = request.job
            if not is_sound[row]:
                job.is_poisoned = True
                job.fail(HCacheError("the model gave logits that are not finite; this state was thrown away"))
                continue
            if job.generator is not None:
                greedy[row] = sample(next_token_logits[row], job.request.sampling, job.generator)
            if job.request.num_top_logprobs is not None:
                one = slice(row, row + 1)
                (request.logprob,) = logprobs_of(next_token_logits[one], greedy[one], job.request.num_top_logprobs)
        return greedy, torch.zeros(len(greedy), dtype=torch.bool)

    def _generate_output(self, r: JobRequest) -> bool:
        job = r.job
        if job.finish_reason is None:
            self._counters.add("generated_tokens_total")
            job.accept(int(r.next_token), r.logprob)
        if job.finish_reason is not None:
            self._leave(job)
        return True

    def schedule_requests(self) -> None:
        self._free_blocks_for_decode()
        super().schedule_requests()

    def _free_blocks_for_decode(self) -> None:
        """Running sequences come before residents."""
        engine = self._engine
        wanted = sum(engine.get_remaining_block_capacity(uid) == 0 for uid in self._running)
        while engine.num_free_blocks < wanted and not self._admission.is_evicting:
            if not self._admission.evict_resident():
                return

    def reset_request_status(self) -> None:
        """Nothing could be scheduled: free blocks. Residents first, then a restore, then the youngest running job."""
        if self._admission.is_evicting:
            time.sleep(0.0005)  # blocks are about to become free
            return
        if self._admission.evict_resident():
            return
        self._counters.add("preemptions_total")
        if self._admission.suspend_youngest_restore():
            return
        holders = [request for request in self.buffer if self._engine.blocks_of(request.uid) > 0]
        if holders:
            victim = max(holders, key=lambda request: request.job.order)
            self.buffer.remove(victim)
            del self._running[victim.uid]
            self._admission.suspend(victim.job)
