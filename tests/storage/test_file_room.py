"""Files hold what fits, and give back what they do not need."""

from __future__ import annotations

from mii_hcache.storage.segment import SegmentFile
from tests.storage.damage_kit import segment_of
from tests.storage.storage_kit import (
    SPAN_DISK_BYTES,
    disk_bytes,
    holds,
    make_chunks,
    make_record,
    put,
)


def test_reopening_with_less_capacity_evicts_the_least_recently_used(file_kit):
    store = file_kit.open(20 * SPAN_DISK_BYTES + 4096)
    records = [make_record(idx) for idx in range(20)]
    for record in records:
        put(store, record)
    store.touch([records[2].span_id])
    capacity_bytes = 5 * SPAN_DISK_BYTES + 4096
    store = file_kit.open(capacity_bytes)
    assert disk_bytes(file_kit.path) <= capacity_bytes
    assert [idx for idx, record in enumerate(records) if holds(store, record)] == [2, 16, 17, 18, 19]
    assert store.why_missing(records[0].span_id) == "evicted"
    assert all(put(store, make_record(f"new{idx}")) for idx in range(8))
    assert disk_bytes(file_kit.path) <= capacity_bytes


def test_a_model_change_does_not_strand_capacity(file_kit):
    capacity_bytes = 20 * SPAN_DISK_BYTES + 4096
    store = file_kit.open(capacity_bytes)
    for idx in range(20):
        put(store, make_record(idx))
    large = [make_record(f"large{idx}", chunk_bytes=30_000) for idx in range(7)]
    for num_put, record in enumerate(large, 1):
        assert put(store, record)
        assert disk_bytes(file_kit.path) <= capacity_bytes
        if num_put <= 6:  # 6 x 3 x 36 KiB fit
            assert all(store.find(earlier.span_id) for earlier in large[:num_put])
    store.flush()
    assert not segment_of(file_kit, 1).exists(), "an empty segment is deleted"
    assert all(holds(store, record) for record in large[1:])


def test_deleted_bytes_leave_the_disk(file_kit):
    store = file_kit.open()
    secret, other = make_record("secret"), make_record("other")
    put(store, other)
    put(store, secret)
    store.flush()
    assert bytes(make_chunks(secret)[1]) in segment_of(file_kit).read_bytes()
    before = disk_bytes(file_kit.path)
    store.delete([secret.span_id])
    store.flush()
    data = segment_of(file_kit).read_bytes()
    assert not any(bytes(chunk) in data for chunk in make_chunks(secret))
    assert bytes(make_chunks(other)[1]) in data
    assert disk_bytes(file_kit.path) == before - SPAN_DISK_BYTES
    store.delete([other.span_id])
    store.flush()
    assert disk_bytes(file_kit.path) == 0


def test_a_file_system_without_holes_still_holds_the_bound(file_kit, monkeypatch):
    monkeypatch.setattr(SegmentFile, "punch", lambda self, slot: False)
    capacity_bytes = 8 * SPAN_DISK_BYTES + 2 * 4096
    store = file_kit.open(capacity_bytes)
    for idx in range(30):
        sizes = {"chunk_bytes": 20_000} if 8 <= idx < 20 else {}
        assert put(store, make_record(idx, **sizes)), idx
        assert holds(store, make_record(idx, **sizes))
        assert disk_bytes(file_kit.path) <= capacity_bytes
    store.delete([make_record(29).span_id])
    store.flush()
    capacity_bytes = 3 * SPAN_DISK_BYTES + 4096
    store = file_kit.open(capacity_bytes)
    assert disk_bytes(file_kit.path) <= capacity_bytes
    assert all(put(store, make_record(f"new{idx}")) for idx in range(6))
    assert disk_bytes(file_kit.path) <= capacity_bytes
