"""Whatever happens to the files, a span reads back right or not at all."""

from __future__ import annotations

import logging
import random
import shutil
import sqlite3
from pathlib import Path

import pytest

from mii_hcache.core.geometry import ChunkKind
from mii_hcache.storage.base import ReadOutcome
from mii_hcache.storage.file import FileStore
from mii_hcache.storage.memory import MemoryStore
from mii_hcache.storage.state_dir import StateDir
from mii_hcache.storage.tiered import TieredStore
from tests.storage.storage_kit import (
    IO,
    NUM_CHUNKS,
    SLOT_BYTES,
    SPAN_BYTES,
    SPAN_DISK_BYTES,
    StoreKit,
    disk_bytes,
    holds,
    make_chunks,
    make_record,
    put,
    read_span,
    reads_of,
)

RECORDS = [
    make_record(idx, kind=ChunkKind.KV if idx % 2 else ChunkKind.HIDDEN, **({"chunk_bytes": 900} if idx > 7 else {}))
    for idx in range(10)
]


@pytest.fixture
def saved(file_kit: StoreKit) -> StoreKit:
    """A closed store with RECORDS in it: spans of two sizes, so two segments."""
    store = file_kit.open()
    for record in RECORDS:
        assert put(store, record)
    file_kit.close()
    return file_kit


def segment_of(kit: StoreKit, number: int = 1) -> Path:
    return kit.path / "segments" / f"{number:08d}.seg"


def rows(kit: StoreKit) -> dict[bytes, list[tuple[int, int]]]:
    """Places of each span, as the catalog has them."""
    connection = sqlite3.connect(kit.path / "catalog.sqlite")
    found = connection.execute("SELECT span_id, places FROM span").fetchall()
    connection.close()
    words = {span_id: memoryview(places).cast("I").tolist() for span_id, places in found}
    return {span_id: list(zip(w[::3], w[1::3], strict=True)) for span_id, w in words.items()}


def flip(path: Path, offset: int, mask: int = 0x10) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ mask]))


def held(store: FileStore) -> list[bool]:
    return [holds(store, record) for record in RECORDS]


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


@pytest.mark.parametrize("lost", ["catalog.sqlite", "store.id"])
def test_the_identity_survives_the_loss_of_one_of_its_places(saved, lost):
    identity = (saved.path / "store.id").read_bytes()
    (saved.path / lost).unlink()
    store = saved.open()
    assert (saved.path / "store.id").read_bytes() == identity
    assert all(held(store)) == (lost == "store.id")


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
