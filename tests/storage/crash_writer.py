"""A process that puts, reads, deletes and flushes until it is killed, and says what it has been promised.

Lines on stdout, each in a single write: `flushed NAME...` after a flush, with all that is there; `evicting` before a
put that may evict one span; `deleting NAME` before a deletion.
"""

from __future__ import annotations

import os
import random
import sys

from mii_hcache.storage.file import FileStore
from mii_hcache.storage.state_dir import StateDir
from tests.storage.storage_kit import IO, LAYOUTS, SPAN_DISK_BYTES, holds, make_record, put

NUM_NAMES = 12
CAPACITY_BYTES = 6 * SPAN_DISK_BYTES + 2 * 4096


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def main(path: str, seed: int, layout: str) -> None:
    rng = random.Random(seed)
    store = FileStore(StateDir(path), CAPACITY_BYTES, flush_interval_s=0.005, segment_bytes=100_000, io=IO)
    records = [make_record(name, layout=LAYOUTS[layout]) for name in range(NUM_NAMES)]
    say("flushed", *[idx for idx, record in enumerate(records) if store.find(record.span_id)])
    for _ in range(100_000):
        name = rng.randrange(NUM_NAMES)
        action = rng.random()
        if action < 0.5:
            if store.find(records[name].span_id) is None:
                say("evicting")
            put(store, records[name])
        elif action < 0.55:
            say("deleting", name)
            store.delete([records[name].span_id])
        elif action < 0.7:
            holds(store, records[name])
        else:
            store.flush()
            say("flushed", *[idx for idx, record in enumerate(records) if store.find(record.span_id)])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
