"""Spans whose chunks differ in kind and length, in files: slots of two sizes are had together or not at all."""

from __future__ import annotations

import errno
import itertools
import random
import shutil
import sqlite3
import struct
import tempfile
import threading
import time
from array import array
from pathlib import Path

import pytest
from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st

from mii_hcache.core.geometry import ChunkKind
from mii_hcache.core.layout import SpanLayout
from mii_hcache.storage.catalog import Catalog, SpanRow
from mii_hcache.storage.file import FileStore
from mii_hcache.storage.format import BLOCK_BYTES, slot_counts
from mii_hcache.storage.records import ReadOutcome
from mii_hcache.storage.segment import SegmentFile
from mii_hcache.storage.segments import Segments
from mii_hcache.storage.slots import Places
from mii_hcache.storage.state_dir import StateDir
from tests.storage.storage_kit import (
    IO,
    MIXED,
    SPAN_DISK_BYTES,
    StoreKit,
    disk_bytes,
    holds,
    layouts,
    make_record,
    put,
    read_span,
    reads_of,
    wait_until_here,
)
from tests.storage.test_file_damage import flip, rows, segment_of
from tests.storage.test_file_faults import FullDisk

HIDDEN, KV = ChunkKind.HIDDEN, ChunkKind.KV
SMALL = SpanLayout.shared((None, HIDDEN, HIDDEN), 1000, 13_000)
"""Slots of the smaller size of MIXED alone."""
RECORDS = [make_record(idx, layout=MIXED) for idx in range(8)]
SLOT_BYTES = {HIDDEN: 8192, KV: 20_480}


@pytest.fixture
def saved(file_kit: StoreKit) -> StoreKit:
    """A closed store with RECORDS in it: hidden chunks in segment 1, kv chunks in segment 2."""
    store = file_kit.open()
    assert all(put(store, record) for record in RECORDS)
    file_kit.close()
    return file_kit


def test_each_chunk_lies_in_a_segment_of_its_size(saved):
    for places in rows(saved).values():
        assert [number for number, _ in places] == [1, 2, 1]
    store = saved.open()
    assert [store.find(record.span_id) for record in RECORDS] == RECORDS
    assert all(holds(store, record) for record in RECORDS)
    assert store.disk_bytes == 2 * 4096 + 8 * SPAN_DISK_BYTES
    assert store.find(RECORDS[0].span_id).layout is MIXED, "records share their layout"


@pytest.mark.parametrize("where", ["payload", "header"])
@pytest.mark.parametrize("chunk_idx", range(3))
def test_damage_of_any_chunk_is_found_where_it_is(saved, chunk_idx, where):
    segment, slot = rows(saved)[RECORDS[3].span_id][chunk_idx]
    chunk = MIXED.chunks[chunk_idx]
    offset = 4096 + chunk.num_bytes - 1 if where == "payload" else 80
    flip(segment_of(saved, segment), 4096 + slot * SLOT_BYTES[chunk.kind] + offset)
    store = saved.open()
    assert store.get_into(reads_of(RECORDS[3])) == ReadOutcome(num_ok=chunk_idx, reason="corrupt")
    assert store.stats().corrupt_chunks == 1
    assert put(store, RECORDS[3], writer=9)
    store = saved.open()
    assert holds(store, RECORDS[3], writer=9)
    assert all(holds(store, record) for record in RECORDS if record is not RECORDS[3])


@pytest.mark.parametrize("number", [1, 2])
def test_a_lost_segment_of_either_size_loses_the_spans(saved, number):
    segment_of(saved, number).unlink()
    store = saved.open()
    assert store.stats().num_spans == 0
    assert "8 saved spans" in store.notes[0]
    assert disk_bytes(saved.path) == 0, "the chunks of the other size are given back"
    assert all(put(store, record) for record in RECORDS)
    assert all(holds(saved.open(), record) for record in RECORDS)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("num_bytes", [0, 4096, 4097, 50_000])
def test_truncated_segments(saved, number, num_bytes):
    with segment_of(saved, number).open("r+b") as file:
        file.truncate(num_bytes)
    store = saved.open()
    num_held = sum(holds(store, record) for record in RECORDS)
    assert (0 < num_held < 8) == (num_bytes == 50_000)
    assert all(put(store, record) for record in RECORDS)
    assert all(holds(store, record) for record in RECORDS)


