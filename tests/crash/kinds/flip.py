"""damaged files: bits flipped, ends cut, pages overwritten, files swapped, doubled, foreign, or of an older day."""

from __future__ import annotations

import shutil

from mii_hcache.errors import ConfigError, StateDirBusyError
from mii_hcache.storage.base import ChunkStore
from tests.crash import mutations
from tests.crash.case import Case, copy_files
from tests.crash.damage import damage
from tests.crash.job import make_job
from tests.crash.ledger import ABSENT, Broken, Ledger
from tests.crash.opened import StoreSpec, open_store
from tests.crash.spans import make_chunks, make_record
from tests.crash.verify import Findings, read_all, read_one, read_texts

_NUM_COPIES = 15


def run(case: Case) -> None:
    """Damage copies of one store: nothing wrong is served, and each can be used on."""
    rng = case.rng
    scale, spec = "small", case.spec(is_tight=rng.random() < 0.5, scale="small")
    ledger = Ledger(24, 1, may_vanish=True)
    lives = []
    for life in range(3):
        if life == 2:
            for path in spec.paths:
                shutil.rmtree(path)  # the third is another store
        workload = case.workload(scale=scale, num_ops=80, num_threads=1, first_version=1 + life * 1_000_000)
        how = (
            {"tripwire": {"tripwire": "file:FileStore.close", "call": 1, "delay_s": 0.0}} if rng.random() < 0.5 else {}
        )
        events = case.file("events")
        case.nursery.plain.run(make_job(spec, workload, events, **(how if case.num_paths == 1 else {})))
        case.feed(ledger, events)
        ledger.restart(None)
        lives.append(case.copy_to(spec, f"life{life}"))
    for copy_idx in range(_NUM_COPIES):
        home = case.root / f"copy{copy_idx}"
        copy_files(case.root / "life1", home)
        done = [damage(home, case.root / "life0", case.root / "life2", rng) for _ in range(rng.choice([1, 1, 2, 4]))]
        try:
            _use(case, spec.moved_to(home), ledger, scale)
        except Exception as error:
            error.args = (f"{error} (copy {copy_idx}: {'; '.join(done)})",)
            raise
        shutil.rmtree(home)


def _use(case: Case, spec: StoreSpec, ledger: Ledger, scale: str) -> None:
    case.counts["damaged"] += 1
    with mutations.mutated(case.mutate):
        try:
            opened = open_store(spec)
        except (ConfigError, StateDirBusyError):
            case.counts["refused to open"] += 1
            return
        try:
            findings = read_all(opened.store, ledger, scale)
            read_texts(opened.transcripts, ledger)
            case.counts["damage seen"] += bool(opened.notes or findings.refused)
            versions = {name: _put_anew(opened.store, name, scale, findings) for name in ledger.names}
        finally:
            opened.close()
        opened = open_store(spec)
        try:
            for name, version in versions.items():
                found = read_one(opened.store, name, scale, findings)
                if found != version and not (found == ABSENT and ledger.may_vanish):
                    raise Broken(f"span {name} was version {version} and is {found} after a restart")
        finally:
            opened.close()
        case.counts["chunks verified"] += findings.num_chunks


def _put_anew(store: ChunkStore, name: int, scale: str, findings: Findings) -> int:
    """Put a span until it can be read: at most twice, as a first put may meet a copy whose damage nobody saw yet."""
    for version in (9_000_001, 9_000_002):
        record = make_record(name, version, scale)
        if not store.put(record, make_chunks(record)):
            raise Broken(f"a put of span {name} was refused by a damaged store")
        found = read_one(store, name, scale, findings)
        if found != ABSENT:
            return found
    raise Broken(f"span {name} was put and cannot be read in a damaged store")
