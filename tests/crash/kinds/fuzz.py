"""forged headers, rows and slots whose checksums are right: no exception but the documented ones, nothing wrong."""

from __future__ import annotations

import random
import resource
import shutil
import struct
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mii_hcache.errors import ConfigError, CorruptChunkError, StateDirBusyError
from mii_hcache.storage.format import SegmentHeader, SlotHeader
from tests.crash.case import Case, copy_files
from tests.crash.forge import forge
from tests.crash.job import make_job
from tests.crash.ledger import Broken, Ledger
from tests.crash.opened import StoreSpec, open_store
from tests.crash.spans import make_chunks, make_record
from tests.crash.verify import read_forged, read_texts
from tests.crash.workload import Say

_NUM_ROUNDS = 20
_MEMORY_BYTES = 8 << 30
"""A forged number must not make anybody take more."""


def run(case: Case) -> None:
    """Forge copies of one store, in a process of their own: it may not crash, either."""
    spec = case.spec(is_tight=False, scale="small")
    ledger = Ledger(12, 1, may_vanish=True)
    events = case.file("events")
    workload = case.workload(scale="small", num_ops=80, num_threads=1, num_names=12)
    case.nursery.plain.run(make_job(spec, workload, events))
    case.feed(ledger, events)
    told = case.file("events")
    job = make_job(spec, None, told, mutate=case.mutate) | {
        "call": "tests.crash.kinds.fuzz:work",
        "arguments": {
            "spec": asdict(spec),
            "root": str(case.root),
            "seed": case.rng.getrandbits(32),
            "ever": {name: sorted(versions) for name, versions in ledger.ever.items()},
            "texts": sorted(ledger.texts),
        },
    }
    status = case.nursery.plain.run(job)
    lines = told.read_text().splitlines() if told.exists() else []
    for line in lines:
        if not line.startswith("counted "):
            raise Broken(line)
        _, num, what = line.split(" ", 2)
        case.counts[what] += int(num)
    if status != 0:
        raise Broken(f"the process ended with {status}: {lines[-1:]}")


def work(say: Say, *, spec: dict[str, Any], root: str, seed: int, ever: dict[str, list[int]], texts: list[int]) -> None:
    """Forge, open, read, put, open again. In a child."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    rng = random.Random(seed)
    ledger = Ledger(len(ever), 1, may_vanish=True)
    ledger.ever = {int(name): set(versions) for name, versions in ever.items()}
    ledger.texts = set(texts)
    whole = StoreSpec(**{**spec, "paths": tuple(spec["paths"])})
    num_chunks = num_opened = 0
    for round_idx in range(_NUM_ROUNDS):
        home = Path(root) / f"forged{round_idx}"
        home.mkdir()
        for path in whole.paths:
            copy_files(Path(path), home / Path(path).name)
        copy = whole.moved_to(home)
        done = [forge(Path(rng.choice(copy.paths)), rng) for _ in range(rng.choice([1, 1, 2, 3]))]
        try:
            num_chunks += _use(copy, ledger, round_idx)
            num_opened += 1
        except (ConfigError, StateDirBusyError):
            pass
        except BaseException as error:
            say(f"{type(error).__name__}: {error} after {'; '.join(done)}".replace("\n", " "))
            raise
        shutil.rmtree(home)
        _parse_blocks(rng)
    say(f"counted {_NUM_ROUNDS} forged")
    say(f"counted {num_opened} opened")
    say(f"counted {num_chunks} chunks verified")


def _use(spec: StoreSpec, ledger: Ledger, round_idx: int) -> int:
    num_chunks = 0
    for turn in range(2):
        opened = open_store(spec)
        try:
            num_chunks += read_forged(opened.store, ledger, "small")
            read_texts(opened.transcripts, ledger)
            opened.store.touch([make_record(name, 1, "small").span_id for name in ledger.names])
            for name in (1, 2):
                version = 1_000_000 + 2 * round_idx + turn
                ledger.ever[name].add(version)
                record = make_record(name, version, "small")
                opened.store.delete([record.span_id])
                opened.store.put(record, make_chunks(record))
            opened.transcripts.remember(b"tenant", "a text more", [1, 2, 3])
            opened.store.flush()
            opened.transcripts.flush()
            num_chunks += read_forged(opened.store, ledger, "small")
        finally:
            opened.close()
    return num_chunks


def _parse_blocks(rng: random.Random) -> None:
    """Blocks that were sealed over anything: parsed as what they say, or refused."""
    from tests.crash.forge import _seal

    for header, magic in ((SegmentHeader, b"HCACHESG"), (SlotHeader, b"HCACHESL")):
        block = bytearray(struct.pack("<8sI", magic, 2) + rng.randbytes(76) + bytes(4008))
        if rng.random() < 0.5:
            block[64:68] = b"\1\0\0\0"
        _seal(block, 0)
        try:
            parsed = header.parse(block)
        except CorruptChunkError:
            continue
        again = header.parse(parsed.pack())
        if again != parsed:
            raise Broken(f"{parsed} is packed as {again}")
