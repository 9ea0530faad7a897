"""Everything that happens to a job before MII sees it: waiting for blocks, adopting a resident, restoring a history."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Set

from mii_hcache.core.geometry import SPAN_TOKENS
from mii_hcache.core.identity import SpanId
from mii_hcache.engine.job import Job
from mii_hcache.engine.ragged_engine import HCacheEngine
from mii_hcache.engine.residents import Residents
from mii_hcache.engine.restoring import Restoring, Settling
from mii_hcache.errors import RankLostError
from mii_hcache.runtime.generation import RestoreReport
from mii_hcache.runtime.lookup import Lookup, given_up
from mii_hcache.runtime.policy import RestorePolicy
from mii_hcache.runtime.restore import Restore
from mii_hcache.runtime.restorer import Restorer
from mii_hcache.runtime.saver import HEAL_WAIT_S, Saver
from mii_hcache.runtime.stats import Counters
from mii_hcache.runtime.timeline import TraceFile
from mii_hcache.storage.base import ChunkStore
from mii_hcache.storage.records import SpanRecord

_log = logging.getLogger(__name__)

ALONE_SLICE_S = 0.1
"""Restore slice while nothing else runs: only new requests and cancellations wait for it."""
PENDING_WAIT_S = 5.0
"""Longest that a request waits for its own context's last spans to reach the store."""


