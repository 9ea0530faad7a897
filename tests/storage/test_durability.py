"""What a power cut costs: nothing that was flushed in strict mode, never a wrong byte in either."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from mii_hcache.storage import segment
from mii_hcache.storage.database import Database
from tests.storage.storage_kit import CHUNK_BYTES, LAYOUTS, StoreKit, holds, make_record, put

NAMES = range(6)


class PowerCut:
    """A disk whose cache is lost: of segment files remains what was synced, of a database what its last durable
    transaction left. The kernel's and SQLite's own syncs are believed to do what they promise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
        self.path = path
        self.survives = path.with_name("survives")
        self.num_syncs = 0
        fsync, fdatasync, transact = os.fsync, os.fdatasync, Database.transact

        def synced(sync, fd):
            sync(fd)
            file = Path(os.readlink(f"/proc/self/fd/{fd}"))
            if file.suffix in (".seg", segment.UNFINISHED_SUFFIX) and file.is_relative_to(path):
                self.num_syncs += file.suffix == ".seg"
                self._keep(file, file.with_suffix(".seg").name)

        def transacted(database, change, *, durable=True):
            transact(database, change, durable=durable)
            if durable:
                for file in path.glob("catalog.sqlite*"):
                    self._keep(file, file.name)

        monkeypatch.setattr(os, "fsync", lambda fd: synced(fsync, fd))
        monkeypatch.setattr(os, "fdatasync", lambda fd: synced(fdatasync, fd))
        monkeypatch.setattr(Database, "transact", transacted)

    def _keep(self, file: Path, name: str) -> None:
        place = self.survives / file.parent.relative_to(self.path) / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)

    def __call__(self, *, catalog_made_it: bool = False) -> Path:
        """The directory as it is found afterwards. `catalog_made_it`: SQLite's log was written back in time."""
        found = self.path.with_name("found")
        shutil.copytree(self.survives, found, dirs_exist_ok=True)
        for file in self.path.glob("catalog.sqlite*" if catalog_made_it else "store.id"):
            shutil.copyfile(file, found / file.name)
        shutil.copyfile(self.path / "store.id", found / "store.id")
        return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strict_what_was_flushed_is_there_after_a_power_cut(layout, tmp_path, monkeypatch):
    kit = StoreKit("file", tmp_path / "state", LAYOUTS[layout])
    cut = PowerCut(monkeypatch, kit.path)
    store = kit.open(durability="strict", flush_interval_s=None)
    for name in NAMES:
        put(store, kit.record(name))
        if name == 3:
            store.flush()
    found = StoreKit("file", cut(), LAYOUTS[layout])
    reopened = found.open()
    assert [name for name in NAMES if holds(reopened, kit.record(name))] == [0, 1, 2, 3]
    assert reopened.stats().corrupt_chunks == 0 and cut.num_syncs
    found.close()
    kit.close()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_relaxed_what_was_lost_is_a_miss(layout, tmp_path, monkeypatch):
    """The rows made it to the disk and the payloads did not: no order is promised between them."""
    kit = StoreKit("file", tmp_path / "state", LAYOUTS[layout])
    cut = PowerCut(monkeypatch, kit.path)
    store = kit.open(flush_interval_s=None)
    for name in NAMES:
        put(store, kit.record(name))
    store.flush()
    assert cut.num_syncs == 0, "nothing waits for the disk"
    assert all(holds(store, kit.record(name)) for name in NAMES)
    found = StoreKit("file", cut(catalog_made_it=True), LAYOUTS[layout])
    reopened = found.open()
    assert reopened.notes == [], "the segments' own headers were synced before anything was written into them"
    assert all(reopened.find(kit.record(name).span_id) for name in NAMES)
    assert not any(holds(reopened, kit.record(name)) for name in NAMES)
    assert all(put(reopened, kit.record(name), writer=1) for name in NAMES)
    assert all(holds(reopened, kit.record(name), writer=1) for name in NAMES)
    found.close()
    kit.close()


@pytest.mark.parametrize("seed", range(4))
def test_relaxed_blocks_lost_at_random_never_make_a_wrong_byte(seed, tmp_path):
    """Some blocks have their new bytes, others what was there before: zeros, or another span's slot."""
    rng = random.Random(seed)
    kit = StoreKit("file", tmp_path / "state")
    store = kit.open()
    for name in NAMES:
        put(store, make_record(name))
    store.flush()
    (path,) = (kit.path / "segments").glob("*.seg")
    before = path.read_bytes()
    store.delete(make_record(name).span_id for name in NAMES[:3])
    store.flush()
    for name in NAMES[:3]:
        put(store, make_record(name), writer=1)
    kit.close()
    after = bytearray(path.read_bytes())
    before = before.ljust(len(after), b"\0")
    for start in range(4096, len(after), 4096):
        if rng.random() < 0.1:
            after[start : start + 4096] = rng.choice([bytes(4096), before[start : start + 4096]])[: len(after) - start]
    path.write_bytes(after)
    reopened = kit.open()
    there = [holds(reopened, make_record(name), writer=int(name < 3)) for name in NAMES]
    assert not all(there), "nothing was lost: the test shows nothing"
    assert len(after) > 3 * CHUNK_BYTES * len(NAMES)
    kit.close()


@pytest.mark.parametrize("durability", ["relaxed", "strict"])
def test_a_flushed_deletion_is_not_undone_by_a_power_cut(durability, tmp_path, monkeypatch):
    kit = StoreKit("file", tmp_path / "state")
    cut = PowerCut(monkeypatch, kit.path)
    store = kit.open(durability=durability, flush_interval_s=None)
    put(store, make_record("secret"))
    put(store, make_record("other"))
    store.flush()
    store.delete([make_record("secret").span_id])
    store.flush()
    reopened_kit = StoreKit("file", cut())
    reopened = reopened_kit.open()
    assert reopened.find(make_record("secret").span_id) is None
    assert reopened.find(make_record("other").span_id) is not None
    reopened_kit.close()
    kit.close()


def test_a_deletion_that_made_room_for_others_is_as_durable(tmp_path, monkeypatch):
    """It may be committed before anybody flushes, with an eviction: then `flush` has nothing left to do."""
    kit = StoreKit("file", tmp_path / "state")
    cut = PowerCut(monkeypatch, kit.path)
    store = kit.open(kit.capacity_for(4), flush_interval_s=None)
    for name in range(4):
        put(store, make_record(name))
    store.flush()
    store.delete([make_record(0).span_id])
    put(store, make_record("new"))
    put(store, make_record("newer"))
    store.flush()
    reopened_kit = StoreKit("file", cut())
    assert reopened_kit.open().find(make_record(0).span_id) is None
    reopened_kit.close()
    kit.close()


def test_a_segment_whose_name_was_lost_is_missing(tmp_path):
    """Rows of a file that is not there are forgotten at opening, and said so."""
    kit = StoreKit("file", tmp_path / "state")
    put(kit.open(), make_record("a"))
    kit.close()
    (path,) = (kit.path / "segments").glob("*.seg")
    path.rename(path.with_suffix(segment.UNFINISHED_SUFFIX))
    store = kit.open()
    assert store.find(make_record("a").span_id) is None
    assert len(store.notes) == 1 and "gone" in store.notes[0]
    kit.close()
