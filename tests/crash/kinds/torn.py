"""writes that stop half-way, and with them the process: segments' and SQLite's, by any system call."""

from __future__ import annotations

from tests.crash.case import Case, Unavailable
from tests.crash.job import RAISED, make_job
from tests.crash.ledger import Broken, Ledger
from tests.crash.preloaded import DIE, META, SYNC, WRITE, rule

_FILES = ("", ".seg", ".new", "catalog", "-wal", "transcripts", "store.id", "-journal")


def run(case: Case) -> None:
    """Five lives of one store, each ended by a system call that was done in part, before or after the store is open."""
    if case.nursery.library is None:
        raise Unavailable("writes cannot be cut without a C compiler")
    rng = case.rng
    scale = rng.choice(["small", "small", "small", "large"])
    is_tight, num_threads = rng.random() < 0.5, rng.choice([1, 3])
    spec = case.spec(is_tight=is_tight, scale=scale)
    ledger = Ledger(24, num_threads, may_vanish=is_tight)
    for life in range(5):
        workload = case.workload(
            scale=scale,
            num_ops=60 if scale == "small" else 20,
            num_threads=num_threads,
            first_version=1 + life * 1_000_000,
        )
        ops = rng.choice([WRITE, WRITE, WRITE, SYNC, META])
        share = rng.choice([0.0, 0.5, 1.0, rng.random()])
        last = rule(ops, rng.choice(_FILES), DIE, share, skip=int(2 ** rng.uniform(0, 8)) - 1)
        early = rng.random() < 0.5
        device = {"root": str(case.root), "seed": rng.getrandbits(32), "rules": [last], "early": early}
        events = case.file("events")
        status = case.nursery.preloaded.run(make_job(spec, workload, events, mutate=case.mutate, device=device))
        case.counts["torn"] += status == 9
        case.counts["lived to the end"] += status == 0
        case.feed(ledger, events)
        if status == RAISED:
            raise Broken(f"the writer failed: {events.read_text().splitlines()[-1:]}")
        ledger.restart(case.verify(spec, ledger, scale).versions)
