"""What a store is put through: threads that put, read, pin, delete and flush, and say what they were promised."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.crash.ledger import ABSENT
from tests.crash.opened import OpenedStore
from tests.crash.spans import ids_of, make_chunks, make_record, text_of
from tests.crash.verify import Findings, read_one

_RECOVERY_S = 20.0
"""How long a store may take to notice that a disk is well."""
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Random work. Survives JSON."""

    seed: int
    scale: str
    num_names: int
    num_threads: int
    num_ops: int
    """Of each thread."""
    first_version: int = 1
    """Versions of this run are this and above."""
    pause_s: float = 0.0
    """Longest pause between two operations."""
    with_texts: bool = True
    with_pins: bool = True
    """A pinned span may not be evicted. In two tiers that promises nothing about a death: the files may be full."""

    def run(self, opened: OpenedStore, say: Say) -> None:
        """Do it all; what a thread raises is said (`raised ...`) and ends it."""
        versions = itertools.count(self.first_version)
        threads = [
            threading.Thread(target=self._guarded, args=(opened, say, idx, versions)) for idx in range(self.num_threads)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _guarded(self, opened: OpenedStore, say: Say, thread: int, versions: itertools.count[int]) -> None:
        try:
            self._work(opened, say, thread, versions)
        except Exception as error:
            say(f"raised {type(error).__name__}: {error}".replace("\n", " "))

    def _work(self, opened: OpenedStore, say: Say, thread: int, versions: itertools.count[int]) -> None:
        rng = random.Random(f"{self.seed} {thread}")
        names = [name for name in range(1, self.num_names + 1) if name % self.num_threads == thread]
        store = opened.store
        for _ in range(self.num_ops):
            name = rng.choice(names)
            span_id = make_record(name, 1, self.scale).span_id
            action = rng.random()
            if action < 0.45:
                version = next(versions)
                record = make_record(name, version, self.scale)
                say(f"put {name} {version}")
                kept = store.put(record, make_chunks(record))
                say(f"{'accepted' if kept else 'refused'} {name} {version}")
            elif action < 0.60:
                self._read(opened, say, name)
            elif action < 0.72:
                say(f"delete {name}")
                store.delete([span_id])
                say(f"deleted {name}")
            elif action < 0.78:
                if self.with_pins and name % 5 == 0:  # few: a store full of pinned spans has no room to make
                    store.pin([span_id])
                    if store.find(span_id) is not None:
                        say(f"held {name}")
            elif action < 0.84 and self.with_texts:
                number = rng.randrange(64)
                say(f"text {number}")
                opened.transcripts.remember(b"tenant", text_of(number), ids_of(number))
                say(f"remembers {number}")
            elif action < 0.97:
                say(f"flush {thread}")
                store.flush()
                opened.transcripts.flush()
                say(f"flushed {thread}")
            else:
                time.sleep(0.01)  # let the pulse commit by itself
            if self.pause_s:
                time.sleep(rng.uniform(0, self.pause_s))

    def _read(self, opened: OpenedStore, say: Say, name: int) -> None:
        findings = Findings()
        try:
            version = read_one(opened.store, name, self.scale, findings)
        except AssertionError as error:
            say(f"wrong {error}")
            return
        if findings.refused and "missing" not in findings.refused[0]:
            say(f"damaged {name}")
        elif version == ABSENT:
            say(f"gone {name}")
        else:
            say(f"found {name} {version}")

    def after_trouble(self, opened: OpenedStore, say: Say) -> None:
        """The disk is well again: every name is put and must be kept, within some seconds and from then on."""
        version, patient_until_s = self.first_version + 100_000, time.monotonic() + _RECOVERY_S
        for name in range(1, self.num_names + 1):
            version += 1
            self._read(opened, say, name)
            record = make_record(name, version, self.scale)
            say(f"put {name} {version}")
            while not (kept := opened.store.put(record, make_chunks(record))) and time.monotonic() < patient_until_s:
                time.sleep(0.2)
            say(f"{'accepted' if kept else 'refused'} {name} {version}")
            self._read(opened, say, name)
        for thread in range(self.num_threads):
            say(f"flush {thread}")
            opened.store.flush()
            opened.transcripts.flush()
            say(f"flushed {thread}")
