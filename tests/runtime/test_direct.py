"""Saving within the step: the same bytes as in two stages, nothing pending, and a failing store costs state alone."""

from __future__ import annotations

import random
import threading
from contextlib import closing, contextmanager

import pytest

from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind
from mii_hcache.core.identity import SpanId, spans_of
from mii_hcache.core.plans import StoragePlan
from mii_hcache.runtime.stats import Counters
from mii_hcache.storage.base import ChunkStore
from mii_hcache.storage.file import FileStore
from mii_hcache.storage.memory import MemoryStore
from mii_hcache.storage.native import why_no_uring
from mii_hcache.storage.records import ChunkRead
from mii_hcache.storage.state_dir import StateDir
from mii_hcache.storage.tiered import TieredStore
from tests.runtime.kit import GIVE_UP_S, SEED, FakeEngine, FakeStore, geometry_of, open_saver, path, span_chunks
from tests.storage.storage_kit import wait_until_here

HIDDEN, KV = ChunkKind.HIDDEN, ChunkKind.KV
WHY_NO_URING = why_no_uring()
IO = ["threads", pytest.param("uring", marks=pytest.mark.skipif(WHY_NO_URING is not None, reason=str(WHY_NO_URING)))]
WIDTHS = {"a few bytes": (4, "float32"), "odd": (1030, "bfloat16"), "a block": (2048, "bfloat16")}
"""Rows that share blocks of the disk with others, and rows that are blocks."""


@contextmanager
def file_store(folder, io: str = "auto", capacity_bytes: int = 256 << 20):
    with (
        closing(StateDir(folder)) as state_dir,
        closing(FileStore(state_dir, capacity_bytes, io=io, first_pause_s=0.01)) as store,
    ):
        yield store


def _read(store: ChunkStore, span_id: SpanId) -> list[bytes]:
    """Every chunk of a span, verified by the store."""
    record = store.find(span_id)
    assert record is not None
    reads = [
        ChunkRead(span_id=span_id, layer_idx=chunk.layer_idx, out=memoryview(bytearray(chunk.num_bytes)))
        for chunk in record.layout.chunks
    ]
    assert store.get_into(reads).num_ok == len(reads)
    return [bytes(read.out) for read in reads]


def _converse(store: ChunkStore, engine: FakeEngine, plan: StoragePlan | ChunkKind, save: str, seed: int) -> Counters:
    """Sequences that prefill, decode, go back, share a prefix and leave; nothing is healed."""
    counters = Counters()
    saver = open_saver(engine, store, plan, save=save, counters=counters, ring_batches=4, save_wait=1000.0)
    chooser = random.Random(seed)
    uids = []
    for branch in (1, 2, 1):
        uids.append(engine.open())
        saver.open(uids[-1], seed=SEED, token_ids=[])
        engine.step(saver, {uids[-1]: path(branch, 0, 40 * branch)})
    for _ in range(60):
        if chooser.random() < 0.08:
            uid = chooser.choice(uids)
            num_tokens = chooser.randint(0, len(engine.tokens[uid]))
            saver.truncate(uid, num_tokens)
            engine.truncate(uid, num_tokens)
        size = chooser.choice([1, 1, 1, 1, 30, 90])
        engine.step(saver, {uid: path(idx + 1, len(engine.tokens[uid]), size) for idx, uid in enumerate(uids)})
        if save == "direct":
            assert saver.num_pending == 0
        assert saver.drain(GIVE_UP_S)
    for uid in uids:
        saver.close(uid)
    saver.stop()
    assert saver._cutter._open_buffers.num_in_use == 0 and saver._capture.ring.leased_rows == 0
    assert counters.get("dropped_rows_total") == counters.get("save_errors_total") == 0
    return counters


def _known_spans(engine: FakeEngine) -> list[tuple[SpanId, list[int]]]:
    return [
        (span_id, tokens[: (span_idx + 1) * SPAN_TOKENS])
        for tokens in engine.tokens.values()
        for span_idx, (span_id, _) in enumerate(spans_of(SEED, tokens))
    ]


