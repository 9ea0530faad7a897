"""What every store promises, over every store."""

from __future__ import annotations

import random
import threading
import time

import pytest

from mii_hcache.core.geometry import ChunkKind
from mii_hcache.storage.base import ChunkStore
from mii_hcache.storage.records import ChunkRead, ReadOutcome
from tests.storage.storage_kit import (
    SPAN_BYTES,
    StoreKit,
    disk_bytes,
    holds,
    make_chunks,
    make_id,
    put,
    read_span,
    reads_of,
    wait_until,
    wanted_of,
)

ENOUGH = 20
"""Chunks that each thread must have seen, however long that takes on a busy machine."""


def chain(kit: StoreKit, name: str, num_spans: int) -> list:
    return [
        kit.record(f"{name}{idx}", parent=f"{name}{idx - 1}" if idx else None, span_idx=idx) for idx in range(num_spans)
    ]


@pytest.mark.parametrize("chunk_bytes", [1, 4095, 4096, 4097, 70_000])
def test_bytes_come_back_as_they_were_put(kit, chunk_bytes):
    store = kit.open(4 << 20)
    record = kit.record("a", chunk_bytes=chunk_bytes)
    assert store.find(record.span_id) is None
    assert put(store, record)
    assert store.find(record.span_id) == record
    assert holds(store, record)
    store.flush()
    assert holds(store, record)
    assert store.tier_of(record.span_id) in ("memory", "file")
    assert store.tier_of(make_id("b")) is None


def test_put_keeps_no_reference_to_the_callers_buffer(kit):
    store = kit.open()
    record = kit.record("a")
    chunks = [memoryview(bytearray(chunk)) for chunk in make_chunks(record)]
    assert store.put(record, chunks)
    for chunk in chunks:
        chunk[:] = bytes(len(chunk))
    store.flush()
    assert holds(store, record)


def test_the_first_writer_wins(kit):
    store = kit.open()
    record = kit.record("a")
    assert put(store, record, writer=1)
    assert put(store, record, writer=2)
    assert holds(store, record, writer=1)
    store.flush()
    assert holds(store, record, writer=1)
    assert store.stats().num_spans == 1
    assert store.stats().num_bytes == SPAN_BYTES


def test_of_racing_writers_one_wins_whole(kit):
    store = kit.open()
    records = [kit.record(f"race{round_idx}") for round_idx in range(10)]
    for record in records:
        start = threading.Barrier(4)
        seen = []

        def write(writer, record=record, start=start, seen=seen):
            start.wait()
            assert put(store, record, writer)
            seen.append(read_span(store, record))

        threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seen.append(read_span(store, record))
        assert seen == [seen[0]] * 5, "the first one stays"
        assert seen[0][1] is None
        assert seen[0][0] in [make_chunks(record, writer) for writer in range(4)]
    store.flush()
    assert (store.stats().num_spans, store.stats().num_bytes) == (10, 10 * SPAN_BYTES)
    assert store.delete([record.span_id for record in records]) == 10
    store.flush()
    assert store.stats().num_bytes == 0
    if kit.kind != "memory":
        assert disk_bytes(kit.path) == 0, "losers' slots came back"


@pytest.mark.parametrize("bad", ["too few", "too short", "too long"])
def test_chunks_that_are_not_the_records_are_our_own_bug(kit, bad):
    store = kit.open()
    record = kit.record("a")
    chunks = make_chunks(record)
    if bad == "too few":
        chunks.pop()
    else:
        chunks[1] = memoryview(bytes(chunks[1].nbytes + (1 if bad == "too long" else -1)))
    with pytest.raises(ValueError, match="chunk"):
        store.put(record, chunks)
    assert store.find(record.span_id) is None


