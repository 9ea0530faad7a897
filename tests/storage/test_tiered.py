"""DRAM in front of files: written behind, promoted after reading, never losing sight of a span."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator

import pytest

from mii_hcache.storage.file import FileStore
from mii_hcache.storage.memory import MemoryStore
from mii_hcache.storage.records import ReadOutcome
from mii_hcache.storage.state_dir import StateDir
from mii_hcache.storage.tiered import TieredStore
from tests.storage.storage_kit import (
    IO,
    SPAN_BYTES,
    SPAN_DISK_BYTES,
    holds,
    make_record,
    put,
    read_span,
    reads_of,
    wait_until,
)


class Gate:
    """Holds back writes to the file tier until opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_open = threading.Event()
        self.num_waiting = 0
        original = FileStore.put_checked

        def gated(store, record, chunks, crcs):
            self.num_waiting += 1
            assert self.is_open.wait(60)
            return original(store, record, chunks, crcs)

        monkeypatch.setattr(FileStore, "put_checked", gated)


@pytest.fixture
def make(tmp_path) -> Iterator:
    opened = []

    def make(num_in_memory: int, num_in_files: int = 100, **options) -> TieredStore:
        state_dir = StateDir(tmp_path)
        file = FileStore(state_dir, num_in_files * SPAN_DISK_BYTES + 4096, io=IO)
        options = {"put_wait_s": 60.0, "deadline_s": 60.0, **options}  # a busy machine may take its time
        store = TieredStore(MemoryStore(num_in_memory * SPAN_BYTES), file, **options)
        opened.append((store, state_dir))
        return store

    yield make
    for store, state_dir in opened:
        store.close()
        state_dir.close()


def test_readable_at_once_and_pinned_until_written(make, monkeypatch):
    gate = Gate(monkeypatch)
    store = make(3, put_wait_s=0.05)
    records = [make_record(idx) for idx in range(4)]
    assert all(put(store, record) for record in records[:3])
    assert [store.tier_of(record.span_id) for record in records[:3]] == ["memory"] * 3
    started_s = time.monotonic()
    assert not put(store, records[3]), "DRAM is full of unwritten spans"
    assert 0.04 < time.monotonic() - started_s < 30
    assert store.stats().dropped_spans == 1
    assert all(holds(store, record) for record in records[:3])
    gate.is_open.set()
    store.flush()
    assert put(store, records[3])
    assert all(holds(store, record) for record in records)


def test_racing_writers_leave_no_pin_behind(make, monkeypatch):
    gate = Gate(monkeypatch)
    store = make(6)
    records = [make_record(idx) for idx in range(5)]
    find = store.find
    monkeypatch.setattr(store, "find", lambda span_id: None)  # all of them come before the first is there
    threads = [
        threading.Thread(target=lambda writer=writer: [put(store, record, writer) for record in records])
        for writer in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gate.is_open.set()
    store.flush()
    monkeypatch.setattr(store, "find", find)
    assert store._memory._order._pins == {}
    assert store.stats().num_spans == 5


def test_nothing_is_accepted_that_nobody_will_write(tmp_path):
    state_dir = StateDir(tmp_path)
    store = TieredStore(MemoryStore(20 * SPAN_BYTES), FileStore(state_dir, 1 << 30, io=IO), put_wait_s=60.0)
    accepted = []

    def work(seed: int) -> None:
        for idx in itertools.count():
            if not put(store, make_record((seed, idx))):
                break
            accepted.append((seed, idx))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(accepted) > 20)
    store.close()
    for thread in threads:
        thread.join()
    file = FileStore(state_dir, 1 << 30, io=IO)
    assert all(holds(file, make_record(name)) for name in accepted)
    assert file.stats().num_spans == len(accepted)
    file.close()
    state_dir.close()