@pytest.mark.parametrize("io", IO)
@pytest.mark.parametrize("width", WIDTHS)
def test_both_ways_save_the_same_bytes(tmp_path, io, width):
    hidden_size, dtype = WIDTHS[width]
    geometry = geometry_of(hidden_size=hidden_size, dtype=dtype)
    saved = {}
    for save in ("two-stage", "direct"):
        engine = FakeEngine(geometry, max_batch_tokens=300)
        with file_store(tmp_path / save, io) as store:
            counters = _converse(store, engine, HIDDEN, save, seed=1)
        with file_store(tmp_path / save, io) as store:  # opened anew: from the disk, not from what was in memory
            spans = _known_spans(engine)
            saved[save] = {span_id: _read(store, span_id) for span_id, _ in spans}
            assert len(saved[save]) > 10
            for span_id, history in spans:
                assert saved[save][span_id] == span_chunks(history, HIDDEN, geometry)
            assert counters.get("saved_bytes_total") == store.stats().num_bytes
    assert saved["direct"] == saved["two-stage"]


def test_layers_of_both_kinds_are_saved_the_same(tmp_path):
    geometry = geometry_of(hidden_size=2048, dtype="bfloat16")
    plan = StoragePlan(method="mixed", kinds=(KV, HIDDEN, KV))
    saved = []
    for save in ("two-stage", "direct"):
        engine = FakeEngine(geometry, max_batch_tokens=300)
        with file_store(tmp_path / save) as store:
            _converse(store, engine, plan, save, seed=2)
            saved.append({span_id: _read(store, span_id) for span_id, _ in _known_spans(engine)})
    assert saved[0] == saved[1] and len(saved[0]) > 10


def test_it_goes_past_memory_to_the_files(tmp_path):
    geometry = geometry_of()
    engine = FakeEngine(geometry)
    with closing(StateDir(tmp_path)) as state_dir:
        file = FileStore(state_dir, 64 << 20)
        memory = MemoryStore(64 << 20)
        with closing(TieredStore(memory, file)) as store:
            saver = open_saver(engine, store, HIDDEN, save="direct")
            uid = engine.open()
            saver.open(uid, seed=SEED, token_ids=[])
            engine.step(saver, {uid: path(1, 0, 100)})  # a span that is whole at once, and one that is gathered
            engine.step(saver, {uid: path(1, 100, 28)})
            assert len(memory.span_ids()) == 0 and file.stats().num_spans == store.stats().num_spans == 2
            saver.stop()


def test_rows_are_on_the_device_before_the_next_step(tmp_path, monkeypatch):
    """Each step's rows, and no more than the blocks they lie in."""
    geometry = geometry_of(hidden_size=2048, dtype="bfloat16")
    engine = FakeEngine(geometry)
    with file_store(tmp_path) as store:
        written = []
        write_parts = store.io.write_parts
        monkeypatch.setattr(store.io, "write_parts", lambda parts: (written.append(parts), write_parts(parts)))
        saver = open_saver(engine, store, HIDDEN, save="direct")
        uid = engine.open()
        saver.open(uid, seed=SEED, token_ids=[])
        for step in range(SPAN_TOKENS):
            assert len(written) == step
            engine.step(saver, {uid: path(1, step, 1)})
        num_layers = len(geometry.saved_layers(HIDDEN))
        assert [[len(part.data) for part in parts] for parts in written] == [[4096] * num_layers] * 65  # and headers
        assert store.stats().num_spans == 1
        saver.stop()