def test_a_batch_stops_at_the_first_missing_span(kit):
    store = kit.open()
    records = chain(kit, "a", 12)
    for record in records:
        put(store, record)
    store.delete([records[7].span_id])
    reads = [reads_of(record)[1] for record in records]
    outcome = store.get_into(reads)
    assert outcome == ReadOutcome(num_ok=7, reason="missing")
    for record, read in zip(records[:7], reads, strict=False):
        assert read.out == make_chunks(record)[1]
    assert store.get_into(reads[:7]) == ReadOutcome(num_ok=7)
    assert store.get_into([]) == ReadOutcome(num_ok=0)
    assert store.get_into(reads[7:]) == ReadOutcome(num_ok=0, reason="missing")


def test_a_read_that_was_planned_for_something_else_is_missing(kit):
    store = kit.open()
    record = kit.record("a")
    put(store, record)

    def read(layer_idx, num_bytes, kind=None, **shard):
        out = memoryview(bytearray(num_bytes))
        return store.get_into([ChunkRead(span_id=record.span_id, layer_idx=layer_idx, out=out, kind=kind, **shard)])

    missing = ReadOutcome(num_ok=0, reason="missing")
    layout = record.layout
    for layer_idx, kind in enumerate(layout.kinds):
        if kind is None:
            assert {read(layer_idx, layout.bytes_of(other), other) for other in ChunkKind} == {missing}
            continue
        (other,) = set(ChunkKind) - {kind}
        num_bytes, num_shards = layout.bytes_of(kind), layout.shards_of(kind)
        for shard in range(num_shards):
            own = {"shard": shard, "num_shards": num_shards}
            assert read(layer_idx, num_bytes, **own) == read(layer_idx, num_bytes, kind, **own) == ReadOutcome(num_ok=1)
            assert read(layer_idx, num_bytes, other, **own) == missing
            assert read(layer_idx, layout.bytes_of(other), other, **own) == missing
            assert read(layer_idx, num_bytes - 1, **own) == read(layer_idx, num_bytes + 1, **own) == missing
        for shard, wrong in ((num_shards, num_shards), (0, num_shards + 1), (0, 3 - num_shards)):
            assert read(layer_idx, num_bytes, kind, shard=shard, num_shards=wrong) == missing
    assert read(-1, layout.kv_chunk_bytes) == read(layout.num_layers, layout.kv_chunk_bytes) == missing
    assert holds(store, record)


def test_a_span_of_another_layout_may_follow_a_deleted_one(kit):
    store = kit.open()
    first, second = kit.record("a"), kit.record("a", kind=ChunkKind.KV)
    put(store, first)
    store.delete([first.span_id])
    put(store, second)
    assert store.find(second.span_id) == second
    assert store.get_into(reads_of(first)) == ReadOutcome(num_ok=0, reason="missing")
    assert holds(store, second)


@pytest.mark.parametrize("kind", ["memory", "file", "tiered"])
def test_the_least_recently_used_go_first(kind, layout, tmp_path):
    """Of one disk; of several, each goes by its own order."""
    kit = StoreKit(kind, tmp_path, layout)
    store = kit.open_for(5)
    records = [kit.record(name) for name in range(9)]
    for record in records[:5]:
        assert put(store, record)
        store.flush()
    store.touch([records[0].span_id])
    assert holds(store, records[1])  # a read is use
    for record in records[5:8]:
        assert put(store, record)
    store.flush()
    kept = {idx for idx, record in enumerate(records) if store.find(record.span_id) is not None}
    assert kept >= {0, 1, 5, 6, 7}
    if kit.kind != "tiered":  # which may hold a few more in DRAM
        assert kept == {0, 1, 5, 6, 7}
        assert store.why_missing(records[2].span_id) == "evicted"
        assert store.stats().evicted_spans == 3
    assert store.why_missing(records[8].span_id) == "not_saved"
    kit.close()


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_a_chain_goes_from_its_end_and_use_of_a_span_is_use_of_its_ancestors(kind, layout, tmp_path):
    kit = StoreKit(kind, tmp_path, layout)
    store = kit.open_for(6)
    old, young = chain(kit, "old", 3), chain(kit, "young", 3)
    for record in (*old, *young):
        put(store, record)
    store.touch([old[2].span_id])  # now young goes first, from its end
    gone = []
    for idx in range(6):
        put(store, kit.record(f"new{idx}"))
        gone += [r.span_id for r in (*old, *young) if store.find(r.span_id) is None and r.span_id not in gone]
    assert gone == [record.span_id for record in (*reversed(young), *reversed(old))]
    kit.close()


