"""Death at any moment loses what was not flushed, and nothing else; it never makes a wrong byte."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mii_hcache.storage.state_dir import StateDir
from tests.storage.crash_writer import CAPACITY_BYTES, NUM_NAMES
from tests.storage.storage_kit import (
    LAYOUTS,
    StoreKit,
    disk_bytes,
    holds,
    make_chunks,
    make_record,
    put,
    read_span,
    wait_until,
)

ROOT = Path(__file__).parents[2]


def run_and_kill(
    path: Path, seed: int, num_lines: int, delay_s: float = 0.0, layout: str = "uniform"
) -> list[list[str]]:
    """What a writer said before it was killed, which is some time after it said `num_lines`."""
    command = [sys.executable, "-m", "tests.storage.crash_writer", path, str(seed), layout]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as writer:
        said = [writer.stdout.readline() for _ in range(num_lines)]
        time.sleep(delay_s)
        writer.kill()
        said += writer.stdout.read().splitlines()
    assert all(said), "the writer did not live so long"
    return [line.split() for line in said]


def promised(said: list[list[str]]) -> tuple[set[int], int]:
    """Names that were flushed and not deleted since, and how many of them may have been evicted."""
    last = max(idx for idx, words in enumerate(said) if words[0] == "flushed")
    names = {int(word) for word in said[last][1:]}
    names -= {int(words[1]) for words in said[last:] if words[0] == "deleting"}
    return names, sum(words[0] == "evicting" for words in said[last:])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_at_random_moments(layout, tmp_path):
    rng = random.Random(20)
    num_found = num_promised = 0
    for round_idx in range(40):
        if round_idx >= 7 and num_found > 14 and num_promised > 5:  # how much there is to check is chance
            break
        said = run_and_kill(tmp_path, round_idx, rng.randrange(1, 60), rng.uniform(0, 0.005), layout)
        kit = StoreKit("file", tmp_path, LAYOUTS[layout])
        store = kit.open(CAPACITY_BYTES)
        assert store.notes == []
        assert disk_bytes(tmp_path) <= CAPACITY_BYTES
        there = {name for name in range(NUM_NAMES) if holds(store, kit.record(name))}
        assert store.stats().corrupt_chunks == 0
        assert there == {name for name in range(NUM_NAMES) if store.find(kit.record(name).span_id)}
        names, num_evictions = promised(said)
        assert len(names - there) <= num_evictions, (names, there, num_evictions)
        num_found += len(there)
        num_promised += max(0, len(names) - num_evictions)
        kit.close()
    assert num_found > 14
    assert num_promised > 5


def copy_live(source: Path, target: Path, *, catalog_first: bool) -> None:
    """Copy a directory that is being written, one part after the other: as if writes had reached the disk out of
    order, or not at all."""
    target.mkdir()
    catalog = ["catalog.sqlite-wal", "catalog.sqlite", "store.id"]
    for name in (*catalog, "segments") if catalog_first else ("segments", *catalog):
        if name == "segments":
            (target / name).mkdir()
            for file in (source / name).iterdir():
                try:
                    shutil.copy(file, target / name)
                except FileNotFoundError:
                    continue
        elif (source / name).exists():
            shutil.copy(source / name, target)


@pytest.mark.parametrize("catalog_first", [True, False])
def test_copied_while_it_is_written(file_kit, catalog_first, layout, tmp_path):
    """Each writer of a name leaves other bytes, so that a span of mixed writers shows."""
    store = file_kit.open(CAPACITY_BYTES)
    records = [make_record(name, layout=layout) for name in range(NUM_NAMES)]
    stop = threading.Event()

    def write() -> None:
        rng = random.Random(1)
        while not stop.is_set():
            name = rng.randrange(NUM_NAMES)
            if rng.random() < 0.3:
                store.delete([records[name].span_id])
            else:
                put(store, records[name], writer=rng.randrange(3))
            if rng.random() < 0.3:
                store.flush()

    writer = threading.Thread(target=write)
    writer.start()
    num_whole = 0
    try:
        for round_idx in range(40):
            if round_idx >= 10 and num_whole > 12:
                break
            copy = tmp_path / f"copy{round_idx}"
            time.sleep(0.01)
            copy_live(file_kit.path, copy, catalog_first=catalog_first)
            copied = StoreKit("file", copy)
            opened = copied.open(CAPACITY_BYTES)
            for record in records:
                chunks, reason = read_span(opened, record)
                assert chunks in [make_chunks(record, writer_idx)[: len(chunks)] for writer_idx in range(3)]
                num_whole += reason is None
                assert put(opened, record)
            copied.close()
    finally:
        stop.set()
        writer.join()
    assert num_whole > 12


def test_a_crash_keeps_what_was_flushed_and_forgets_the_rest(file_kit, tmp_path):
    file_kit.path.mkdir()
    store = file_kit.open()
    store._pulse.stop()
    flushed, waiting, deleted = make_record("flushed"), make_record("waiting"), make_record("deleted")
    put(store, flushed)
    put(store, deleted)
    store.flush()
    store.delete([deleted.span_id])
    store.flush()
    put(store, waiting)
    assert holds(store, waiting)
    shutil.copytree(file_kit.path, tmp_path / "crashed")
    crashed = StoreKit("file", tmp_path / "crashed")
    reopened = crashed.open()
    assert holds(reopened, flushed)
    assert reopened.find(waiting.span_id) is None
    assert reopened.find(deleted.span_id) is None
    crashed.close()


@pytest.mark.parametrize("kind", ["file", "tiered"])
def test_what_was_put_is_durable_soon_without_a_flush(kind, tmp_path):
    kit = StoreKit(kind, tmp_path / "state")
    store = kit.open()
    records = [make_record(idx) for idx in range(3)]
    for record in records:
        put(store, record)

    def num_there() -> int:
        crashed = StoreKit("file", tmp_path / f"crashed{time.monotonic_ns()}")
        copy_live(tmp_path / "state", crashed.path, catalog_first=True)
        reopened = crashed.open()
        num = sum(holds(reopened, record) for record in records)
        crashed.close()
        return num

    wait_until(lambda: num_there() == 3)
    kit.close()


def test_slots_are_not_reused_before_their_row_is_gone(file_kit, layout, monkeypatch):
    """No write of ours may touch a slot that a committed row names."""
    import sqlite3

    from mii_hcache.storage.segment import SegmentFile

    file_kit.layout = layout
    store = file_kit.open_for(4)
    violations = []
    to_write = SegmentFile.to_write

    def watched(self, slot, header, payload):
        connection = sqlite3.connect(file_kit.path / "catalog.sqlite")
        number = int(self.path.stem)
        for span_id, places in connection.execute("SELECT span_id, places FROM span"):
            words = memoryview(places).cast("I").tolist()
            if (number, slot) in zip(words[::3], words[1::3], strict=True):
                violations.append((span_id, number, slot))
        connection.close()
        return to_write(self, slot, header, payload)

    monkeypatch.setattr(SegmentFile, "to_write", watched)
    for idx in range(30):
        assert put(store, file_kit.record(idx, **({"chunk_bytes": 9000} if idx % 5 == 0 else {})))
        if idx % 2:
            store.flush()
        if idx % 7 == 0:
            store.delete([make_record(idx).span_id])
    assert violations == []
    assert store.stats().evicted_spans > 10


def test_death_while_a_segment_file_is_made_leaves_nothing_behind(file_kit, monkeypatch):
    def dies(fd):
        raise KeyboardInterrupt

    store = file_kit.open()
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", dies)
        patch.setattr(Path, "unlink", lambda path, missing_ok=False: None)
        with pytest.raises(KeyboardInterrupt):
            put(store, make_record("a"))
    assert [file.name for file in (file_kit.path / "segments").iterdir()] == ["00000001.new"]
    store = file_kit.open()
    assert store.notes == []
    assert not list((file_kit.path / "segments").iterdir())
    assert put(store, make_record("a"))


def test_a_lock_survives_nothing(tmp_path):
    """The directory of a killed writer can be opened at once."""
    run_and_kill(tmp_path, 1, 1)
    StateDir(tmp_path).close()


def test_a_deletion_that_an_eviction_commits_is_durable_at_once(file_kit, monkeypatch):
    """An eviction's commit need not outlive a power cut, except where it carries a deletion that somebody asked for."""
    from mii_hcache.storage.database import Database

    store = file_kit.open()
    store._pulse.stop()
    put(store, make_record("secret"))
    store.flush()
    commits = []
    transact = Database.transact

    def watched(self, change, *, durable=True):
        wal = file_kit.path / "catalog.sqlite-wal"
        before = wal.stat().st_size, wal.read_bytes()
        transact(self, change, durable=durable)
        commits.append((durable, (wal.stat().st_size, wal.read_bytes()) != before))

    monkeypatch.setattr(Database, "transact", watched)
    store.delete([make_record("secret").span_id])
    assert store._commits.run(publish=False)
    store.flush()
    assert commits == [(True, True)], "SQLite syncs its log only when it writes to it"


def test_what_an_eviction_committed_is_durable_once_flushed(file_kit):
    store = file_kit.open(durability="strict")
    store._pulse.stop()
    put(store, make_record("a"))
    store.flush()
    store._index.remove([make_record("a").span_id], "evicted")
    assert store._commits.run(publish=False) and store._catalog.has_undurable
    store.flush()
    assert not store._catalog.has_undurable


def test_what_was_evicted_and_then_deleted_stays_gone(file_kit):
    """The eviction's commit need not outlive a power cut; the deletion of what is no longer there must see to it."""
    store = file_kit.open(durability="relaxed")
    store._pulse.stop()
    put(store, make_record("secret"))
    store.flush()
    store._index.remove([make_record("secret").span_id], "evicted")
    assert store._commits.run(publish=False) and store._catalog.has_undurable
    assert store.delete([make_record("secret").span_id]) == 0
    store.flush()
    assert not store._catalog.has_undurable
