"""What is pinned outlives eviction, expiry and restarts; unpinned it is as mortal as all else."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from types import SimpleNamespace

import pytest

from mii_hcache.storage.open import open_state
from mii_hcache.storage.pins import Pins
from tests.storage.storage_kit import SPAN_BYTES, SPAN_DISK_BYTES, StoreKit, holds, make_id, make_record, put

CAPACITY_BYTES = 30 * SPAN_DISK_BYTES
CHAIN = [make_record(idx, parent=idx - 1 if idx else None, span_idx=idx) for idx in range(4)]
TIP = CHAIN[-1].span_id


@pytest.fixture(params=[0, 1 << 20], ids=["file", "tiered"])
def opened(request, tmp_path):
    def open_it(**settings):
        return closing(open_state(tmp_path / "state", CAPACITY_BYTES, request.param, **settings))

    return open_it


def fill(state, name, num=60):
    for idx in range(num):
        put(state.store, make_record(f"{name}{idx}"))
    state.store.flush()


def test_pinned_contexts_survive_eviction_expiry_and_restarts(opened, tmp_path):
    with opened() as state:
        for record in CHAIN:
            put(state.store, record)
        put(state.store, make_record("other"))
        assert state.pins.pin(TIP) == 4
        assert state.pins.pin(TIP) == 4
        fill(state, "a")
        assert all(holds(state.store, record) for record in CHAIN)
    with opened() as state:
        assert state.notes == [] and state.pins.tips == [TIP]
        fill(state, "b")
        assert all(holds(state.store, record) for record in CHAIN)
    time.sleep(0.05)
    with opened(expire_after_s=0.04) as state:
        assert all(holds(state.store, record) for record in CHAIN)
        assert not holds(state.store, make_record("b59"))
        assert state.pins.unpin(TIP) and not state.pins.unpin(TIP)
    time.sleep(0.05)
    with opened(expire_after_s=0.04) as state:
        assert state.pins.tips == [] and not any(holds(state.store, record) for record in CHAIN)


def test_two_contexts_share_their_beginning(opened):
    fork = make_record("fork", parent=1, span_idx=2)
    with opened() as state:
        for record in (*CHAIN, fork):
            put(state.store, record)
        assert (state.pins.pin(TIP), state.pins.pin(fork.span_id)) == (4, 3)
        assert state.pins.unpin(TIP)
        fill(state, "a")
        assert [holds(state.store, record) for record in (*CHAIN[:2], fork)] == [True] * 3
        file = getattr(state.store, "_file", state.store)
        assert not any(holds(file, record) for record in CHAIN[2:])


def test_what_is_not_saved_cannot_be_pinned(opened):
    with opened() as state:
        assert state.pins.pin(make_id("nowhere")) == 0
        assert state.pins.tips == []


def test_deletion_overrides_pins(opened):
    with opened() as state:
        for record in CHAIN:
            put(state.store, record)
        state.pins.pin(TIP)
        state.store.delete([record.span_id for record in CHAIN])
        state.store.flush()
        assert not any(holds(state.store, record) for record in CHAIN)
    with opened() as state:
        assert state.pins.tips == []
        for record in CHAIN:
            put(state.store, record)
    with opened() as state:
        assert state.pins.tips == [], "a pin does not come back with its span"


def test_pins_of_one_process_without_a_directory():
    with closing(open_state(None, 1 << 20, 10 * SPAN_BYTES)) as state:
        for record in CHAIN:
            put(state.store, record)
        assert state.pins.pin(TIP) == 4
        fill(state, "a", 20)
        assert all(holds(state.store, record) for record in CHAIN)


def test_a_pin_that_cannot_be_written_is_none(opened, monkeypatch):
    with opened() as state:
        for record in CHAIN:
            put(state.store, record)

        def full(change, *, durable=True):
            raise sqlite3.OperationalError("database or disk is full")

        monkeypatch.setattr(state.pins._database, "transact", full)
        with pytest.raises(sqlite3.OperationalError):
            state.pins.pin(TIP)
        monkeypatch.undo()
        assert state.pins.tips == []
        fill(state, "a")
        file = getattr(state.store, "_file", state.store)
        assert not any(holds(file, record) for record in CHAIN)


def test_a_damaged_list_of_pins_costs_the_pins(opened, tmp_path):
    with opened() as state:
        put(state.store, CHAIN[0])
        state.pins.pin(CHAIN[0].span_id)
    for extra in tmp_path.glob("state/pins.sqlite-*"):
        extra.unlink()
    (tmp_path / "state" / "pins.sqlite").write_bytes(b"nonsense" * 1000)
    with opened() as state:
        assert len(state.notes) == 1 and "pins.sqlite" in state.notes[0]
        assert state.pins.tips == [] and holds(state.store, CHAIN[0])


def test_the_list_is_private(opened, tmp_path):
    with opened():
        assert (tmp_path / "state" / "pins.sqlite").stat().st_mode & 0o777 == 0o600


class DiskAway:
    """A striped store, one of whose disks is away."""

    def __init__(self):
        self.pinned = []

    def find(self, span_id):
        return None

    def pin_always(self, span_ids):
        self.pinned += span_ids

    def unpin(self, span_ids):
        for span_id in span_ids:
            self.pinned.remove(span_id)

    def stats(self):
        return SimpleNamespace(num_away=1)


def test_what_lies_on_a_disk_that_is_away_stays_pinned(tmp_path):
    """Every span of the context, also behind one that cannot be found now: or the rest would go meanwhile."""
    kit = StoreKit("file", tmp_path / "state")
    store = kit.open()
    chain = [make_record(idx, parent=idx - 1 if idx else None, span_idx=idx) for idx in range(3)]
    assert all(put(store, record) for record in chain)
    pins = Pins(tmp_path / "pins.sqlite", store, store.flush)
    assert pins.pin(chain[2].span_id) == 3
    pins.close()
    away = DiskAway()
    pins = Pins(tmp_path / "pins.sqlite", away, lambda: None)
    assert sorted(away.pinned) == sorted(record.span_id for record in chain)
    assert pins.unpin(chain[2].span_id) and away.pinned == []
    pins.close()
    kit.close()
