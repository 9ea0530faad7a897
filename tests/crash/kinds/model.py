"""threads that contend for the same spans, in one tier or two, on a sound disk or a failing one, against a model."""

from __future__ import annotations

import errno
from dataclasses import asdict

from tests.crash.case import Case
from tests.crash.contest import Contest
from tests.crash.job import make_job
from tests.crash.ledger import Broken, Ledger
from tests.crash.preloaded import FAIL, READ, SHORT, SLEEP, SYNC, WRITE, rule


def run(case: Case) -> None:
    """One contest; afterwards a restart has what was there at its end."""
    rng = case.rng
    is_faulty = rng.random() < 0.4 and case.nursery.library is not None
    is_tight = rng.random() < 0.5
    spec = case.spec(is_tight=is_tight, scale="small", dram_bytes=rng.choice([0, 100_000, 2_000_000]))
    contest = Contest(
        seed=rng.getrandbits(32), scale="small", num_names=10, num_threads=4, num_ops=120, is_faulty=is_faulty
    )
    device = None
    if is_faulty:
        rules = [
            rule(READ | WRITE | SYNC, "", FAIL, float(errno.EIO), probability=0.03),
            rule(READ | WRITE, "", SHORT, 0.5, probability=0.1),
            rule(READ | WRITE | SYNC, "", SLEEP, 0.02, probability=0.02),
        ]
        device = {"root": str(case.root), "seed": rng.getrandbits(32), "rules": rules, "heals": True}
    events = case.file("events")
    job = make_job(spec, None, events, mutate=case.mutate, device=device) | {"contest": asdict(contest)}
    status = (case.nursery.preloaded if is_faulty else case.nursery.plain).run(job)
    ledger = Ledger(contest.num_names, 1, may_vanish=is_tight or is_faulty)
    case.feed(ledger, events)
    case.counts["operations"] += contest.num_threads * contest.num_ops
    if status != 0:
        raise Broken(f"the contest ended with {status}: {events.read_text().splitlines()[-1:]}")
    case.verify(spec, ledger, "small")
