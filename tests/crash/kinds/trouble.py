"""The kinds in which a disk makes trouble for a while and is well again: full, failing, short and slow ones."""

from __future__ import annotations

import errno
import subprocess
from pathlib import Path
from typing import Any

from tests.crash.case import Case, Unavailable
from tests.crash.job import RAISED, make_job
from tests.crash.ledger import Broken, Ledger
from tests.crash.opened import StoreSpec
from tests.crash.preloaded import FAIL, META, READ, SHORT, SLEEP, SYNC, WRITE, rule


def full(case: Case) -> None:
    """disks that are full: no growth (RLIMIT_FSIZE), no room (ENOSPC), a small tmpfs where one may be mounted."""
    rng = case.rng
    way = rng.choice(["budget", "budget", "rlimit", "tmpfs"])
    if way == "tmpfs" and _mount(case.root / "small"):
        try:
            ballast = case.root / "small" / "ballast"
            ballast.write_bytes(bytes(rng.randrange(5 << 20, 7 << 20)))
            _live(case, {"ballast": str(ballast)}, home=case.root / "small")
        finally:
            subprocess.run(["umount", case.root / "small"], check=True)
        case.counts["on a small tmpfs"] += 1
    elif way == "rlimit":
        _live(case, {"file_bytes": rng.randrange(50_000, 400_000)})
        case.counts["under RLIMIT_FSIZE"] += 1
    else:
        num_bytes = rng.choice([0, rng.randrange(20_000), rng.randrange(1_000_000)])
        no_room = rule(WRITE, ".seg", FAIL, float(errno.ENOSPC), skip=num_bytes // 8000)  # a ring asks for no budget
        _live(case, {"budget_bytes": num_bytes} | ({"rules": [no_room]} if case.io == "uring" else {}))
        case.counts["without room"] += 1


def failing(case: Case) -> None:
    """disks that fail: EIO (and ENOSPC) on reads, writes, syncs, holes and new files, now and then or for good."""
    rng = case.rng
    rules = [
        rule(
            ops,
            rng.choice(["", "", ".seg", ".sqlite"]),
            FAIL,
            float(rng.choice([errno.EIO, errno.EIO, errno.ENOSPC])),
            probability=rng.choice([0.02, 0.2, 0.7]),
            skip=rng.choice([0, 0, 20]),
            count=rng.choice([-1, -1, 3]),
        )
        for ops in rng.sample([READ, WRITE, SYNC, META], rng.choice([1, 1, 2, 4]))
    ]
    _live(case, {"rules": rules})


def short(case: Case) -> None:
    """transfers that are short: no trouble at all, if everybody looks how far they got."""
    rules = [rule(READ | WRITE, "", SHORT, case.rng.random(), probability=0.4)]
    _live(case, {"rules": rules}, is_faulty=False)


def stall(case: Case) -> None:
    """disks that hang for a while: nothing fails, all comes to an end."""
    rng = case.rng
    ops = rng.choice([READ, WRITE, SYNC, READ | WRITE | SYNC])
    rules = [rule(ops, rng.choice(["", ".seg", ".sqlite"]), SLEEP, rng.uniform(0.02, 0.3), probability=0.05, count=20)]
    _live(case, {"rules": rules}, is_faulty=False)


def _live(case: Case, device: dict[str, Any], *, is_faulty: bool = True, home: Path | None = None) -> None:
    """One life with trouble, which ends before the store is closed; then all must be as if there had been none."""
    if case.nursery.library is None:
        raise Unavailable("system calls cannot be made to fail without a C compiler")
    rng, num_threads = case.rng, case.rng.choice([1, 3])
    spec = case.spec(is_tight=False, scale="small", dram_bytes=rng.choice([0, 0, 300_000]))
    spec = spec if home is None else spec.moved_to(home)
    ledger = Ledger(24, num_threads, may_vanish=is_faulty, is_faulty=is_faulty, is_tiered=spec.dram_bytes > 0)
    ledger.has_holes = is_faulty
    workload = case.workload(scale="small", num_ops=60, num_threads=num_threads, with_pins=False)
    device = {"root": str(home or case.root), "seed": rng.getrandbits(32), "heals": True, **device}
    events = case.file("events")
    status = case.nursery.preloaded.run(make_job(spec, workload, events, mutate=case.mutate, device=device))
    if status == RAISED and "raised ConfigError" in events.read_text():
        case.counts["refused to open"] += 1
        return
    case.feed(ledger, events)
    if status != 0:
        raise Broken(f"the writer ended with {status}: {events.read_text().splitlines()[-1:]}")
    ledger.restart(_verified(case, spec, ledger))


def _verified(case: Case, spec: StoreSpec, ledger: Ledger) -> dict[int, int]:
    text = [path.read_text() for path in case.root.glob("*.events")]
    case.counts["faults"] += sum(
        int(line.split()[1]) for one in text for line in one.split("\n") if line.startswith("struck ")
    )
    return case.verify(spec, ledger, "small").versions


def _mount(path: Path) -> bool:
    """A tmpfs of 8 MiB; False where that is not allowed."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m,mode=700", "none", path]
    try:
        return subprocess.run(command, capture_output=True, timeout=20).returncode == 0
    except OSError:
        return False
