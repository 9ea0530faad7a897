"""A catalog that cannot be written, opened or locked: spans stay readable, and none is lost for it."""

from __future__ import annotations

import shutil
import sqlite3

import pytest

from mii_hcache.errors import ConfigError, StateDirBusyError
from mii_hcache.storage.catalog import Catalog
from mii_hcache.storage.database import Database
from tests.storage.storage_kit import (
    SPAN_DISK_BYTES,
    StoreKit,
    disk_bytes,
    holds,
    make_record,
    put,
)


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