def test_capacity_is_never_exceeded(kit):
    store = kit.open_for(7)
    record = kit.record(0)
    for idx in range(60):
        sizes = {} if idx % 3 else {"chunk_bytes": 20_000, "num_chunks": 2}  # another size of slot
        record = kit.record(idx, **sizes)
        assert put(store, record), idx
        if kit.kind == "memory":
            assert store.stats().num_bytes <= store.stats().capacity_bytes
        else:
            if kit.kind == "tiered":
                store.flush()  # files must stand still to be measured
            assert disk_bytes(kit.path) <= kit.capacity_for(7), idx
    store.flush()
    assert holds(store, record)
    assert store.stats().num_spans >= 3
    assert store.stats().num_bytes <= store.stats().capacity_bytes


def test_a_span_bigger_than_the_store_is_refused_and_evicts_nothing(kit):
    store = kit.open_for(3)
    small = kit.record("small")
    assert put(store, small)
    big = kit.record("big", num_chunks=20)
    assert not put(store, big)
    assert store.find(big.span_id) is None
    assert store.stats().dropped_spans >= 1
    assert holds(store, small)


def test_pinned_spans_stay_until_unpinned_as_often(kit):
    store = kit.open_for(4)
    pinned = [kit.record(f"pinned{idx}") for idx in range(3)]
    for record in pinned:
        put(store, record)
    ids = [record.span_id for record in pinned]
    store.pin([*ids, make_id("unknown")])
    with store.pinned(ids):
        for idx in range(8):
            put(store, kit.record(idx))
            store.flush()
        assert all(holds(store, record) for record in pinned)
    put(store, kit.record(8))
    assert all(holds(store, record) for record in pinned), "pinned twice, unpinned once"
    store.unpin([*ids, make_id("unknown"), make_id(8)])
    for idx in range(20, 20 + 10 * kit.num_paths):
        put(store, kit.record(idx))
        store.flush()
    assert not any(store.find(span_id) for span_id in ids)


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_a_store_full_of_pinned_spans_refuses_more(kind, layout, tmp_path):
    kit = StoreKit(kind, tmp_path, layout)
    store = kit.open_for(3)
    records = [kit.record(idx) for idx in range(3)]
    for record in records:
        put(store, record)
    with store.pinned([record.span_id for record in records]):
        assert not put(store, kit.record("more"))
        assert store.stats().dropped_spans == 1
        assert all(holds(store, record) for record in records)
    assert put(store, kit.record("more"))
    kit.close()


def test_deletion_overrides_pins(kit):
    store = kit.open()
    records = [kit.record(idx) for idx in range(4)]
    for record in records:
        put(store, record)
    ids = [record.span_id for record in records]
    with store.pinned(ids):
        assert store.delete([*ids[:2], make_id("unknown")]) == 2
        assert store.delete(ids[:2]) == 0
        assert store.get_into(reads_of(records[0])) == ReadOutcome(num_ok=0, reason="missing")
        assert put(store, records[1], writer=7)
        assert holds(store, records[1], writer=7)
    assert store.why_missing(ids[0]) == "deleted"
    store.flush()
    assert store.stats().num_spans == 3
    assert [store.find(span_id) is not None for span_id in ids] == [False, True, True, True]


def test_why_missing_forgets_when_the_span_is_back(kit):
    store = kit.open()
    record = kit.record("a")
    put(store, record)
    store.delete([record.span_id])
    put(store, record)
    assert holds(store, record)
    store.flush()
    assert store.delete([record.span_id]) == 1
    assert store.why_missing(record.span_id) == "deleted"


