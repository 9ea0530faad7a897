"""power cuts: any part of what was never synced is missing, whatever its order."""

from __future__ import annotations

import random
import shutil

from tests.crash.case import Case, Unavailable, copy_files
from tests.crash.job import RAISED, make_job
from tests.crash.ledger import Broken, Ledger
from tests.crash.opened import StoreSpec
from tests.crash.replay import Base, Replay

_NUM_CUTS = 12


def run(case: Case) -> None:
    """Record a writer's life, then cut it at a dozen moments; sometimes a second life begins on what a cut left."""
    if case.nursery.library is None:
        raise Unavailable("writes cannot be recorded without a C compiler")
    rng = case.rng
    scale = rng.choice(["small", "small", "small", "large"])
    is_tight, num_threads = rng.random() < 0.5, rng.choice([1, 3])
    spec = case.spec(is_tight=is_tight, scale=scale)
    ledger = Ledger(24, num_threads, may_vanish=is_tight)
    ledger.outlives_power = spec.durability == "strict"
    home, base = case.root / "home", None
    home.mkdir()
    spec = spec.moved_to(home)
    for life in range(rng.choice([1, 2, 2])):
        replay = _record(case, spec, ledger, scale, life, base)
        home.rename(case.root / f"recorded{life}")
        for cut in (cuts := _moments(replay, rng)):
            ledger_then = _ledger_at(ledger, replay, cut)
            replay.image(cut, home, rng, rng.choice([0.0, None, None, None, 1.0]))
            case.counts["power cuts"] += 1
            copy_files(home, case.root / "untouched")
            try:
                case.verify(spec, ledger_then, scale, has_holes=True)
            except Exception as error:
                error.args = (f"{error} (cut {cut} of {replay.num_records}, see {case.root.name}/untouched)",)
                raise
            shutil.rmtree(home)
            if cut == cuts[-1]:  # the next life begins here, and nobody has looked
                (case.root / "untouched").rename(home)
                break
            shutil.rmtree(case.root / "untouched")
        ledger = ledger_then
        ledger.restart(None)
        ledger.has_holes = True
        base = Base(home)


def _record(case: Case, spec: StoreSpec, ledger: Ledger, scale: str, life: int, base: Base | None) -> Replay:
    rng, events = case.rng, case.file("record")
    workload = case.workload(
        scale=scale,
        num_ops=rng.choice([20, 60]) if scale == "small" else 15,
        num_threads=ledger.num_threads,
        first_version=1 + life * 1_000_000,
    )
    home = case.root / "home"
    device = {"root": str(home), "seed": rng.getrandbits(32), "record": str(events)}
    status = case.nursery.preloaded.run(
        make_job(spec, workload, case.file("events"), mutate=case.mutate, device=device)
    )
    replay = Replay(events, home, base)
    if status == RAISED:
        raise Broken(f"the writer failed: {replay.notes[-1:]}")
    case.counts["operations"] += len(replay.notes)
    return replay


def _ledger_at(before: Ledger, replay: Replay, cut: int) -> Ledger:
    ledger = before.copy()
    for line in replay.notes_before(cut):
        ledger.feed(line)
    return ledger


def _moments(replay: Replay, rng: random.Random) -> list[int]:
    """Anywhere, and just after something was promised."""
    promises = [position for position, text in replay.notes if text.startswith(("flushed", "closed", "deleted"))]
    cuts = [rng.randrange(1, replay.num_records + 1) for _ in range(_NUM_CUTS // 2)]
    for _ in range(_NUM_CUTS - len(cuts)):
        cuts.append(min(replay.num_records, rng.choice(promises or [1]) + rng.choice([1, 1, 1, 2, 5, 20])))
    return cuts