@pytest.mark.parametrize("seed", range(3))
def test_random_bit_flips_anywhere(saved, seed, tmp_path):
    rng = random.Random(seed)
    for file in sorted(file for file in saved.path.rglob("*") if file.is_file() and file.stat().st_size):
        for _ in range(3):
            copy = StoreKit("file", tmp_path / "copy")
            shutil.copytree(saved.path, copy.path)
            target = copy.path / file.relative_to(saved.path)
            for _ in range(rng.choice([1, 1, 50])):
                flip(target, rng.randrange(file.stat().st_size), 1 << rng.randrange(8))
            store = copy.open()
            num_held = sum(holds(store, record) for record in RECORDS)
            assert all(put(store, record) for record in RECORDS)
            store = copy.open()
            assert sum(holds(store, record) for record in RECORDS) >= num_held
            copy.close()
            shutil.rmtree(copy.path)


def test_a_row_whose_chunks_lie_in_slots_of_another_size_is_lost(saved):
    """As after segment files were mixed up by hand: headers are sound, sizes are not the row's."""
    shutil.copy(segment_of(saved, 1), segment_of(saved, 3))
    segment_of(saved, 2).rename(segment_of(saved, 1))
    segment_of(saved, 3).rename(segment_of(saved, 2))
    store = saved.open()
    assert store.stats().num_spans == 0
    assert "8 saved spans" in store.notes[0]
    assert all(put(store, record) for record in RECORDS)
    assert all(holds(store, record) for record in RECORDS)


def test_a_row_with_another_number_of_chunks_than_its_layout_makes_no_sense(tmp_path):
    path = tmp_path / "catalog.sqlite"
    catalog = Catalog(path, None)
    places = Places([(1, 0), (1, 1)])
    catalog.commit(add=[SpanRow(record=RECORDS[0], generation=1, places=places, crcs=array("I", [7, 7]), last_used=1)])
    catalog.close()
    reopened = Catalog(path, None)
    assert reopened.rows == []
    assert "impossible sizes" in reopened.note
    reopened.close()


def test_a_directory_of_version_1_is_set_aside_and_said_so(saved):
    """What an older program left: never read, never harmed, in nobody's way."""
    connection = sqlite3.connect(saved.path / "catalog.sqlite")
    connection.execute("PRAGMA user_version = 1")
    connection.commit()
    connection.close()
    before = {}
    for number in (1, 2):
        data = bytearray(segment_of(saved, number).read_bytes())
        data[8:12] = struct.pack("<I", 1)
        data[BLOCK_BYTES - 4 : BLOCK_BYTES] = struct.pack("<I", crc32c(data[: BLOCK_BYTES - 4]))
        segment_of(saved, number).write_bytes(data)
        before[number] = bytes(data)
    store = saved.open()
    assert store.notes == [
        "catalog.sqlite cannot be used (it has format version 1, this is 2); it was set aside as "
        "catalog.damaged-1.sqlite and a new one started empty",
        "segment file 00000001.seg was left alone (segment header: format version 1, this is 2); its spans cannot be "
        "restored",
        "segment file 00000002.seg was left alone (segment header: format version 1, this is 2); its spans cannot be "
        "restored",
    ]
    assert store.stats().num_spans == 0
    assert all(store.get_into(reads_of(record)).num_ok == 0 for record in RECORDS)
    assert all(put(store, record) for record in RECORDS)
    assert all(holds(store, record) for record in RECORDS)
    assert {number: segment_of(saved, number).read_bytes() for number in (1, 2)} == before


sequences = st.lists(st.tuples(layouts, st.sampled_from(["", "flush", "delete"])), min_size=1, max_size=20)


