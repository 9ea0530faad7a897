"""Threads that all use the same spans: put, read, delete and pin whatever the others do."""

from __future__ import annotations

import itertools
import random
import threading
from dataclasses import dataclass

from tests.crash.opened import OpenedStore
from tests.crash.spans import chunk_bytes, make_chunks, make_record, reads_of, version_of
from tests.crash.verify import Findings, read_one
from tests.crash.workload import Say


@dataclass(frozen=True, kw_only=True)
class Contest:
    """Random work on shared names. A span's id stands for its contents, so a read may bring any version's bytes of the
    chunk that was asked for, and no others. Survives JSON."""

    seed: int
    scale: str
    num_names: int
    num_threads: int
    num_ops: int
    is_faulty: bool = False
    """Whether reads may find damage."""

    def run(self, opened: OpenedStore, say: Say) -> None:
        """Do it all; then say what is there (`is NAME VERSION`)."""
        versions = itertools.count(1)
        ever: dict[int, list[int]] = {name: [] for name in range(1, self.num_names + 1)}
        threads = [
            threading.Thread(target=self._guarded, args=(opened, say, idx, versions, ever))
            for idx in range(self.num_threads)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.is_faulty:  # files that were away may have kept another version than DRAM, which shows after a restart
            for name, tried in ever.items():
                for version in tried:
                    say(f"tried {name} {version}")

    def after_trouble(self, opened: OpenedStore, say: Say) -> None:
        """What is there, once all is quiet and well."""
        opened.store.flush()
        for name in range(1, self.num_names + 1):
            findings = Findings()
            version = read_one(opened.store, name, self.scale, findings)
            if findings.refused and not self.is_faulty:
                say(f"wrong {findings.refused}")
            say(f"is {name} {version}")
        say("flush 0")
        opened.store.flush()
        say("flushed 0")
        stats = opened.store.stats()
        if not self.is_faulty and stats.corrupt_chunks:
            say(f"wrong {stats}")

    def _guarded(
        self, opened: OpenedStore, say: Say, thread: int, versions: itertools.count[int], ever: dict[int, list[int]]
    ) -> None:
        try:
            self._work(opened, say, thread, versions, ever)
        except Exception as error:
            say(f"raised {type(error).__name__}: {error}".replace("\n", " "))

    def _work(
        self, opened: OpenedStore, say: Say, thread: int, versions: itertools.count[int], ever: dict[int, list[int]]
    ) -> None:
        rng, store = random.Random(f"{self.seed} {thread}"), opened.store
        pinned: list[bytes] = []
        for _ in range(self.num_ops):
            name = rng.randint(1, self.num_names)
            span_id = make_record(name, 1, self.scale).span_id
            action = rng.random()
            if action < 0.35:
                version = next(versions)
                record = make_record(name, version, self.scale)
                ever[name].append(version)
                store.put(record, make_chunks(record))
            elif action < 0.7:
                self._read(opened, say, [rng.randint(1, self.num_names) for _ in range(3)], ever)
            elif action < 0.82:
                store.delete([span_id])
            elif action < 0.88:
                store.pin([span_id])
                pinned.append(span_id)
            elif action < 0.94 and pinned:
                store.unpin([pinned.pop()])
            else:
                store.flush()
        store.unpin(pinned)

    def _read(self, opened: OpenedStore, say: Say, names: list[int], ever: dict[int, list[int]]) -> None:
        """A batch over several spans."""
        reads, of = [], []
        for name in names:
            found = opened.store.find(make_record(name, 1, self.scale).span_id)
            if found is not None:
                if version_of(found) not in ever[name]:
                    say(f"wrong span {name}: nobody put version {version_of(found)}")
                reads += reads_of(found)
                of += [(name, chunk) for chunk in found.layout.chunks]
        outcome = opened.store.get_into(reads)
        if outcome.reason not in (None, "missing") and not self.is_faulty:
            say(f"wrong spans {names}: {outcome}")
        for (name, chunk), read in zip(of[: outcome.num_ok], reads, strict=False):
            for version in ever[name]:
                record = make_record(name, version, self.scale)
                if any(
                    (*other[:3], other.shard) == (*chunk[:3], chunk.shard) and read.out == chunk_bytes(record, other)
                    for other in record.layout.chunks
                ):
                    break
            else:
                say(f"wrong span {name} layer {chunk.layer_idx} {chunk.kind}: wrong bytes served")