def test_put_waits_for_room_that_comes(make, monkeypatch):
    gate = Gate(monkeypatch)
    store = make(2, put_wait_s=60.0)
    for idx in range(2):
        put(store, make_record(idx))
    threading.Timer(0.1, gate.is_open.set).start()
    assert put(store, make_record(2))
    assert all(holds(store, make_record(idx)) for idx in range(3))


@pytest.mark.parametrize("num_written", [1, 2])
def test_room_that_comes_while_a_put_fails_is_not_missed(make, monkeypatch, num_written):
    """Written, and unpinned, after the put found no room and before it began to wait for some; or all of them are, and
    nothing is left to wait for."""
    store = make(2, num_writers=2, put_wait_s=5.0)
    records = [make_record(idx) for idx in range(3)]
    may_write = {record.span_id: threading.Event() for record in records}
    put_checked, put_in_memory = FileStore.put_checked, store._memory.put

    def gated(self, record, chunks, crcs):
        assert may_write[record.span_id].wait(60)
        return put_checked(self, record, chunks, crcs)

    def put_while_room_comes(*arguments):
        kept = put_in_memory(*arguments)
        if not kept:
            for record in records[:num_written]:
                may_write[record.span_id].set()
                wait_until(lambda one=record: not {one.span_id} & {*store._to_write, *store._claimed})
        return kept

    monkeypatch.setattr(FileStore, "put_checked", gated)
    assert all(put(store, record) for record in records[:2])
    wait_until(lambda: len(store._claimed) == 2)
    monkeypatch.setattr(store._memory, "put", put_while_room_comes)
    assert put(store, records[2])
    for event in may_write.values():
        event.set()
    assert all(holds(store, record) for record in records)


def test_a_put_waits_for_what_another_one_has_not_queued_yet(make, monkeypatch):
    """DRAM is full of it, and nobody is seen to write."""
    store = make(1, num_writers=1, put_wait_s=60.0)
    records, kept = [make_record(idx) for idx in range(2)], {}
    put_in_memory = store._memory.put
    is_placed = threading.Event()

    def placed_early(record, chunks):
        is_kept = put_in_memory(record, chunks)
        if record == records[0]:
            is_placed.set()
            wait_until(lambda: 1 in kept or len(store._changed._waiters) > 1)
        return is_kept

    def put_one(idx: int) -> None:
        kept[idx] = put(store, records[idx])

    monkeypatch.setattr(store._memory, "put", placed_early)
    first, second = (threading.Thread(target=put_one, args=(idx,)) for idx in range(2))
    first.start()
    assert is_placed.wait(60)
    second.start()
    first.join()
    second.join()
    assert kept == {0: True, 1: True}
    assert all(holds(store, record) for record in records)
    store.flush()
    assert store._memory._order._pins == {}


def test_flush_waits_until_all_is_durable(make, monkeypatch, tmp_path):
    gate = Gate(monkeypatch)
    store = make(10)
    for idx in range(5):
        put(store, make_record(idx))
    done = threading.Event()
    flusher = threading.Thread(target=lambda: (store.flush(), done.set()))
    flusher.start()
    assert not done.wait(0.1)
    gate.is_open.set()
    assert done.wait(60)
    flusher.join()
    import sqlite3

    connection = sqlite3.connect(tmp_path / "catalog.sqlite")
    assert connection.execute("SELECT count(*) FROM span").fetchone() == (5,)
    connection.close()


def test_served_by_files_after_dram_moved_on_and_promoted_after_the_last_chunk(make):
    store = make(2)
    records = [make_record(idx) for idx in range(6)]
    for record in records:
        assert put(store, record)
        store.flush()
    assert [store.tier_of(record.span_id) for record in records] == ["file"] * 4 + ["memory"] * 2
    reads = reads_of(records[0])
    assert store.get_into(reads[:2]) == ReadOutcome(num_ok=2)
    time.sleep(0.05)
    assert store.tier_of(records[0].span_id) == "file", "not read whole yet"
    assert store.get_into(reads[2:]) == ReadOutcome(num_ok=1)
    wait_until(lambda: store.tier_of(records[0].span_id) == "memory")
    assert all(holds(store, record) for record in records)