@given(sequence=sequences, can_punch=st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_bound_holds_at_every_write_and_what_fits_gets_in(sequence, can_punch):
    """Spans of any layouts through a store that holds few of them, on a file system with holes and without."""
    capacity_bytes = 200_000
    write = Segments.write
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder)
        state_dir = StateDir(path)
        store = FileStore(state_dir, capacity_bytes, flush_interval_s=None, segment_bytes=60_000, io=IO)

        def watched(self, slots):
            write(self, slots)
            assert disk_bytes(path) <= store.disk_bytes <= capacity_bytes

        patch.setattr(Segments, "write", watched)
        if not can_punch:
            patch.setattr(SegmentFile, "punch", lambda self, slot: False)
        there = []
        for idx, (layout, then) in enumerate(sequence):
            record = make_record(idx, layout=layout)
            num_files = len(list((path / "segments").iterdir()))
            slots = slot_counts(layout)
            needed_bytes = sum(num * (size + BLOCK_BYTES) for size, num in slots.items())  # a segment each, at most
            is_in = put(store, record)
            if can_punch:
                assert is_in or needed_bytes + num_files * BLOCK_BYTES > capacity_bytes
                assert is_in or all(store.find(one.span_id) for one in there), "nothing was evicted in vain"
            there = [one for one in (*there, record) if store.find(one.span_id)]
            assert all(holds(store, one) for one in there)
            if then == "flush":
                store.flush()
            elif then == "delete" and there:
                assert store.delete([there.pop(idx % len(there)).span_id]) == 1
        store.close()
        reopened = FileStore(state_dir, capacity_bytes // 2, flush_interval_s=None, io=IO)
        assert disk_bytes(path) <= reopened.disk_bytes <= capacity_bytes // 2
        for one in there:
            holds(reopened, one)
        reopened.close()
        state_dir.close()


def test_threads_that_need_slots_of_both_sizes_neither_wait_for_each_other_nor_pass_the_bound(file_kit):
    """Room for little more than what four threads write at once; each wants what others hold."""
    kinds = [MIXED, SMALL, SpanLayout.shared((KV,), 1000, 13_000), SpanLayout.shared((KV, HIDDEN), 1000, 13_000)]
    capacity_bytes = 6 * SPAN_DISK_BYTES + 3 * 4096
    store = file_kit.open(capacity_bytes)
    stop_s = time.monotonic() + 1.5
    stop = threading.Event()
    over: list[int] = []
    num_tried, num_put = [0] * 4, [0] * 4

    def writer(seed: int) -> None:
        rng = random.Random(seed)
        for idx in itertools.count():
            if time.monotonic() > stop_s and num_put[seed] > 10:
                break
            num_tried[seed] += 1
            record = make_record(f"{seed} {idx}", layout=rng.choice(kinds))
            num_put[seed] += put(store, record)
            if rng.random() < 0.2:
                store.delete([record.span_id])
            assert read_span(store, record)[1] in (None, "missing")

    def watcher() -> None:
        while not stop.is_set():
            found = store.disk_bytes
            if found > capacity_bytes:
                over.append(found)
            time.sleep(0.0005)

    threads = [threading.Thread(target=writer, args=(seed,), daemon=True) for seed in range(4)]
    watching = threading.Thread(target=watcher)
    for thread in (*threads, watching):
        thread.start()
    for thread in threads:
        thread.join(240)
    stop.set()
    watching.join()
    assert not any(thread.is_alive() for thread in threads), "they wait for each other"
    assert over == []
    assert sum(num_put) > 0.9 * sum(num_tried), (num_put, num_tried)
    assert store.stats().corrupt_chunks == 0
    store.flush()
    assert disk_bytes(file_kit.path) <= capacity_bytes
    store = file_kit.open(capacity_bytes)
    assert put(store, make_record("after", layout=MIXED))
    assert holds(store, make_record("after", layout=MIXED))


def test_layouts_that_follow_each_other_do_not_strand_capacity(file_kit):
    """Every layout in turn gets all of the store, whatever slots the ones before left."""
    store = file_kit.open(10 * SPAN_DISK_BYTES + 3 * 4096)
    for round_idx, layout in enumerate([MIXED, None, SMALL, MIXED, None, MIXED]):
        records = [make_record(f"{round_idx} {idx}", layout=layout) for idx in range(12)]
        for record in records:
            assert put(store, record)
            assert disk_bytes(file_kit.path) <= store.disk_bytes <= 10 * SPAN_DISK_BYTES + 3 * 4096
        assert sum(store.find(record.span_id) is not None for record in records) >= 9


def test_a_write_that_fails_in_the_second_segment_gives_back_the_slots_of_the_first(file_kit, monkeypatch):
    store = file_kit.open()
    FullDisk(monkeypatch, store, 4096 + 2 * SLOT_BYTES[HIDDEN], errno.EIO)
    assert not put(store, RECORDS[0])
    assert store.find(RECORDS[0].span_id) is None
    assert store.disk_bytes == disk_bytes(file_kit.path) == 2 * 4096
    monkeypatch.undo()
    wait_until_here(store)
    assert put(store, RECORDS[0])
    assert holds(store, RECORDS[0])


@pytest.mark.parametrize("bad_number", [1, 2])
def test_a_span_is_durable_only_when_both_segments_are(file_kit, monkeypatch, bad_number):
    store = file_kit.open(durability="strict")
    store._pulse.stop()
    sync = SegmentFile.sync

    def broken(self):
        if int(self.path.stem) == bad_number:
            raise OSError(errno.EIO, "medium error")
        sync(self)

    monkeypatch.setattr(SegmentFile, "sync", broken)
    put(store, RECORDS[0])
    store.flush()
    assert store.find(RECORDS[0].span_id) is None
    assert store.stats().dropped_spans == 1
    monkeypatch.undo()
    wait_until_here(store)
    assert put(store, RECORDS[0], writer=1)
    assert holds(file_kit.open(), RECORDS[0], writer=1)


def test_a_full_disk_means_evict_for_both_sizes(file_kit, monkeypatch):
    monkeypatch.setattr("mii_hcache.storage.room._FULL_DISK_PAUSE_S", 600.0)  # which a busy machine may outlast
    store = file_kit.open()
    disk = FullDisk(monkeypatch, store, 4096 + 4 * SLOT_BYTES[KV])
    records = [make_record(idx, layout=MIXED) for idx in range(12)]
    for record in records:
        assert put(store, record), "room is made by evicting"
        assert holds(store, record)
    assert disk.num_refused == 1
    assert [idx for idx, record in enumerate(records) if holds(store, record)] == [8, 9, 10, 11]
    assert store.stats().dropped_spans == 0


def test_on_a_full_disk_a_span_takes_what_others_have_of_each_size_or_nothing(file_kit):
    store = file_kit.open()
    small = [make_record(f"small{idx}", layout=SMALL) for idx in range(6)]
    assert all(put(store, record) for record in small)
    store._room._full_until_s = time.monotonic() + 60  # as after a write that found no room
    assert not put(store, make_record("mixed", layout=MIXED)), "nobody has a large slot to give"
    assert all(holds(store, record) for record in small), "so the small ones were not taken either"
    assert put(store, make_record("another", layout=SMALL))
    assert [holds(store, record) for record in small] == [False] + [True] * 5
    assert store.stats().evicted_spans == 1


def test_on_a_full_disk_spans_without_a_needed_slot_stay(file_kit):
    store = file_kit.open()
    uniform, mixed = make_record("uniform"), [make_record(f"mixed{idx}", layout=MIXED) for idx in range(3)]
    assert all(put(store, record) for record in (uniform, *mixed))
    store._room._full_until_s = time.monotonic() + 60
    assert put(store, make_record("more", layout=MIXED))
    assert holds(store, uniform), "older, but of no use"
    assert [holds(store, record) for record in mixed] == [False, True, True]


def test_eviction_for_one_size_takes_from_spans_of_two(file_kit):
    capacity_bytes = 4 * SPAN_DISK_BYTES + 2 * 4096
    store = file_kit.open(capacity_bytes)
    mixed = [make_record(f"mixed{idx}", layout=MIXED) for idx in range(4)]
    assert all(put(store, record) for record in mixed)
    small = [make_record(f"small{idx}", layout=SMALL) for idx in range(4)]
    assert all(put(store, record) for record in small)
    assert [holds(store, record) for record in mixed] == [False, False, True, True], "their large slots were used, too"
    assert all(holds(store, record) for record in small)
    assert disk_bytes(file_kit.path) <= capacity_bytes
