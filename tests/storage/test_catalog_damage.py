"""A catalog that cannot be believed is set aside, with what it said; the store starts empty and sound."""

from __future__ import annotations

import logging
import shutil
import sqlite3

import pytest

from mii_hcache.storage.state_dir import StateDir
from tests.storage.damage_kit import RECORDS, held
from tests.storage.storage_kit import (
    StoreKit,
    disk_bytes,
    holds,
    make_record,
    put,
)


def assert_starts_empty(kit: StoreKit, caplog: pytest.LogCaptureFixture, why: str) -> None:
    with caplog.at_level(logging.WARNING):
        store = kit.open()
    assert any(why in note for note in store.notes), store.notes
    assert any(why in record.getMessage() for record in caplog.records)
    assert store.stats().num_spans == 0
    assert not any(held(store))
    assert disk_bytes(kit.path) == 0, "orphaned bytes are given back"
    assert all(put(store, record, 5) for record in RECORDS)
    store = kit.open()
    assert all(holds(store, record, 5) for record in RECORDS)
    assert store.notes == []


@pytest.mark.parametrize("garbage", [b"", b"\0" * 8192, b"not a database, honestly" * 999, b"SQLite format 3\0"])
def test_a_garbage_catalog_is_set_aside(saved, garbage, caplog):
    (saved.path / "catalog.sqlite").write_bytes(garbage)
    assert_starts_empty(saved, caplog, "set aside as catalog.damaged-1.sqlite")
    assert (saved.path / "catalog.damaged-1.sqlite").read_bytes() == garbage
    saved.close()
    (saved.path / "catalog.sqlite").write_bytes(garbage)
    assert_starts_empty(saved, caplog, "set aside as catalog.damaged-2.sqlite")


@pytest.mark.parametrize(
    ("sql", "why"),
    [
        ("DROP TABLE span", "tables"),
        ("ALTER TABLE span ADD COLUMN more", "tables"),
        ("CREATE TRIGGER t AFTER INSERT ON span BEGIN DELETE FROM span; END", "tables"),
        ("PRAGMA user_version = 3", "format version 3, this is 2"),
        ("PRAGMA application_id = 7", "another program"),
        ("DELETE FROM store", "rows but no identity"),
        ("UPDATE store SET uuid = x'00'", "identity is malformed"),
        ("UPDATE store SET uuid = randomblob(16)", "another store"),
        ("UPDATE span SET token_ids = zeroblob(256) WHERE rowid = 3", "checksum"),
        ("UPDATE span SET generation = generation + 1 WHERE rowid = 3", "checksum"),
        ("UPDATE span SET places = x'00' WHERE rowid = 3", "checksum"),
        ("UPDATE span SET kinds = x'00020202' WHERE rowid = 3", "checksum"),
        ("UPDATE span SET kinds = x'01010100' WHERE rowid = 3", "checksum"),
        ("UPDATE span SET kinds = 3 WHERE rowid = 3", "malformed"),
        ("UPDATE span SET hidden_chunk_bytes = 5001 WHERE rowid = 3", "checksum"),
        ("UPDATE span SET kv_chunk_bytes = 'many' WHERE rowid = 3", "malformed"),
        ("UPDATE span SET span_idx = 'three' WHERE rowid = 3", "malformed"),
        ("UPDATE span SET last_used = 'never' WHERE rowid = 3", "checksum"),
        ("UPDATE span SET span_id = CAST('text' AS TEXT) WHERE rowid = 3", "checksum"),
    ],
)
def test_a_catalog_that_makes_no_sense_is_set_aside(saved, sql, why, caplog):
    connection = sqlite3.connect(saved.path / "catalog.sqlite")
    connection.execute(sql)
    connection.commit()
    connection.close()
    assert_starts_empty(saved, caplog, why)


def test_a_catalog_whose_index_is_damaged_is_set_aside(saved, caplog):
    """Its rows can be read, but could not be deleted: SQLite itself has to find that."""
    connection = sqlite3.connect(saved.path / "catalog.sqlite")
    (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE type = 'index'").fetchone()
    assert connection.execute("PRAGMA page_size").fetchone() == (4096,)
    connection.close()
    with (saved.path / "catalog.sqlite").open("r+b") as file:
        file.seek((page - 1) * 4096)
        file.write(b"\x0a\x00\x00\x00\x00\x10\x00\x00")  # a leaf of an index without cells
    assert_starts_empty(saved, caplog, "SQLite finds damage")


def test_a_deleted_catalog_starts_empty_and_gives_the_bytes_back(saved):
    (saved.path / "catalog.sqlite").unlink()
    store = saved.open()
    assert not any(held(store))
    assert "catalog was missing" in store.notes[0]
    assert disk_bytes(saved.path) == 0
    assert all(put(store, record) for record in RECORDS)
    assert all(held(saved.open()))


def test_a_log_without_its_catalog_is_not_believed(saved, caplog):
    store = saved.open()
    put(store, make_record("more"))
    store.flush()
    shutil.copytree(saved.path, copy := saved.path.parent / "copy")
    (copy / "catalog.sqlite").unlink()
    assert (copy / "catalog.sqlite-wal").stat().st_size
    assert_starts_empty(kit := StoreKit("file", copy), caplog, "the file itself is missing")
    assert (copy / "catalog.damaged-1.sqlite-wal").exists()
    kit.close()


def test_two_rows_that_claim_one_slot_are_set_aside(file_kit, caplog):
    """As no commit of ours would leave them: from two stores with one identity, merged by hand."""
    for part in ("left", "right"):
        kit = StoreKit("file", file_kit.path / part)
        state_dir = StateDir(kit.path)
        state_dir.write_store_uuid(b"0123456789abcdef")
        state_dir.close()
        put(kit.open(), make_record(part))
        kit.close()
    left, right = file_kit.path / "left", file_kit.path / "right"
    connection = sqlite3.connect(left / "catalog.sqlite")
    connection.execute("ATTACH ? AS right", (str(right / "catalog.sqlite"),))
    connection.execute("INSERT INTO span SELECT * FROM right.span")
    connection.commit()
    connection.close()
    assert_starts_empty(kit := StoreKit("file", left), caplog, "claim the same slot")
    kit.close()


def test_a_catalog_of_another_store_is_set_aside(saved, tmp_path, caplog):
    other = StoreKit("file", tmp_path / "other")
    put(other.open(), make_record("foreign"))
    other.close()
    shutil.copy(other.path / "catalog.sqlite", saved.path / "catalog.sqlite")
    assert_starts_empty(saved, caplog, "it belongs to another store")


@pytest.mark.parametrize("lost", ["catalog.sqlite", "store.id"])
def test_the_identity_survives_the_loss_of_one_of_its_places(saved, lost):
    identity = (saved.path / "store.id").read_bytes()
    (saved.path / lost).unlink()
    store = saved.open()
    assert (saved.path / "store.id").read_bytes() == identity
    assert all(held(store)) == (lost == "store.id")