def test_stats_count(kit):
    store = kit.open()
    records = [kit.record(idx) for idx in range(3)]
    for record in records:
        put(store, record)
    store.flush()
    assert holds(store, records[0])
    store.delete([records[2].span_id])
    stats = store.stats()
    assert (stats.num_spans, stats.num_bytes) == (2, 2 * SPAN_BYTES)
    assert (stats.put_bytes, stats.read_bytes) == (3 * SPAN_BYTES, SPAN_BYTES)
    assert (stats.evicted_spans, stats.dropped_spans, stats.corrupt_chunks) == (0, 0, 0)


def test_a_closed_store_has_nothing_and_takes_nothing(kit):
    store = kit.open()
    record = kit.record("a")
    put(store, record)
    store.close()
    store.close()
    assert store.find(record.span_id) is None
    assert store.get_into(reads_of(record)) == ReadOutcome(num_ok=0, reason="missing")
    assert not put(store, kit.record("b"))
    assert store.delete([record.span_id]) == 0
    store.touch([record.span_id])
    store.pin([record.span_id])
    store.unpin([record.span_id])
    store.flush()
    store.stats()


def test_threads_that_put_read_and_delete_never_see_a_wrong_byte(kit):
    """A store so small that slots are reused all the time. Two writers' bytes differ, so mixing them would show."""
    store = kit.open_for(6)
    records = [kit.record(idx, **({"chunk_bytes": 9000} if idx % 4 == 0 else {})) for idx in range(16)]
    allowed = {r.span_id: [make_chunks(r, writer) for writer in range(2)] for r in records}
    stop_s = time.monotonic() + 0.8
    wrong: list[str] = []
    num_read = [0] * 4

    def worker(seed: int) -> None:
        rng = random.Random(seed)
        while (time.monotonic() < stop_s or num_read[seed] <= ENOUGH) and not wrong:
            record = rng.choice(records)
            action = rng.random()
            if action < 0.45:
                store.put(record, allowed[record.span_id][seed % 2])
            elif action < 0.5:
                store.delete([record.span_id])
            elif action < 0.52:
                store.flush()
            else:
                with store.pinned([record.span_id]):
                    chunks, _ = read_span(store, record)
                for chunk_idx, chunk in enumerate(chunks):
                    if chunk not in [written[chunk_idx] for written in allowed[record.span_id]]:
                        wrong.append(f"chunk {chunk_idx} of {record}")
                num_read[seed] += len(chunks)

    threads = [threading.Thread(target=worker, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert store.stats().corrupt_chunks == 0
    if kit.kind != "memory":
        assert disk_bytes(kit.path) <= kit.capacity_for(6)


def test_close_waits_for_threads_that_still_use_the_store(kit):
    store: ChunkStore = kit.open()
    records = [kit.record(idx) for idx in range(8)]
    errors: list[Exception] = []

    def worker(seed: int) -> None:
        try:
            for idx in range(200):
                record = records[(seed + idx) % 8]
                put(store, record)
                holds(store, record)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=worker, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    store.close()
    for thread in threads:
        thread.join()
    assert errors == []


# --- borrowing ------------------------------------------------------------------------------------------------------


def test_what_is_borrowed_is_what_was_put_or_else_it_is_read(kit):
    store = kit.open()
    record, other = kit.record("a"), kit.record("b")
    assert put(store, record)
    borrowed = store.borrow(wanted_of(record))
    assert (borrowed is not None) == (kit.kind in LENDERS)
    if borrowed is not None:
        assert borrowed.outcome == ReadOutcome(num_ok=record.layout.num_chunks)
        assert [bytes(chunk) for chunk in borrowed.chunks] == [bytes(chunk) for chunk in make_chunks(record)]
        assert all(chunk.c_contiguous and chunk.format == "B" for chunk in borrowed.chunks)
        borrowed.give_back()
        borrowed.give_back()  # nothing more
        assert borrowed.chunks == ()
    assert store.borrow(wanted_of(record), must_be_pinned=True) is None  # this memory is plain
    unknown = store.borrow([*wanted_of(record)[:1], *wanted_of(other)])
    if unknown is not None:
        assert unknown.outcome == ReadOutcome(num_ok=1, reason="missing")
        assert len(unknown.chunks) == 1
        unknown.give_back()
    assert holds(store, record)


def test_what_is_lent_is_neither_evicted_nor_used_again_and_counts(kit):
    store = kit.open_for(4)
    first = kit.record("lent")
    assert put(store, first)
    borrowed = store.borrow(wanted_of(first))
    if borrowed is None:
        assert kit.kind not in LENDERS
        return
    for idx in range(8):
        assert put(store, kit.record(idx))
        store.flush()
    assert borrowed_is_right(borrowed, first)
    assert store.find(first.span_id) is not None
    store.delete([first.span_id])
    assert store.find(first.span_id) is None
    for idx in range(8, 16):
        put(store, kit.record(idx))
        store.flush()
        if kit.kind == "memory":
            assert store.stats().num_bytes + SPAN_BYTES <= store.stats().capacity_bytes, "its bytes are still there"
    assert borrowed_is_right(borrowed, first)
    borrowed.give_back()
    for idx in range(16, 24):
        assert put(store, kit.record(idx))
    if kit.kind == "memory":
        assert store.stats().num_bytes == store.stats().capacity_bytes


def test_what_is_lent_outlives_the_store(kit):
    store = kit.open()
    record = kit.record("a")
    assert put(store, record)
    borrowed = store.borrow(wanted_of(record))
    kit.close()
    if borrowed is not None:
        assert borrowed_is_right(borrowed, record)
        borrowed.give_back()
    assert store.borrow(wanted_of(record)) is None or store.borrow(wanted_of(record)).outcome.reason == "missing"


def test_threads_that_borrow_while_others_delete_never_see_a_wrong_byte(kit):
    store = kit.open_for(6)
    if kit.kind not in LENDERS:
        assert store.borrow(wanted_of(kit.record("a"))) is None
        return
    records = [kit.record(idx) for idx in range(10)]
    stop_s = time.monotonic() + 0.5
    wrong: list[str] = []
    num_lent = [0, 0]
    has_ended = [threading.Event(), threading.Event()]

    def churn(seed: int) -> None:
        chooser = random.Random(seed)
        while not has_ended[seed].is_set():
            record = chooser.choice(records)
            put(store, record)
            if chooser.random() < 0.5:
                store.delete([chooser.choice(records).span_id])

    def borrow(seed: int) -> None:
        chooser = random.Random(seed)
        held = []
        while time.monotonic() < stop_s or num_lent[seed] <= ENOUGH:
            record = chooser.choice(records)
            borrowed = store.borrow(wanted_of(record))
            if borrowed is not None:
                held.append((borrowed, record))
                num_lent[seed] += len(borrowed.chunks)
                if borrowed.outcome.reason not in (None, "missing"):
                    wrong.append(str(borrowed.outcome))
            if len(held) > chooser.randrange(4):
                borrowed, record = held.pop(chooser.randrange(len(held)))
                if not borrowed_is_right(borrowed, record):
                    wrong.append("a byte")
                borrowed.give_back()
        for borrowed, _ in held:
            borrowed.give_back()
        has_ended[seed].set()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2) for work in (churn, borrow)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    store.delete([record.span_id for record in records])
    for record in records:  # nothing is left lent: all room is there, once deletions are committed
        wait_until(lambda record=record: put(store, record))


LENDERS = ("memory", "tiered")


def borrowed_is_right(borrowed, record) -> bool:
    expected = make_chunks(record)[: borrowed.outcome.num_ok]
    return [bytes(chunk) for chunk in borrowed.chunks] == [bytes(chunk) for chunk in expected]
