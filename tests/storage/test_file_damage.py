"""Whatever happens to the bytes of a span, it reads back right or not at all."""

from __future__ import annotations

import logging
import random
import shutil

import pytest

from mii_hcache.storage.file import FileStore
from mii_hcache.storage.memory import MemoryStore
from mii_hcache.storage.records import ReadOutcome
from mii_hcache.storage.state_dir import StateDir
from mii_hcache.storage.tiered import TieredStore
from tests.storage.damage_kit import RECORDS, flip, held, rows, segment_of
from tests.storage.storage_kit import (
    IO,
    NUM_CHUNKS,
    SLOT_BYTES,
    SPAN_BYTES,
    StoreKit,
    holds,
    make_chunks,
    make_record,
    put,
    reads_of,
    wanted_of,
)


def test_all_is_there_after_reopening(saved):
    store = saved.open()
    assert [store.find(record.span_id) for record in RECORDS] == RECORDS
    assert all(held(store))
    assert store.notes == []
    assert store.stats().num_spans == len(RECORDS)
    assert store.stats().num_bytes == sum(record.num_bytes for record in RECORDS)


@pytest.mark.parametrize("where", ["payload", "header", "last payload byte"])
def test_a_damaged_chunk_is_corrupt_once_then_gone_then_saved_anew(saved, where, caplog):
    segment, slot = rows(saved)[RECORDS[3].span_id][1]
    offset = {"payload": 4096 + 2500, "header": 40, "last payload byte": 4096 + 4999}[where]
    flip(segment_of(saved, segment), 4096 + slot * SLOT_BYTES + offset)
    store = saved.open()
    reads = [reads_of(record)[1] for record in RECORDS]
    with caplog.at_level(logging.WARNING):
        assert store.get_into(reads) == ReadOutcome(num_ok=3, reason="corrupt")
        assert store.get_into(reads) == ReadOutcome(num_ok=3, reason="missing")
    assert len(caplog.records) == 1
    assert store.find(RECORDS[3].span_id) is None
    assert store.why_missing(RECORDS[3].span_id) == "corrupt"
    assert store.stats().corrupt_chunks == 1
    assert put(store, RECORDS[3], writer=9)
    store = saved.open()
    assert holds(store, RECORDS[3], writer=9)
    assert all(holds(store, record) for record in RECORDS if record is not RECORDS[3])


def test_a_damaged_span_stays_forgotten_after_a_restart(saved):
    segment, slot = rows(saved)[RECORDS[3].span_id][0]
    flip(segment_of(saved, segment), 4096 + slot * SLOT_BYTES + 5000)
    store = saved.open()
    assert not holds(store, RECORDS[3])
    store = saved.open()
    assert store.find(RECORDS[3].span_id) is None
    assert [record for record, there in zip(RECORDS, held(store), strict=True) if not there] == [RECORDS[3]]


def test_padding_may_be_damaged(saved):
    segment, slot = rows(saved)[RECORDS[3].span_id][0]
    flip(segment_of(saved, segment), 4096 + slot * SLOT_BYTES + 4096 + 5001)
    assert all(held(saved.open()))


@pytest.mark.parametrize("seed", range(6))
def test_random_bit_flips_anywhere(saved, seed, tmp_path):
    rng = random.Random(seed)
    files = sorted(file for file in saved.path.rglob("*") if file.is_file() and file.stat().st_size)
    assert {file.name for file in files} == {
        "lock", "store.id", "catalog.sqlite", "00000001.seg", "00000002.seg"
    }  # fmt: skip
    for file in files:
        for _ in range(4):
            copy = StoreKit("file", tmp_path / "copy")
            shutil.copytree(saved.path, copy.path)
            target = copy.path / file.relative_to(saved.path)
            for _ in range(rng.choice([1, 1, 1, 50])):
                flip(target, rng.randrange(file.stat().st_size), 1 << rng.randrange(8))
            store = copy.open()
            num_held = sum(held(store))
            assert all(put(store, record) for record in RECORDS)
            assert all(store.find(record.span_id) == record for record in RECORDS)
            store = copy.open()
            assert sum(held(store)) >= num_held
            copy.close()
            shutil.rmtree(copy.path)


def test_truncated_segments(saved, tmp_path):
    for num_bytes in (0, 1, 4095, 4096, 4097, 8192, 8193, 3 * SLOT_BYTES, 20 * SLOT_BYTES + 7):
        copy = StoreKit("file", tmp_path / "copy")
        shutil.copytree(saved.path, copy.path)
        with segment_of(copy).open("r+b") as file:
            file.truncate(num_bytes)
        store = copy.open()
        places = rows(copy)
        expected = [
            not any(number == 1 and 4096 + slot * SLOT_BYTES + 4096 + 5000 > num_bytes for number, slot in span_places)
            for span_places in (places.get(record.span_id, [(1, 99)]) for record in RECORDS)
        ]
        assert held(store) == expected
        assert store.notes == [] if num_bytes >= 4096 else len(store.notes) == 2
        assert all(put(store, record) for record in RECORDS)
        assert all(held(store))
        copy.close()
        shutil.rmtree(copy.path)


