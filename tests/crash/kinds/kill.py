"""kill -9 at any moment: what was flushed is there, what was deleted is gone, nothing is damaged."""

from __future__ import annotations

import time
from pathlib import Path

from tests.crash import tripwires
from tests.crash.case import Case
from tests.crash.job import RAISED, make_job
from tests.crash.ledger import Broken, Ledger
from tests.crash.opened import StoreSpec
from tests.crash.workload import Workload

_OPENING = ("database:Database.transact", "file:recover", "room:Room.shrink", "segment:SegmentFile.punch")


def run(case: Case) -> None:
    """Six lives of one store, each ended at another moment; sometimes nobody looks before the next one."""
    rng = case.rng
    scale = rng.choice(["small", "small", "small", "large"])
    is_tight, num_threads = rng.random() < 0.5, rng.choice([1, 2, 4])
    spec = case.spec(
        is_tight=is_tight, scale=scale, dram_bytes=rng.choice([0, 0, 0, 300_000 if scale == "small" else 8 << 20])
    )
    ledger = Ledger(24, num_threads, may_vanish=is_tight)
    for life in range(6):
        workload = case.workload(
            scale=scale,
            num_ops=rng.choice([5, 40, 150]) if scale == "small" else 25,
            num_threads=num_threads,
            first_version=1 + life * 1_000_000,
            with_pins=not spec.dram_bytes,
        )
        case.feed(ledger, _live(case, spec, workload))
        for _ in range(rng.choice([0, 0, 1, 2])):
            _die_opening(case, spec)
        if life == 5 or rng.random() < 0.75:
            findings = case.verify(spec, ledger, scale)
            ledger.restart(findings.versions)
        else:
            ledger.restart(None)


def _live(case: Case, spec: StoreSpec, workload: Workload):  # type: ignore[no-untyped-def]
    """One life and its end. Returns what was said."""
    rng, events = case.rng, case.file("events")
    by_tripwire = rng.random() < 0.6
    more = {"tripwire": tripwires.choose(rng)} if by_tripwire else {}
    child = case.nursery.plain.start(make_job(spec, workload, events, mutate=case.mutate, **more))
    if not by_tripwire:
        if rng.random() < 0.7:  # else it may not have come so far on a busy machine
            _wait_until_opened(events)
        time.sleep(rng.choice([rng.uniform(0, 0.02), rng.uniform(0, 0.2)]))
        child.kill()
    status = child.wait()
    case.counts["kills"] += status < 0
    case.counts["lived to the end"] += status == 0
    if status == RAISED:
        raise Broken(f"the writer failed: {events.read_text().splitlines()[-1:]}")
    return events


def _wait_until_opened(events: Path) -> None:
    """Or until it is clear that something else is wrong."""
    stop_s = time.monotonic() + 60.0
    while time.monotonic() < stop_s and not (events.exists() and "opened" in events.read_text()):
        time.sleep(0.001)


def _die_opening(case: Case, spec: StoreSpec) -> None:
    """Die while what the last death left is being recovered."""
    job = make_job(spec, None, case.file("events"), mutate=case.mutate, tripwire=tripwires.choose(case.rng, _OPENING))
    status = case.nursery.plain.run(job)
    case.counts["kills"] += status < 0
    if status == RAISED:
        raise Broken("a store that was killed cannot be opened")
