"""Disks that are slow to finish, or broken: a put may be dropped, nothing is raised, nothing is wrong."""

from __future__ import annotations

import errno
import os
import random

import pytest

from mii_hcache.storage.records import ReadOutcome
from tests.storage.faults import FullDisk, inject, interrupt_writes
from tests.storage.storage_kit import (
    SPAN_DISK_BYTES,
    holds,
    make_record,
    put,
    reads_of,
    wait_until_here,
)


def test_a_write_error_drops_the_span_only(file_kit, monkeypatch, caplog):
    store = file_kit.open()
    put(store, make_record("before"))
    FullDisk(monkeypatch, store, 4096 + SPAN_DISK_BYTES + 5000, errno.EIO)
    assert not put(store, make_record("a"))
    assert store.stats().dropped_spans == 1
    assert "is away" in caplog.text, "if only until the next probe"
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


def test_segments_that_cannot_be_made_mean_drop(file_kit):
    store = file_kit.open()
    segments = file_kit.path / "segments"
    segments.rmdir()
    assert not put(store, make_record("a"))
    segments.mkdir()
    assert put(store, make_record("a"))
    assert holds(store, make_record("a"))


def test_a_segment_that_was_not_made_known_to_its_directory_is_made_anew(file_kit, monkeypatch):
    """The file has its name already when that fails: it must not stand in the way of the next try."""
    store = file_kit.open()

    def broken(path):
        raise OSError(errno.EIO, "medium error")

    with monkeypatch.context() as patch:
        patch.setattr("mii_hcache.storage.segment.sync_dir", broken)
        assert not put(store, make_record("a"))
    assert not list((file_kit.path / "segments").iterdir())
    wait_until_here(store)
    assert put(store, make_record("a"))
    store = file_kit.open()
    assert holds(store, make_record("a"))