def test_deleted_segments(saved):
    segment_of(saved, 1).unlink()
    store = saved.open()
    assert held(store) == [record.layout.hidden_chunk_bytes == 900 for record in RECORDS]
    assert store.stats().num_spans == 2
    assert "8 saved spans" in store.notes[0]
    assert all(put(store, record) for record in RECORDS)
    store = saved.open()
    assert all(held(store))
    assert store.notes == []


def test_a_segment_deleted_while_open_serves_until_closed(saved):
    store = saved.open()
    segment_of(saved, 1).unlink()
    assert all(held(store))
    store = saved.open()
    assert sum(held(store)) == 2


def test_damage_in_dram_falls_back_to_files(tmp_path):
    state_dir = StateDir(tmp_path)
    memory = MemoryStore(10 * SPAN_BYTES)
    store = TieredStore(memory, FileStore(state_dir, 1 << 20, io=IO))
    records = [make_record(idx) for idx in range(3)]
    for record in records:
        put(store, record)
    store.flush()
    with memory.held(records[1].span_id) as span:
        span.chunk(2)[17] ^= 1
    assert [store.tier_of(record.span_id) for record in records] == ["memory"] * 3
    reads = [reads_of(record)[2] for record in records]
    assert store.get_into(reads) == ReadOutcome(num_ok=3)
    assert [read.out for read in reads] == [make_chunks(record)[2] for record in records]
    assert store.stats().corrupt_chunks == 1
    store.close()
    state_dir.close()


def test_damage_in_what_dram_lends_falls_back_to_files_or_is_told(tmp_path, monkeypatch):
    state_dir = StateDir(tmp_path)
    memory = MemoryStore(10 * SPAN_BYTES)
    file = FileStore(state_dir, 1 << 20, io=IO)
    store = TieredStore(memory, file, promote=False)
    records = [make_record(idx) for idx in range(3)]
    for record in records:
        put(store, record)
    store.flush()
    wanted = [wanted_of(record)[2] for record in records]
    with memory.held(records[1].span_id) as span:
        span.chunk(2)[17] ^= 1
    assert store.borrow(wanted) is None  # now, and it will be read
    assert store.borrow(wanted) is None  # for it lies in files only
    reads = [reads_of(record)[2] for record in records]
    assert store.get_into(reads) == ReadOutcome(num_ok=3)
    assert [read.out for read in reads] == [make_chunks(record)[2] for record in records]
    file.delete([records[2].span_id])
    with memory.held(records[2].span_id) as span:
        span.chunk(2)[17] ^= 1
    borrowed = store.borrow([wanted[0], wanted[2]])
    assert borrowed.outcome == ReadOutcome(num_ok=1, reason="corrupt")
    borrowed.give_back()
    assert store.stats().corrupt_chunks == 2 and memory._lent_bytes == 0
    store.close()
    state_dir.close()


def test_damage_in_dram_before_it_is_written_is_found_on_reading_the_file(tmp_path, monkeypatch):
    """The CRC is taken when the bytes arrive, not when they are written."""
    state_dir = StateDir(tmp_path)
    memory = MemoryStore(10 * SPAN_BYTES)
    file = FileStore(state_dir, 1 << 20, io=IO)
    original = FileStore.put_checked

    def damaged(self, record, chunks, crcs):
        chunks[1][100] ^= 1
        return original(self, record, chunks, crcs)

    monkeypatch.setattr(FileStore, "put_checked", damaged)
    store = TieredStore(memory, file)
    record = make_record("a")
    put(store, record)
    store.flush()
    reads = reads_of(record)
    assert store.get_into(reads) == ReadOutcome(num_ok=1, reason="corrupt")
    assert store.stats().corrupt_chunks == 2  # in both tiers
    assert store.find(record.span_id) is None
    store.close()
    state_dir.close()


def test_damage_in_files_is_not_noticed_while_dram_has_a_good_copy(tmp_path):
    state_dir = StateDir(tmp_path)
    store = TieredStore(MemoryStore(10 * SPAN_BYTES), FileStore(state_dir, 1 << 20, io=IO))
    record = make_record("a")
    put(store, record)
    store.flush()
    for idx in range(NUM_CHUNKS):
        flip(tmp_path / "segments" / "00000001.seg", 4096 + idx * SLOT_BYTES + 6000)
    assert holds(store, record)
    store.close()
    state_dir.close()
