"""Files of different days or stores in one directory: only a span's own bytes are served."""

from __future__ import annotations

import shutil
import sqlite3
import struct

import pytest

from mii_hcache.storage.catalog import _row_crc
from tests.storage.damage_kit import RECORDS, held, segment_of
from tests.storage.storage_kit import (
    SPAN_DISK_BYTES,
    StoreKit,
    disk_bytes,
    holds,
    make_chunks,
    make_record,
    put,
    read_span,
)


def test_segments_of_another_store_and_unknown_files_are_left_alone(saved, tmp_path):
    other = StoreKit("file", tmp_path / "other")
    for idx in range(10):
        put(other.open(), RECORDS[idx], writer=3)
    other.close()
    foreign = segment_of(saved, 7)
    shutil.copy(segment_of(other, 1), foreign)
    shutil.copy(segment_of(other, 1), segment_of(saved, 2))  # over one of ours
    (saved.path / "segments" / "readme.txt").write_text("hello")
    (saved.path / "segments" / "x.seg").write_text("hello")
    before = {file.name: file.read_bytes() for file in (saved.path / "segments").iterdir()}
    store = saved.open()
    assert held(store) == [record.layout.hidden_chunk_bytes != 900 for record in RECORDS]
    assert len([note for note in store.notes if "belongs to another store" in note]) == 2
    assert all(put(store, record) for record in RECORDS)
    put(store, make_record("big", chunk_bytes=30_000))
    saved.close()
    for name in ("00000007.seg", "00000002.seg", "readme.txt", "x.seg"):
        assert (saved.path / "segments" / name).read_bytes() == before[name]


def churn(kit: StoreKit, names: range, capacity_bytes: int) -> None:
    store = kit.open(capacity_bytes)
    for name in names:
        put(store, make_record(name), writer=name)
        if name % 3 == 0:
            store.flush()
    kit.close()


@pytest.mark.parametrize("stale", ["catalog", "segments"])
def test_old_and_new_files_mixed(file_kit, stale, tmp_path):
    """Rows over slots that were reused: the same span ids come back with other bytes, so that only the generation and
    the CRC tell them apart."""
    capacity_bytes = 12 * SPAN_DISK_BYTES + 4096
    churn(file_kit, range(12), capacity_bytes)
    shutil.copytree(file_kit.path, tmp_path / "old")
    store = file_kit.open(capacity_bytes)
    for name in range(6):
        store.delete([make_record(name).span_id])
    store.flush()
    for name in range(6):
        put(store, make_record(name), writer=name + 100)  # same names, other bytes
    for name in range(12, 15):
        put(store, make_record(name), writer=name)
    file_kit.close()
    if stale == "catalog":
        shutil.copy(tmp_path / "old" / "catalog.sqlite", file_kit.path)
    else:
        shutil.rmtree(file_kit.path / "segments")
        shutil.copytree(tmp_path / "old" / "segments", file_kit.path / "segments")
    store = file_kit.open(capacity_bytes)
    num_there = num_stale = 0
    for name in range(15):
        record = make_record(name)
        writers = (name, name + 100)
        if store.find(record.span_id) is None:
            continue
        chunks, reason = read_span(store, record)
        assert chunks in [make_chunks(record, writer)[: len(chunks)] for writer in writers]
        assert reason in (None, "missing"), "a reused slot is no damage"
        num_there += reason is None
        num_stale += reason == "missing"
        if reason == "missing":
            assert store.find(record.span_id) is None
            assert store.why_missing(record.span_id) == "evicted"
    assert num_there >= 3
    assert num_stale >= 6
    assert store.stats().corrupt_chunks == 0


@pytest.mark.parametrize("stale", ["catalog", "segments"])
def test_old_and_new_files_mixed_after_a_change_of_sizes(file_kit, stale, tmp_path):
    capacity_bytes = 10 * SPAN_DISK_BYTES + 4096
    churn(file_kit, range(10), capacity_bytes)
    shutil.copytree(file_kit.path, tmp_path / "old")
    store = file_kit.open(capacity_bytes)
    large = [make_record(f"large{idx}", chunk_bytes=20_000) for idx in range(20)]
    for record in large:
        assert put(store, record)
    file_kit.close()
    if stale == "catalog":
        shutil.copy(tmp_path / "old" / "catalog.sqlite", file_kit.path)
    else:
        shutil.rmtree(file_kit.path / "segments")
        shutil.copytree(tmp_path / "old" / "segments", file_kit.path / "segments")
    store = file_kit.open(capacity_bytes)
    for name in range(10):
        holds(store, make_record(name), writer=name)
    for record in large:
        holds(store, record)
    assert all(put(store, make_record(f"more{idx}", chunk_bytes=9000)) for idx in range(5))
    assert disk_bytes(file_kit.path) <= capacity_bytes


def test_generations_grow_over_restarts_and_a_lost_catalog(file_kit):
    def generation() -> int:
        store = file_kit.open()
        found = store._index.next_generation()
        put(store, make_record(found))
        return found

    found = [generation()]
    for loss in (None, "catalog.sqlite", None, "store.id", None):
        file_kit.close()
        if loss:
            (file_kit.path / loss).unlink()
        found.append(generation())
    assert found == sorted(set(found))


def test_generations_grow_even_if_the_clock_goes_back(file_kit, monkeypatch):
    store = file_kit.open()
    put(store, make_record("a"))
    before = store._index.next_generation()
    file_kit.close()
    monkeypatch.setattr("time.time_ns", lambda: 1)
    assert file_kit.open()._index.next_generation() >= before


@pytest.mark.parametrize("name", ["1.seg", "000000001.seg", "\u0660" * 7 + "\u0661.seg", "1.new"])
def test_a_copy_does_not_stand_in_for_the_file_of_its_number(saved, name):
    shutil.copy(segment_of(saved, 2), saved.path / "segments" / name)
    store = saved.open()
    assert store.notes == []
    assert all(held(store))
    saved.close()
    assert (saved.path / "segments" / name).exists()


@pytest.mark.parametrize("number", ["4294967295", "4294967294", "2147483648", "99999999999999999999"])
def test_a_number_that_no_place_can_hold_is_not_gone_on_from(saved, number):
    """Slots of a segment after it could not be named: every put would fail for ever."""
    shutil.copy(segment_of(saved, 1), saved.path / "segments" / f"{number}.seg")
    store = saved.open()
    assert all(held(store))
    assert put(store, make_record("more", chunk_bytes=20_000)), "wants a new segment"
    assert holds(saved.open(), make_record("more", chunk_bytes=20_000))


def test_a_row_may_not_claim_such_a_number(saved):
    connection = sqlite3.connect(saved.path / "catalog.sqlite")
    found = connection.execute("SELECT * FROM span").fetchone()
    fields = list(found[:-2])
    fields[8] = b"".join(struct.pack("<III", 4294967295, 0, crc) for _, _, crc in struct.iter_unpack("<III", fields[8]))
    connection.execute("UPDATE span SET places = ?, crc = ? WHERE span_id = ?", (fields[8], _row_crc(fields), found[0]))
    connection.commit()
    connection.close()
    store = saved.open()
    assert "set aside" in store.notes[0]
    assert all(put(store, record) for record in RECORDS)