@pytest.mark.parametrize("io", IO)
def test_a_device_that_fails_costs_state_and_not_the_step(tmp_path, monkeypatch, io):
    """While it fails spans are lost and counted; rows that failed are put with their whole span when it is back."""
    geometry = geometry_of(hidden_size=2048, dtype="bfloat16")
    engine = FakeEngine(geometry)
    counters = Counters()
    with file_store(tmp_path, io) as store:
        saver = open_saver(engine, store, HIDDEN, save="direct", counters=counters)
        uid = engine.open()
        saver.open(uid, seed=SEED, token_ids=[])
        engine.step(saver, {uid: path(1, 0, 10)})
        failing = {"write", "write_parts", "probe"}

        def wrapped(name, real):
            def call(*args):
                if name in failing:
                    raise OSError(5, "the device is gone")
                return real(*args)

            return call

        for name in ("write", "write_parts"):
            monkeypatch.setattr(store.io, name, wrapped(name, getattr(store.io, name)))
        monkeypatch.setattr(store.presence, "_probe", wrapped("probe", store.presence._probe))
        engine.step(saver, {uid: path(1, 10, 10)})
        assert counters.get("save_errors_total") == 1
        engine.step(saver, {uid: path(1, 20, 44)})
        assert counters.get("dropped_spans_total") == 1 and store.stats().num_spans == 0
        failing.remove("probe")
        wait_until_here(store)
        engine.step(saver, {uid: path(1, 64, 10)})  # its room is there, its rows are not
        assert counters.get("save_errors_total") == 2
        failing.clear()
        wait_until_here(store)
        engine.step(saver, {uid: path(1, 74, 54)})
        assert store.stats().num_spans == 1
        assert saver.heal(uid)
        assert store.stats().num_spans == 2
        saver.close(uid)
        saver.stop()
        spans = [span_id for span_id, _ in _known_spans(engine)]
        assert _read(store, spans[1]) == span_chunks(path(1, 0, 128), HIDDEN, geometry)
        store.delete(spans)
        store.flush()
        assert store.disk_bytes < 64 << 10, "room of drafts was lost"


@pytest.mark.parametrize(("mode", "counter"), [("full", "dropped_spans_total"), ("broken", "save_errors_total")])
def test_a_store_that_takes_nothing_is_counted(mode, counter):
    engine, store, counters = FakeEngine(geometry_of()), FakeStore(), Counters()
    store.mode = mode
    saver = open_saver(engine, store, HIDDEN, save="direct", counters=counters, save_wait=0.0)
    uid = engine.open()
    saver.open(uid, seed=SEED, token_ids=[])
    for start, num_tokens in ((0, 64), (64, 10), (74, 54)):
        engine.step(saver, {uid: path(1, start, num_tokens)})
    assert counters.snapshot() == {counter: 2}
    store.mode = "ok"
    engine.step(saver, {uid: path(1, 128, 64)})
    assert len(store.spans) == 1
    saver.close(uid)
    assert saver._cutter._open_buffers.num_in_use == 0 and saver._capture.ring.leased_rows == 0
    saver.stop()


def test_a_step_that_completes_many_spans_waits_for_no_room_and_drops_nothing():
    engine, store, counters = FakeEngine(geometry_of()), FakeStore(), Counters()
    saver = open_saver(engine, store, KV, save="direct", counters=counters, save_wait=10.0)
    uids = [engine.open(path(branch, 0, 63)) for branch in range(1, 31)]
    for branch, uid in enumerate(uids, start=1):
        saver.open(uid, seed=SEED, token_ids=path(branch, 0, 63))
    engine.step(saver, {uid: path(branch, 63, 1) for branch, uid in enumerate(uids, start=1)})
    uid = engine.open()
    saver.open(uid, seed=SEED, token_ids=[])
    engine.step(saver, {uid: path(31, 0, 256)})
    assert len(store.spans) == 30 + 4
    assert counters.get("dropped_rows_total") == counters.get("save_wait_seconds_total") == 0
    saver.stop()


def test_no_threads_and_one_batch_of_memory():
    engine, store = FakeEngine(geometry_of()), FakeStore()
    before = set(threading.enumerate())
    saver = open_saver(engine, store, HIDDEN, save="direct", ring_batches=3)
    assert not set(threading.enumerate()) - before
    assert saver._capture.ring.capacity_rows == engine.max_batch_tokens
    saver.stop()
