"""Disks without room: a put evicts, else is dropped; nothing is raised, nothing is wrong."""

from __future__ import annotations

import errno

import pytest

from tests.storage.faults import FullDisk
from tests.storage.storage_kit import (
    NUM_CHUNKS,
    SPAN_DISK_BYTES,
    disk_bytes,
    holds,
    make_record,
    put,
)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_means_evict(file_kit, monkeypatch, code):
    monkeypatch.setattr("mii_hcache.storage.room._FULL_DISK_PAUSE_S", 600.0)  # which a busy machine may outlast
    store = file_kit.open()
    disk = FullDisk(monkeypatch, store, 4096 + 4 * SPAN_DISK_BYTES + 5000, code)
    records = [make_record(idx) for idx in range(12)]
    for record in records:
        assert put(store, record), "room is made by evicting"
        assert holds(store, record)
    num_at_once = NUM_CHUNKS if store.io.name == "uring" else 1  # a ring writes the chunks of a span side by side
    assert 1 <= disk.num_refused <= num_at_once, "the disk is not asked again at once"
    assert [idx for idx, record in enumerate(records) if holds(store, record)] == [8, 9, 10, 11]
    assert store.stats().dropped_spans == 0
    store.flush()
    store = file_kit.open()
    assert [idx for idx, record in enumerate(records) if holds(store, record)] == [8, 9, 10, 11]


def test_a_full_disk_that_gets_room_is_used_again(file_kit, monkeypatch):
    store = file_kit.open()
    disk = FullDisk(monkeypatch, store, 4096 + 4 * SPAN_DISK_BYTES)
    for idx in range(6):
        assert put(store, make_record(idx))
    disk.limit_bytes = 1 << 30
    store._room._full_until_s = 0.0  # as after a few seconds
    for idx in range(6, 12):
        assert put(store, make_record(idx))
    assert sum(holds(store, make_record(idx)) for idx in range(12)) == 10


def test_a_disk_without_any_room_means_drop(file_kit, monkeypatch):
    store = file_kit.open()
    FullDisk(monkeypatch, store, 0)
    for idx in range(3):
        assert not put(store, make_record(idx))
    assert store.stats().dropped_spans == 3
    assert store.stats().num_spans == 0
    assert disk_bytes(file_kit.path) == 0
    monkeypatch.undo()
    store._room._full_until_s = 0.0
    assert put(store, make_record(0))
    assert holds(store, make_record(0))


def test_a_disk_full_in_the_middle_of_the_first_span(file_kit, monkeypatch):
    store = file_kit.open()
    FullDisk(monkeypatch, store, 4096 + 20_000)
    assert not put(store, make_record(0))
    assert store.find(make_record(0).span_id) is None
    monkeypatch.undo()
    store._room._full_until_s = 0.0
    assert put(store, make_record(1))
    store = file_kit.open()
    assert holds(store, make_record(1))
    assert store.disk_bytes == 4096 + SPAN_DISK_BYTES


def test_a_full_disk_and_spans_of_another_size(file_kit, monkeypatch):
    """Only slots of the same size can be written over; none are there, so the put is dropped, and all else stays."""
    store = file_kit.open()
    for idx in range(4):
        put(store, make_record(idx))
    FullDisk(monkeypatch, store, 0)
    assert not put(store, make_record("large", chunk_bytes=20_000))
    assert all(holds(store, make_record(idx)) for idx in range(4))
