"""A span that is being read stays what it is until the reader has ended."""

from __future__ import annotations

import threading

from mii_hcache.storage.records import ReadOutcome
from tests.storage.faults import SlowDisk
from tests.storage.storage_kit import (
    SPAN_DISK_BYTES,
    holds,
    make_chunks,
    make_record,
    put,
    reads_of,
)


def read_in_thread(store, record) -> tuple[threading.Thread, list[bool]]:
    found: list[bool] = []
    reader = threading.Thread(target=lambda: found.append(holds(store, record)))
    reader.start()
    return reader, found


def test_a_span_that_is_being_read_is_neither_evicted_nor_overwritten(file_kit, monkeypatch):
    store = file_kit.open_for(4)
    records = [make_record(idx) for idx in range(4)]
    for record in records:
        put(store, record)
    disk = SlowDisk(monkeypatch, store)
    reader, found = read_in_thread(store, records[0])
    assert disk.is_reading.wait(60)
    store.touch([record.span_id for record in records[1:]])
    for idx in range(10, 16):
        assert put(store, make_record(idx))
    assert store.find(records[0].span_id) is not None
    disk.may_read.set()
    reader.join()
    assert found == [True]


def test_a_span_that_is_deleted_while_it_is_read_is_not_overwritten(file_kit, monkeypatch):
    store = file_kit.open_for(2)
    record = make_record(0)
    put(store, record)
    store.flush()
    disk = SlowDisk(monkeypatch, store)
    reads = reads_of(record)
    outcomes = []
    reader = threading.Thread(target=lambda: outcomes.append(store.get_into(reads)))
    reader.start()
    assert disk.is_reading.wait(60)
    store.delete([record.span_id])
    store.flush()
    num_put = sum(put(store, make_record(idx)) for idx in range(10, 14))
    assert num_put == 4
    disk.may_read.set()
    reader.join()
    assert outcomes == [ReadOutcome(num_ok=3)], "its slots stayed as they were"
    assert [read.out for read in reads] == make_chunks(record)
    store.flush()
    assert store.disk_bytes == 4096 + SPAN_DISK_BYTES, "and were given back after it"


def test_damage_of_a_deleted_span_does_not_harm_the_one_that_took_its_name(file_kit, monkeypatch):
    store = file_kit.open()
    record = make_record(0)
    put(store, record, writer=1)
    store.flush()
    with (file_kit.path / "segments" / "00000001.seg").open("r+b") as file:
        file.seek(4096 + 6000)
        file.write(b"damage")
    disk = SlowDisk(monkeypatch, store)
    outcomes = []
    reader = threading.Thread(target=lambda: outcomes.append(store.get_into(reads_of(record))))
    reader.start()
    assert disk.is_reading.wait(60)
    store.delete([record.span_id])
    assert put(store, record, writer=2)
    disk.may_read.set()
    reader.join()
    assert outcomes == [ReadOutcome(num_ok=0, reason="corrupt")]
    assert holds(store, record, writer=2)


def test_close_waits_for_a_read(file_kit, monkeypatch):
    store = file_kit.open()
    put(store, make_record(0))
    disk = SlowDisk(monkeypatch, store)
    reader, found = read_in_thread(store, make_record(0))
    assert disk.is_reading.wait(60)
    closer = threading.Thread(target=store.close)
    closer.start()
    closer.join(0.1)
    assert closer.is_alive()
    disk.may_read.set()
    closer.join()
    reader.join()
    assert found == [True]