class Admission:
    """First come, first served. Engine thread only.

    A job leaves through `enqueue(job, num_present)`, with its sequence live and `num_present` of its tokens in blocks.
    """

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
        restore_slice_s: float,
        max_sequences: int,
        running: Mapping[int, Job],
        enqueue: Callable[[Job, int], None],
        poisoned: Set[SpanId] = frozenset(),
    ) -> None:
        """`running`: jobs that MII has, by uid. `poisoned`: spans that may yet reach the store, from where the caller
        deletes them, and must not be restored meanwhile. Both are only read here."""
        self._engine = engine
        self._store = store
        self._saver = saver
        self._restorer = restorer
        self._policy = policy
        self._counters = counters
        self._restore_slice_s = restore_slice_s
        self._max_sequences = max_sequences
        self._running = running
        self._enqueue = enqueue
        self._poisoned = poisoned
        self._uids = itertools.count(1)
        self.waiting: deque[Job] = deque()
        self.restoring: deque[Restoring] = deque()
        self._settling = Settling(policy=policy, trace=trace, counters=counters)
        self.residents = Residents()
        self._left_s = time.perf_counter()
        self._others_s = 0.0
        """Time between two slices that running sequences take, lately."""
        self._leaving: deque[tuple[int, float]] = deque()
        """Sequences whose missing spans are still to be saved, and until when; their blocks are not free yet."""

    @property
    def is_busy(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self.waiting or self.restoring or self._leaving)

    @property
    def is_evicting(self) -> bool:
        """Whether blocks will become free without any further eviction."""
        return bool(self._leaving)

    def step(self) -> None:
        """Finish evictions, admit what fits, then work on the restores."""
        if self._running:
            self._others_s += 0.2 * (time.perf_counter() - self._left_s - self._others_s)
        self._finish_evictions()
        self.tidy()
        while self.waiting and len(self._running) + len(self.restoring) < self._max_sequences:
            if not self._try_admit(self.waiting[0]):
                break
            self.waiting.popleft()
        self._restore_slice()
        self._left_s = time.perf_counter()

    def tidy(self) -> bool:
        """Give back what restores that are over left to the device, which is memory that no span can be evicted from
        or written to meanwhile, and learn from them. Does not block. False: nothing is left."""
        is_held, is_unsettled = self._restorer.collect(), self._settling.look()
        return is_held or is_unsettled

    def withdraw_cancelled(self) -> list[Job]:
        """Take cancelled jobs out; the caller ends them."""
        withdrawn = [job for job in self.waiting if job.is_cancelled]
        for job in withdrawn:
            self.waiting.remove(job)
        for restoring in [restoring for restoring in self.restoring if restoring.job.is_cancelled]:
            self.restoring.remove(restoring)
            restoring.restore.cancel()
            withdrawn.append(restoring.job)
        return withdrawn

    def withdraw_all(self) -> list[Job]:
        """Take every job out; the caller ends them."""
        for restoring in self.restoring:
            restoring.restore.cancel()
        withdrawn = [*(restoring.job for restoring in self.restoring), *self.waiting]
        self.restoring.clear()
        self.waiting.clear()
        return withdrawn

    def suspend(self, job: Job) -> None:
        """A job gives its blocks back and waits again, first in line. Its state is saved."""
        assert job.uid is not None
        self.evict(job.uid)
        job.uid = None
        self.waiting.appendleft(job)

    def suspend_youngest_restore(self) -> bool:
        """Give up the restore that started last; False when there is none."""
        if not self.restoring:
            return False
        restoring = self.restoring.pop()
        restoring.restore.cancel()
        self.suspend(restoring.job)
        return True

    # --- leaving GPU memory -------------------------------------------------------------------------------------

    def evict(self, uid: int) -> None:
        """Free a sequence's blocks, saving first what the store lacks: at once when that needs no waiting, else a few
        steps later, so that nobody's decoding waits for the disk."""
        self._leaving.append((uid, time.monotonic() + HEAL_WAIT_S))
        self._finish_evictions()

    def _finish_evictions(self, wait_s: float = 0.0) -> None:
        for _ in range(len(self._leaving)):
            uid, until_s = self._leaving.popleft()
            if not self._saver.heal(uid, wait_s):
                if time.monotonic() < until_s:
                    self._leaving.append((uid, until_s))
                    continue
                self._saver.give_up(uid)
            self._saver.close(uid)
            self._engine.evict(uid)

    def evict_resident(self, but: int | None = None) -> bool:
        """Evict the least recently used resident; False when there is none (other than `but`)."""
        uid = self.residents.oldest(but)
        if uid is None:
            return False
        self.residents.take(uid)
        self.evict(uid)
        self._counters.add("evicted_residents_total")
        return True

    def evict_all(self) -> None:
        """Evict every resident, waiting for what must be saved. The end."""
        while self.evict_resident():
            pass
        self._finish_evictions(HEAL_WAIT_S)
        while self._leaving:
            self._finish_evictions(0.05)

    # --- admission ----------------------------------------------------------------------------------------------

    def _try_admit(self, job: Job) -> bool:
        """Give the job its blocks and its history. False: not yet."""
        if self._saver.is_pending(job.span_ids()) and time.perf_counter() - job.submitted_s < PENDING_WAIT_S:
            return False
        max_reused = len(job.token_ids) - 1  # the last token must run, to give logits
        if job.wants_prompt_logprobs:
            max_reused = 0
            job.prompt_logprobs = [None]
            lookup = Lookup(records=[], next_span=None, why_missing="prompt_logprobs")
        elif self._policy.storage is None:
            lookup = Lookup(records=[], next_span=None, why_missing="recompute")
        elif not self._poisoned.isdisjoint(job.span_ids()):
            lookup = Lookup(records=[], next_span=None, why_missing="not_saved")
        else:
            lookup = self._policy.find(self._store, job.spans(), max_tokens=max_reused)
        found = self.residents.best(job.seed, job.token_ids, max_reused)
        if found is not None and found[1] > SPAN_TOKENS * lookup.num_unbroken:
            lookup = lookup.unbroken()  # the resident holds what would have to be computed
        if found is not None and found[1] < lookup.num_tokens:
            found = None
        num_resident = found[1] if found is not None else 0
        if not self._make_room(job, found[0].uid if found is not None else None):
            return False
        job.admitted_s = time.perf_counter()
        if job.num_generated == 0:
            job.report = RestoreReport(miss_reason=_miss_reason(job, lookup, num_resident))
        if found is not None:
            self._adopt(job, found[0].uid, num_resident)
            return True
        job.uid = next(self._uids)
        if not (lookup.records and self._restore(job, lookup.records)):
            self._engine.reserve(job.uid, 0)
            self._start(job, 0)
        return True

    def _compute_share(self) -> float:
        """Share of the engine's time that restores get now; in steps, so that plans can be remembered."""
        if not self._running:
            return 1.0
        share = self._restore_slice_s / (self._restore_slice_s + self._others_s)
        return float(2.0 ** round(math.log2(share)))

    def _fail_restore(self, job: Job) -> None:
        """To be called where an exception was caught."""
        _log.exception("a restore failed; the history is prefilled instead")
        self._counters.add("restore_errors_total")
        job.report.miss_reason = "restore_failed"

    def _restore(self, job: Job, records: list[SpanRecord]) -> bool:
        """Start a restore, as the policy has it. False: prefilling is faster."""
        assert job.uid is not None
        store = self._store
        tiers = [store.tier_of(record.span_id) or store.name for record in records]
        restore: Restore | None = None
        try:
            choice = self._policy.choose(
                records, tiers, compute_share=self._compute_share(), num_others=len(self.restoring)
            )
            if choice.is_prefill:
                self._counters.add("restores_not_worth_it_total")
                if job.num_generated == 0 and job.report.miss_reason is None:
                    job.report.miss_reason = "slower"
                return False
            self._engine.reserve(job.uid, len(records) * SPAN_TOKENS)
            restore = self._restorer.start(
                self._engine.target(job.uid),
                records,
                job.token_ids,
                recompute_tokens=choice.recompute_tokens,
                recompute_layers=choice.recompute_layers,
            )
            restore.read_ahead()
        except Exception as error:
            if restore is not None:
                restore.cancel()
            if isinstance(error, RankLostError):
                raise
            self._fail_restore(job)
            return False
        self.restoring.append(Restoring(job=job, restore=restore, choice=choice, records=records))
        return True

    def _make_room(self, job: Job, adopted_uid: int | None) -> bool:
        """Free blocks and a tracking slot for the job by evicting residents; none when that would not be enough.

        Blocks promised to prompts that are still being prefilled do not count as free, and every running sequence may
        soon need one more.
        """
        engine = self._engine
        held = engine.blocks_of(adopted_uid) if adopted_uid is not None else 0
        wanted = engine.blocks_for(len(job.token_ids) + 1) - held
        others = [*self._running.values(), *(restoring.job for restoring in self.restoring)]
        for other in others:
            assert other.uid is not None
            wanted += max(1, engine.blocks_for(len(other.token_ids) + 1) - engine.blocks_of(other.uid))
        leaving = [uid for uid, _ in self._leaving]
        evictable = sum(engine.blocks_of(uid) for uid in [*self.residents.uids, *leaving] if uid != adopted_uid)
        if others and engine.num_free_blocks + evictable < wanted:
            return False
        while engine.num_free_blocks < wanted or engine.num_tracked >= engine.max_tracked:
            if self.is_evicting or not self.evict_resident(but=adopted_uid):
                return False
        return True

    def _adopt(self, job: Job, uid: int, num_tokens: int) -> None:
        """Hand a resident to the job, truncated to what they share."""
        self.residents.take(uid)
        if self._engine.seen_tokens(uid) > num_tokens:
            self._saver.heal(uid, 0.0)
            self._saver.truncate(uid, num_tokens)
            self._engine.truncate(uid, num_tokens)
        job.uid = uid
        if job.num_generated == 0:
            job.report.resident_tokens = num_tokens
        self._counters.add("resident_tokens_total", num_tokens)
        self._enqueue(job, num_tokens)

    def _start(self, job: Job, num_present: int, left_out: frozenset[SpanId] = frozenset()) -> None:
        """The job's sequence holds its first `num_present` tokens: the rest is an ordinary prefill. Spans of `left_out`
        are not saved."""
        assert job.uid is not None
        self._saver.open(job.uid, seed=job.seed, token_ids=job.token_ids[:num_present], left_out=left_out)
        self._enqueue(job, num_present)

    # --- restoring ----------------------------------------------------------------------------------------------

    def _restore_slice(self) -> None:
        """Work on the restores, the oldest first, others when it waits for the store; longer when nothing else could
        run meanwhile."""
        is_alone = not self._running
        started_s = time.perf_counter()
        budget_s = ALONE_SLICE_S if is_alone else self._restore_slice_s
        for restoring in list(self.restoring):
            left_s = budget_s - (time.perf_counter() - started_s)
            if left_s <= 0 or self._advance(restoring, left_s, wait=is_alone and len(self.restoring) == 1):
                return
        left_s = budget_s - (time.perf_counter() - started_s)
        if is_alone and self.restoring and left_s > 0:  # all of them wait for the store
            self._advance(self.restoring[0], left_s, wait=True)

    def _advance(self, restoring: Restoring, budget_s: float, *, wait: bool) -> bool:
        """Work on one restore. True when it is over."""
        try:
            outcome = restoring.restore.step(budget_s, wait=wait)
        except RankLostError:
            raise
        except Exception:
            self._fail_restore(restoring.job)
            self.restoring.remove(restoring)
            self._start(restoring.job, 0)
            return True
        if outcome is None:
            return False
        self.restoring.remove(restoring)
        self._settling.add(restoring, outcome)
        self._start(restoring.job, outcome.num_tokens, given_up(self._store, restoring.records))
        return True


def _miss_reason(job: Job, lookup: Lookup, num_resident: int) -> str | None:
    if job.request.miss_hint is not None:
        return job.request.miss_hint
    if max(num_resident, lookup.num_tokens) == 0:
        return lookup.why_missing or "too_short"
    is_new = lookup.why_missing in (None, "not_saved", "recompute")
    return None if is_new or num_resident >= lookup.num_tokens else lookup.why_missing