def test_a_context_larger_than_dram_does_not_pass_through_it_whole(make, monkeypatch):
    """What is copied last would drive out what was copied first, and all that was there before."""
    is_open = threading.Event()
    copy_up = TieredStore._copy_up
    monkeypatch.setattr(TieredStore, "_copy_up", lambda *arguments: is_open.wait(60) and copy_up(*arguments))
    store = make(8, num_writers=1)
    records = [make_record(idx) for idx in range(40)]
    for record in records:
        put(store, record)
        store.flush()
    assert store.tier_of(records[31].span_id) == "file"
    assert all(holds(store, record) for record in records[:30])
    is_open.set()
    wait_until(lambda: not store._to_promote and not store._claimed)
    assert 4 <= sum(store.tier_of(record.span_id) == "memory" for record in records[:30]) <= 5
    assert any(store.tier_of(record.span_id) == "memory" for record in records[32:]), "others stayed"
    assert store._promoted_bytes == 0
    assert all(holds(store, record) for record in records)


def test_without_promotion_spans_stay_in_files(make):
    store = make(2, promote=False)
    for idx in range(4):
        put(store, make_record(idx))
        store.flush()
    assert holds(store, make_record(0))
    time.sleep(0.05)
    assert store.tier_of(make_record(0).span_id) == "file"


def test_one_batch_over_both_tiers(make):
    store = make(3, promote=False)
    records = [make_record(idx) for idx in range(8)]
    for record in records:
        put(store, record)
        store.flush()
    order = [7, 0, 6, 1, 5, 2]
    assert {store.tier_of(records[idx].span_id) for idx in order} == {"memory", "file"}
    reads = [reads_of(records[idx])[1] for idx in order]
    assert store.get_into(reads) == ReadOutcome(num_ok=6)
    store.delete([records[6].span_id])  # from memory
    assert store.get_into(reads) == ReadOutcome(num_ok=2, reason="missing")
    store.delete([records[0].span_id])  # from files
    assert store.get_into(reads) == ReadOutcome(num_ok=1, reason="missing")


def test_deletion_reaches_spans_that_are_being_written(make, monkeypatch):
    gate = Gate(monkeypatch)
    store = make(10, num_writers=1)
    writing, queued = make_record("writing"), make_record("queued")
    put(store, writing)
    wait_until(lambda: gate.num_waiting == 1)
    put(store, queued)
    assert store.delete([queued.span_id]) == 1
    deleter = threading.Thread(target=store.delete, args=([writing.span_id],))
    deleter.start()
    time.sleep(0.05)
    assert deleter.is_alive(), "it must wait for the write"
    gate.is_open.set()
    deleter.join()
    store.flush()
    assert store.find(writing.span_id) is None
    assert store.find(queued.span_id) is None
    assert store.stats().num_spans == 0


def test_deletion_reaches_spans_that_are_being_promoted(make):
    store = make(1)
    records = [make_record(idx) for idx in range(3)]
    for round_idx in range(20):
        for record in records:
            put(store, record, writer=round_idx)
        store.flush()
        for record in records:
            assert holds(store, record, writer=round_idx)
        assert store.delete([record.span_id for record in records]) == 3
        time.sleep(0.002)
        assert [store.find(record.span_id) for record in records] == [None] * 3
        assert all(read_span(store, record)[0] == [] for record in records)


def test_deletion_reaches_a_span_whose_promotion_hung_for_too_long(make, monkeypatch):
    """It was given up, and deletion did not wait for it; then it goes on."""
    store = make(1, deadline_s=0.2)
    record, other = make_record(1), make_record(2)
    for one in (record, other):
        put(store, one)
        store.flush()
    assert store.tier_of(record.span_id) == "file"
    put_in_memory, entered, deleted, done = store._memory.put, threading.Event(), threading.Event(), threading.Event()

    def late(*args):
        entered.set()
        assert deleted.wait(60)
        try:
            return put_in_memory(*args)
        finally:
            done.set()

    monkeypatch.setattr(store._memory, "put", late)
    wait_until(lambda: holds(store, record) and entered.wait(1.0))  # read whole it is promoted, unless the machine naps
    assert store.delete([record.span_id]) == 1
    deleted.set()
    assert done.wait(60)
    wait_until(lambda: store.find(record.span_id) is None)


