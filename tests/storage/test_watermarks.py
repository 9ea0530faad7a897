"""Room is made before a put needs it, and never more than the capacity is used."""

from __future__ import annotations

import pytest

from mii_hcache.errors import ConfigError
from mii_hcache.storage.room import Watermarks
from tests.storage.storage_kit import LAYOUTS, StoreKit, disk_bytes, holds, put, wait_until

WATERMARKS = Watermarks(high=0.9, low=0.7)
NUM_FIT = 40


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_store_above_the_high_mark_goes_down_to_the_low_one(layout, tmp_path):
    kit = StoreKit("file", tmp_path / "state", LAYOUTS[layout])
    store = kit.open(kit.capacity_for(NUM_FIT), watermarks=WATERMARKS, flush_interval_s=None)
    for name in range(35):
        put(store, kit.record(name))
    store.flush()
    assert store.stats().num_spans == 35, "not above the mark"
    put(store, kit.record(35))
    put(store, kit.record(36))
    store.flush()
    stats = store.stats()
    assert [name for name in range(37) if holds(store, kit.record(name))] == list(range(10, 37)), "the oldest went"
    assert (stats.evicted_spans, stats.evicted_ahead_spans, stats.put_waits) == (10, 10, 0)
    kit.close()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_puts_hardly_ever_wait_and_the_bound_holds(layout, tmp_path):
    waits = {}
    for watermarks in (None, WATERMARKS):
        kit = StoreKit("file", tmp_path / str(watermarks), LAYOUTS[layout])
        store = kit.open(kit.capacity_for(NUM_FIT), watermarks=watermarks, flush_interval_s=None)
        for name in range(100):
            assert put(store, kit.record(name))
            assert store.disk_bytes <= kit.capacity_for(NUM_FIT)
            if name % 3 == 2:
                store.flush()
        assert disk_bytes(kit.path) <= kit.capacity_for(NUM_FIT)
        assert store.stats().dropped_spans == 0
        waits[watermarks] = store.stats().put_waits
        kit.close()
    assert waits[None] >= 60 and waits[WATERMARKS] == 0


def test_the_background_does_it_without_being_asked(tmp_path):
    kit = StoreKit("file", tmp_path / "state")
    store = kit.open(kit.capacity_for(NUM_FIT), watermarks=WATERMARKS, flush_interval_s=3600.0)
    for name in range(NUM_FIT):
        put(store, kit.record(name))
    wait_until(lambda: store.stats().evicted_ahead_spans > 0)
    assert store.stats().evicted_ahead_spans >= 9, "from above the high mark down to the low one"
    kit.close()


def test_what_is_pinned_stays_above_every_mark(tmp_path):
    kit = StoreKit("file", tmp_path / "state")
    store = kit.open(kit.capacity_for(NUM_FIT), watermarks=WATERMARKS, flush_interval_s=None)
    for name in range(NUM_FIT - 1):
        put(store, kit.record(name))
    store.pin(kit.record(name).span_id for name in range(NUM_FIT - 1))
    store.flush()
    assert store.stats().num_spans == NUM_FIT - 1
    assert not store._room.is_tight, "it is not tried again and again"
    kit.close()


@pytest.mark.parametrize(("high", "low"), [(1.1, 0.5), (0.5, 0.6), (0.5, 0.0)])
def test_impossible_marks_are_refused(high, low):
    with pytest.raises(ConfigError, match="watermarks"):
        Watermarks(high=high, low=low)
