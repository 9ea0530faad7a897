"""Several devices as one store: spans in turn, bytes right, and what a device's loss costs."""

from __future__ import annotations

import errno
import random
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from mii_hcache.errors import StateDirBusyError
from mii_hcache.storage.memory import MemoryStore
from mii_hcache.storage.open import open_state
from mii_hcache.storage.open_striped import open_striped
from mii_hcache.storage.records import ReadOutcome, SpanRecord
from mii_hcache.storage.stripe_set import StripeSet
from mii_hcache.storage.striped import StripedStore
from mii_hcache.storage.tiered import TieredStore
from tests.storage.faults import inject
from tests.storage.storage_kit import (
    IO,
    PAUSE_S,
    SPAN_BYTES,
    SPAN_DISK_BYTES,
    holds,
    make_chunks,
    make_record,
    put,
    read_span,
    reads_of,
)

Open = Callable[..., StripedStore]


@pytest.fixture
def opening(tmp_path) -> Iterator[Open]:
    """Opens a store over the named devices; closes the one before."""
    opened: list = []

    def close() -> None:
        while opened:
            opened.pop().close()

    def reopen(devices: str = "abc", capacity_bytes: int = 100 * SPAN_DISK_BYTES, **settings) -> StripedStore:
        close()
        stripes = StripeSet.of([tmp_path / device for device in devices])
        store = open_striped(stripes, capacity_bytes, segment_bytes=1 << 20, io=IO, first_look_s=PAUSE_S, **settings)
        opened.append(store)
        return store

    yield reopen
    close()


def chain(name: str, num_spans: int) -> list[SpanRecord]:
    return [
        make_record(f"{name}{idx}", parent=f"{name}{idx - 1}" if idx else None, span_idx=idx, root=f"{name}0")
        for idx in range(num_spans)
    ]


def holders(store: StripedStore, records: list[SpanRecord]) -> list[list[int]]:
    return [[idx for idx, one in enumerate(store.stores) if one.find(record.span_id)] for record in records]


def test_consecutive_spans_lie_on_consecutive_devices(opening):
    store = opening()
    records = chain("a", 12)
    for record in random.Random(1).sample(records, 12):  # as threads put them, which overtake each other
        assert put(store, record)
    places = holders(store, records)
    assert places == [[(places[0][0] + idx) % 3] for idx in range(12)]
    assert all(holds(store, record) for record in records)


def test_after_a_restart_a_context_goes_on_where_it_was(opening):
    records = chain("a", 12)
    for start, stop in ((0, 5), (5, 12)):
        store = opening()
        for record in records[start:stop]:
            assert put(store, record)
    places = holders(store, records)
    assert places == [[(places[0][0] + idx) % 3] for idx in range(12)]


def test_short_contexts_spread(opening):
    store = opening(capacity_bytes=300 * SPAN_DISK_BYTES)
    records = [make_record(idx) for idx in range(90)]
    for record in records:
        put(store, record)
    assert min(Counter(place for (place,) in holders(store, records)).values()) >= 18


def test_a_layer_is_read_from_all_devices_in_one_batch(opening):
    store = opening()
    records = chain("a", 12)
    for record in records:
        put(store, record)
    for chunk_idx in range(3):
        reads = [reads_of(record)[chunk_idx] for record in records]
        assert store.get_into(reads) == ReadOutcome(num_ok=12)
        assert [read.out for read in reads] == [make_chunks(record)[chunk_idx] for record in records]
    assert min(one.stats().read_bytes for one in store.stores) > 0
    assert store.stats().read_bytes == sum(record.num_bytes for record in records)
    store.delete([records[5].span_id, records[7].span_id])
    reads = [reads_of(record)[0] for record in records]
    assert store.get_into(reads) == ReadOutcome(num_ok=5, reason="missing")
    assert store.get_into([]) == ReadOutcome(num_ok=0)
    assert store.why_missing(records[5].span_id) == "deleted"
    assert store.why_missing(make_record("never").span_id) == "not_saved"


def test_the_first_damage_in_order_ends_a_batch(opening, monkeypatch):
    store = opening()
    if store.stores[0].io.name == "threads":
        pytest.skip("faults of single devices need the native engine")
    records = chain("a", 9)
    for record in records:
        put(store, record)
    (first,) = holders(store, records[:1])[0]
    for place, num_spared in (((first + 1) % 3, 2), ((first + 2) % 3, 1)):  # spans 7 and 5, of 0 to 8
        spared = 4096 + num_spared * SPAN_DISK_BYTES
        inject(monkeypatch, store.stores[place], lambda w, at, num, s=spared: None if w or at < s else -errno.EIO)
    outcome = store.get_into([reads_of(record)[0] for record in records])
    assert outcome == ReadOutcome(num_ok=5, reason="unavailable")


