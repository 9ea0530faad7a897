"""Disks that are full, slow to finish, or broken: a put may be dropped, nothing is raised, nothing is wrong."""

from __future__ import annotations

import errno
import os
import random
import shutil
import sqlite3
import threading

import pytest

from mii_hcache.errors import ConfigError, StateDirBusyError
from mii_hcache.storage.base import ReadOutcome
from mii_hcache.storage.catalog import Catalog
from mii_hcache.storage.database import Database
from mii_hcache.storage.segment import SegmentFile
from tests.storage.faults import FullDisk, SlowDisk, inject, interrupt_writes
from tests.storage.storage_kit import (
    NUM_CHUNKS,
    SPAN_DISK_BYTES,
    StoreKit,
    disk_bytes,
    holds,
    make_chunks,
    make_record,
    put,
    reads_of,
    wait_until_here,
)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_means_evict(file_kit, monkeypatch, code):
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


def test_a_write_error_drops_the_span_only(file_kit, monkeypatch):
    store = file_kit.open()
    put(store, make_record("before"))
    FullDisk(monkeypatch, store, 4096 + SPAN_DISK_BYTES + 5000, errno.EIO)
    assert not put(store, make_record("a"))
    assert store.stats().dropped_spans == 1
    assert store.stats().num_away == 1
    monkeypatch.undo()
    wait_until_here(store)
    assert put(store, make_record("a"), writer=1)
    assert holds(store, make_record("a"), writer=1)
    assert holds(store, make_record("before"))


@pytest.mark.parametrize("max_bytes", [1, 4095, 4097, 9000])
def test_short_writes_and_reads_are_carried_on(file_kit, monkeypatch, max_bytes):
    rng = random.Random(1)
    num_short = {False: 0, True: 0}

    def short(is_write, offset, num_bytes):
        num_short[is_write] += 1
        return rng.randint(max(1, max_bytes - 1000), max_bytes) if max_bytes > 1 else rng.choice([1, 2000])

    store = file_kit.open()
    inject(monkeypatch, store, short)
    records = [make_record(idx) for idx in range(3)]
    for record in records:
        assert put(store, record)
        assert holds(store, record)
    assert all(count >= 2 * 9 for count in num_short.values()), "nothing was short"
    assert all(holds(file_kit.open(), record) for record in records)


def test_a_write_without_progress_does_not_hang(file_kit, monkeypatch):
    store = file_kit.open()
    inject(monkeypatch, store, lambda is_write, offset, num_bytes: 0 if is_write else None)
    assert not put(store, make_record("a"))
    assert store.stats().dropped_spans == 1


def test_a_read_error_of_one_chunk_is_damage_once_the_disk_was_found_well(file_kit, monkeypatch):
    store = file_kit.open()
    records = [make_record(idx) for idx in range(6)]
    for record in records:
        put(store, record)
    bad_offset = 4096 + 4 * SPAN_DISK_BYTES
    inject(monkeypatch, store, lambda is_write, offset, num_bytes: -errno.EIO if offset == bad_offset else None)
    outcome = store.get_into([reads_of(record)[0] for record in records])
    assert outcome == ReadOutcome(num_ok=4, reason="unavailable")
    wait_until_here(store)
    assert (store.stats().corrupt_chunks, store.stats().unavailable) == (1, 1)
    assert store.why_missing(records[4].span_id) == "corrupt"
    assert [store.find(record.span_id) is not None for record in records] == [True] * 4 + [False, True]


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
    assert disk.is_reading.wait(20)
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
    assert disk.is_reading.wait(20)
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
    assert disk.is_reading.wait(20)
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
    assert disk.is_reading.wait(20)
    closer = threading.Thread(target=store.close)
    closer.start()
    closer.join(0.1)
    assert closer.is_alive()
    disk.may_read.set()
    closer.join()
    reader.join()
    assert found == [True]


def test_a_file_that_ends_early_is_damage_even_if_the_buffers_hold_the_bytes(file_kit):
    store = file_kit.open()
    put(store, make_record(0))
    reads = reads_of(make_record(0))[:1]
    assert store.get_into(reads) == ReadOutcome(num_ok=1)
    os.truncate(file_kit.path / "segments" / "00000001.seg", 4096)
    assert store.get_into(reads) == ReadOutcome(num_ok=0, reason="corrupt")


def test_an_interrupted_write_leaves_nothing_taken(file_kit, monkeypatch):
    store = file_kit.open_for(2)
    interrupt_writes(monkeypatch, store)
    for idx in range(3):
        with pytest.raises(KeyboardInterrupt):
            put(store, make_record(idx))
    monkeypatch.undo()
    assert all(put(store, make_record(idx)) for idx in range(2))
    assert all(holds(store, make_record(idx)) for idx in range(2))


def test_what_cannot_be_synced_is_forgotten(file_kit, monkeypatch):
    """After a failed sync the kernel may have thrown the new bytes away: they cannot be promised, nor trusted."""
    store = file_kit.open(durability="strict")
    store._pulse.stop()
    before = make_record("before")
    put(store, before)
    store.flush()
    put(store, make_record("a"))

    def broken(fd):
        raise OSError(errno.EIO, "medium error")

    monkeypatch.setattr(os, "fdatasync", broken)
    store.flush()
    monkeypatch.undo()
    wait_until_here(store)
    assert store.find(make_record("a").span_id) is None
    assert store.stats().dropped_spans == 1
    assert holds(store, before)
    assert put(store, make_record("a"), writer=1)
    store = file_kit.open()
    assert holds(store, make_record("a"), writer=1)
    assert holds(store, before)