def test_unpinning_undoes_no_pin_of_others(make):
    """Also where a disk was away when its spans were pinned."""
    store = make(1, promote=False)
    record, other = make_record(1), make_record(2)
    for one in (record, other):
        put(store, one)
        store.flush()
    store._file.pin_always([record.span_id])  # as a context that is kept
    store._file.presence._is_away = True
    assert store.find(record.span_id) is None
    with store.pinned([record.span_id]):
        store._file.presence._is_away = False
    assert store._file._index._order._pins == {record.span_id: 1}
    assert store._memory._order._pins == {}


def test_a_span_larger_than_dram_goes_straight_to_files(make):
    store = make(1)
    record = make_record("large", num_chunks=6)
    assert put(store, record)
    assert store.tier_of(record.span_id) == "file"
    assert holds(store, record)


def test_files_that_take_nothing_leave_dram_alone(make, monkeypatch):
    store = make(4)
    monkeypatch.setattr(FileStore, "put_checked", lambda self, record, chunks, crcs: False)
    for idx in range(10):
        assert put(store, make_record(idx))
        store.flush()
    assert [idx for idx in range(10) if holds(store, make_record(idx))] == [6, 7, 8, 9]
    assert store.why_missing(make_record(0).span_id) == "evicted"


def test_a_writer_that_trips_goes_on(make, monkeypatch):
    store = make(4, num_writers=1)
    original = FileStore.put_checked
    tripped = []

    def trip(self, record, chunks, crcs):
        if not tripped:
            tripped.append(record)
            raise RuntimeError("a bug")
        return original(self, record, chunks, crcs)

    monkeypatch.setattr(FileStore, "put_checked", trip)
    for idx in range(8):
        assert put(store, make_record(idx))
    store.flush()
    assert len(tripped) == 1
    assert sum(holds(store, make_record(idx)) for idx in range(8)) >= 7


def test_close_writes_what_waits(tmp_path):
    state_dir = StateDir(tmp_path)
    store = TieredStore(MemoryStore(30 * SPAN_BYTES), FileStore(state_dir, 1 << 21, io=IO))
    for idx in range(20):
        put(store, make_record(idx))
    store.close()
    file = FileStore(state_dir, 1 << 21, io=IO)
    assert all(holds(file, make_record(idx)) for idx in range(20))
    file.close()
    state_dir.close()


def test_pins_hold_over_a_move_between_tiers(make, monkeypatch):
    """Pinned by one reader while in DRAM only, by another after it was written: each pin counts in both tiers."""
    gate = Gate(monkeypatch)
    store = make(2, num_in_files=3)
    record = make_record("pinned")
    put(store, record)
    store.pin([record.span_id])
    gate.is_open.set()
    store.flush()
    store.pin([record.span_id])
    store.unpin([record.span_id])
    for idx in range(10):
        put(store, make_record(idx))
        store.flush()
    assert store._file.find(record.span_id) is not None
    assert holds(store, record)
    store.unpin([record.span_id])
    for idx in range(10, 20):
        put(store, make_record(idx))
        store.flush()
    assert store.find(record.span_id) is None


def test_stats_count_a_span_once(make):
    store = make(3)
    for idx in range(5):
        put(store, make_record(idx))
        store.flush()
    stats = store.stats()
    assert (stats.num_spans, stats.num_bytes, stats.put_bytes) == (5, 5 * SPAN_BYTES, 5 * SPAN_BYTES)
    tiers = store.tier_stats()
    assert (tiers["memory"].num_spans, tiers["file"].num_spans) == (3, 5)
