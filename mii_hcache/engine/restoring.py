"""Jobs whose histories come back, and what is learnt and told of them once their device is done."""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass

from mii_hcache.engine.job import Job
from mii_hcache.runtime.generation import RestoreReport
from mii_hcache.runtime.policy import RestoreChoice, RestorePolicy
from mii_hcache.runtime.restore import Restore, RestoreOutcome
from mii_hcache.runtime.stats import Counters
from mii_hcache.runtime.timeline import TraceFile
from mii_hcache.storage.records import SpanRecord

_log = logging.getLogger(__name__)


@dataclass(eq=False, kw_only=True)
class Restoring:
    """A job whose history is on its way back."""

    job: Job
    restore: Restore
    choice: RestoreChoice
    records: list[SpanRecord]


class Settling:
    """Restores that are over for their jobs, which go on while a device may still work on what was launched. Engine
    thread only."""

    def __init__(self, *, policy: RestorePolicy, trace: TraceFile | None, counters: Counters) -> None:
        self._policy = policy
        self._trace = trace
        self._counters = counters
        self._waiting: deque[tuple[Restoring, RestoreOutcome, RestoreReport | None, float]] = deque()

    def add(self, restoring: Restoring, outcome: RestoreOutcome) -> None:
        """Report what came back to the job; the times follow by and by."""
        job, counters = restoring.job, self._counters
        restored_tokens = max(0, outcome.num_tokens - outcome.recomputed_tokens)
        counters.add("restores_total")
        counters.add("restored_tokens_total", restored_tokens)
        counters.add("recomputed_tokens_total", outcome.recomputed_tokens)
        counters.add("restored_bytes_total", outcome.read_bytes)
        report = job.report if job.num_generated == 0 else None  # else resumed: it tells how the prompt came in
        if report is not None:
            report.restored_tokens = restored_tokens
            report.recomputed_tokens = outcome.recomputed_tokens
            plan = restoring.choice.plan
            report.planned_ms = None if plan is None else 1e3 * plan.timeline.makespan_s
            report.restore_ms = 1e3 * (time.perf_counter() - job.admitted_s)
            report.miss_reason = outcome.cut_reason or report.miss_reason
            if restored_tokens:
                report.restored_from = "+".join(outcome.tiers)
                report.method = "+".join(outcome.kinds)
        self._waiting.append((restoring, outcome, report, job.admitted_s))
        self.look()

    def look(self) -> bool:
        """Learn from those that their device is done with, and tell how long they took. Does not block. False: none is
        left."""
        while self._waiting and self._waiting[0][0].restore.is_settled:
            self._settle(*self._waiting.popleft())
        return bool(self._waiting)

    def _settle(
        self, restoring: Restoring, outcome: RestoreOutcome, report: RestoreReport | None, admitted_s: float
    ) -> None:
        timeline, counters = restoring.restore.timeline, self._counters
        try:
            self._policy.learn(restoring.choice, restoring.restore, restoring.records)
        except Exception:  # what came back is right all the same
            _log.exception("nothing was learnt from a restore; plans stay as they are")
            counters.add("plan_errors_total")
        elapsed_s = timeline.stopped_s - admitted_s
        counters.add("restore_seconds_total", elapsed_s)
        counters.add("restore_io_seconds_total", timeline.io_s)
        counters.add("restore_compute_seconds_total", timeline.compute_s)
        counters.add("restore_bubble_seconds_total", timeline.bubble_s)
        if report is not None:
            report.restore_ms = 1e3 * elapsed_s
        if self._trace is not None:
            self._trace.write(restoring.job.request.request_id, timeline, _about(restoring, outcome))


def _about(restoring: Restoring, outcome: RestoreOutcome) -> dict[str, float | str]:
    """What a trace says of a restore as a whole."""
    timeline = restoring.restore.timeline
    about: dict[str, float | str] = {
        "tokens": outcome.num_tokens,
        "recomputed_tokens": outcome.recomputed_tokens,
        "ways": "+".join(outcome.kinds),
        "tiers": "+".join(outcome.tiers),
        "io_s": timeline.io_s,
        "compute_s": timeline.compute_s,
        "makespan_s": timeline.makespan_s,
        "bubble_s": timeline.bubble_s,
    }
    plan = restoring.choice.plan
    if plan is not None:
        about |= {"predicted_makespan_s": plan.timeline.makespan_s, "predicted_io_s": plan.timeline.io_s}
    return about