@pytest.mark.parametrize("with_flushes", [True, False])
def test_a_disk_too_full_for_the_catalog_means_evict(file_kit, monkeypatch, with_flushes):
    """The segments may not eat what the catalog's log needs, or nothing could be evicted any more."""
    store = file_kit.open(10 * SPAN_DISK_BYTES + 4096)
    limit_bytes = 4096 + 9 * SPAN_DISK_BYTES
    commit = Catalog.commit

    def on_a_full_disk(self, **work):
        if disk_bytes(file_kit.path) > limit_bytes:
            raise sqlite3.OperationalError("database or disk is full")
        commit(self, **work)

    monkeypatch.setattr(Catalog, "commit", on_a_full_disk)
    for idx in range(30):
        assert put(store, make_record(idx)), idx
        assert holds(store, make_record(idx))
        if with_flushes:
            store.flush()
    store.flush()
    assert store.stats().dropped_spans == 0
    store = file_kit.open()
    there = [idx for idx in range(30) if holds(store, make_record(idx))]
    assert there == list(range(30 - len(there), 30))
    assert len(there) >= 8
    assert store.stats().corrupt_chunks == 0


def test_a_crash_on_a_disk_that_full_costs_only_what_was_evicted(file_kit, monkeypatch, tmp_path):
    store = file_kit.open(10 * SPAN_DISK_BYTES + 4096)
    store._pulse.stop()
    for idx in range(10):
        put(store, make_record(idx))
    store.flush()

    def refused(self, **work):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(Catalog, "commit", refused)
    for _ in range(20):
        assert not put(store, make_record("more"))
    there = [idx for idx in range(10) if store.find(make_record(idx).span_id)]
    assert len(there) == 9, "evicting more does not help"
    shutil.copytree(file_kit.path, tmp_path / "crashed")
    monkeypatch.undo()
    crashed = StoreKit("file", tmp_path / "crashed")
    reopened = crashed.open()
    assert [idx for idx in range(10) if holds(reopened, make_record(idx))] == there
    crashed.close()


def test_a_catalog_that_cannot_be_written_is_tried_again(file_kit, monkeypatch, caplog):
    store = file_kit.open()
    commit = Catalog.commit

    def refused(self, **work):
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(Catalog, "commit", refused)
    put(store, make_record("a"))
    put(store, make_record("b"))
    store.flush()
    store.delete([make_record("b").span_id])
    store.flush()
    assert holds(store, make_record("a"))
    monkeypatch.setattr(Catalog, "commit", commit)
    store.flush()
    assert len(caplog.records) == 1, "trouble that lasts is told once"
    store = file_kit.open()
    assert holds(store, make_record("a"))
    assert store.find(make_record("b").span_id) is None


def test_a_catalog_that_cannot_be_written_keeps_slots_from_reuse(file_kit, monkeypatch):
    store = file_kit.open_for(3)
    for idx in range(3):
        put(store, make_record(idx))
    store.flush()

    def refused(self, **work):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(Catalog, "commit", refused)
    assert not put(store, make_record("more"))
    assert not put(store, make_record("more"))
    monkeypatch.undo()
    assert put(store, make_record("more"))
    assert holds(store, make_record("more"))


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


def test_segments_that_cannot_be_made_mean_drop(file_kit):
    store = file_kit.open()
    segments = file_kit.path / "segments"
    segments.rmdir()
    assert not put(store, make_record("a"))
    segments.mkdir()
    assert put(store, make_record("a"))
    assert holds(store, make_record("a"))


def test_a_catalog_that_may_not_be_opened_is_not_set_aside(file_kit):
    file_kit.open()
    file_kit.close()
    (file_kit.path / "catalog.sqlite").unlink()
    (file_kit.path / "catalog.sqlite").mkdir()
    with pytest.raises(ConfigError, match=r"catalog\.sqlite cannot be opened"):
        file_kit.open()
    assert not list(file_kit.path.glob("*damaged*"))


@pytest.mark.parametrize("message", ["disk I/O error", "unable to open database file", "database or disk is full"])
def test_a_sound_catalog_is_not_set_aside_for_a_disk_that_fails(file_kit, monkeypatch, message):
    put(file_kit.open(), make_record("a"))
    file_kit.close()

    def broken(self, connection):
        raise sqlite3.OperationalError(message)

    monkeypatch.setattr(Database, "_check", broken)
    with pytest.raises(ConfigError, match=message):
        file_kit.open()
    file_kit.close()
    monkeypatch.undo()
    assert holds(file_kit.open(), make_record("a"))


def test_a_locked_catalog_is_busy_not_damaged(file_kit, monkeypatch):
    put(file_kit.open(), make_record("a"))
    file_kit.close()
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **kwargs: connect(*args, **{**kwargs, "timeout": 0.05}))
    other = connect(file_kit.path / "catalog.sqlite", isolation_level=None)
    other.execute("PRAGMA locking_mode = EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StateDirBusyError, match="locked by another program"):
        file_kit.open()
    other.execute("ROLLBACK")
    other.close()
    file_kit.close()
    assert holds(file_kit.open(), make_record("a"))