def test_a_device_that_is_left_out_cuts_contexts_until_it_is_back(opening):
    store = opening()
    records = chain("a", 6)
    for record in records:
        put(store, record)
    places = [place for (place,) in holders(store, records)]
    lost = places[2]
    store = opening("".join(device for idx, device in enumerate("abc") if idx != lost))
    assert [holds(store, record) for record in records] == [place != lost for place in places]
    assert put(store, records[2], writer=1), "saved anew, elsewhere"
    assert holds(store, records[2], writer=1)
    store = opening()
    assert holds(store, records[5]), "back with its device"
    chunks, reason = read_span(store, records[2])
    assert reason is None
    assert chunks in (make_chunks(records[2]), make_chunks(records[2], 1)), "of two copies one is served, whole"
    assert store.delete([records[2].span_id]) >= 1
    assert not holds(store, records[2])


def test_a_device_that_fails_hands_its_puts_to_the_next(opening, monkeypatch):
    store = opening()
    if store.stores[0].io.name == "threads":
        pytest.skip("faults of single devices need the native engine")
    broken = store.stores[1]
    monkeypatch.setattr(broken.io.device, "fault", lambda is_write, at, num: -errno.EIO if is_write else None)
    records = chain("a", 9)
    for record in records:
        assert put(store, record)
        assert holds(store, record)
    assert broken.stats().num_spans == 0
    assert broken.stats().dropped_spans > 0
    assert store.stats().dropped_spans == 0
    for one in store.stores:
        monkeypatch.setattr(one.io.device, "fault", lambda is_write, at, num: -errno.EIO if is_write else None)
    assert not put(store, make_record("more"))
    assert store.stats().dropped_spans == 1


def test_writers_of_one_span_choose_one_device(opening):
    store = opening()
    records = [make_record(f"race{idx}", parent=f"race{idx - 1}") for idx in range(20)]
    start = threading.Barrier(4)

    def write(writer: int) -> None:
        order = list(records)
        random.Random(writer).shuffle(order)
        start.wait()
        for record in order:
            assert put(store, record, writer)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(places) for places in holders(store, records)] == [1] * 20
    for record in records:
        chunks, reason = read_span(store, record)
        assert reason is None and chunks in [make_chunks(record, writer) for writer in range(4)]
    assert store.stats().num_bytes == 20 * SPAN_BYTES


def test_capacity_and_pins(opening):
    store = opening(capacity_bytes=3 * (4 * SPAN_DISK_BYTES + 4096))
    pinned = chain("pinned", 3)
    for record in pinned:
        put(store, record)
    ids = [record.span_id for record in pinned]
    with store.pinned([*ids, make_record("unknown").span_id]):
        for idx in range(60):
            assert put(store, make_record(idx))
        assert all(holds(store, record) for record in pinned)
    store.flush()
    stats = store.stats()
    assert stats.num_spans == 12 and stats.evicted_spans == 51
    assert sum(one.disk_bytes for one in store.stores) <= stats.capacity_bytes
    for idx in range(100, 160):
        assert put(store, make_record(idx))
    assert not any(holds(store, record) for record in pinned)


def test_behind_dram(opening):
    store = TieredStore(MemoryStore(2 * SPAN_BYTES), opening(), put_wait_s=60.0)
    records = chain("a", 9)
    for record in records:
        assert put(store, record)
    store.flush()
    assert all(holds(store, record) for record in records)
    assert store.stats().num_spans == 9
    assert store.delete([record.span_id for record in records]) == 9
    store.close()


@pytest.mark.parametrize("dram_bytes", [0, 1 << 20])
def test_open_state_over_several_directories(tmp_path, dram_bytes):
    def reopen():
        return open_state([tmp_path / name for name in "abc"], 1 << 22, dram_bytes, io=IO)

    records = chain("a", 6)
    state = reopen()
    for record in records:
        assert put(state.store, record)
    with pytest.raises(StateDirBusyError):
        open_state([tmp_path / "b"], 1 << 22, 0, io=IO)
    with pytest.raises(StateDirBusyError):
        reopen()
    state.close()
    assert all((tmp_path / name / "catalog.sqlite").exists() for name in "abc")
    state = reopen()
    assert all(holds(state.store, record) for record in records)
    state.close()
    shutil.rmtree(tmp_path / "b" / "segments")
    state = reopen()
    assert any("gone" in note for note in state.notes)
    assert 0 < sum(holds(state.store, record) for record in records) < 6
    state.close()
