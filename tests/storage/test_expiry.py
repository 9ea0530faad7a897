"""What nobody used for long is gone, bytes and all; what is used or pinned is not."""

from __future__ import annotations

import time
from contextlib import closing

import pytest

from mii_hcache.storage.expiry import Expiry
from mii_hcache.storage.open import open_state
from mii_hcache.storage.transcripts import Transcripts
from tests.storage.storage_kit import SPAN_BYTES, StoreKit, disk_bytes, holds, make_record, put, wait_until

HOUR_S = 3600.0


@pytest.fixture
def clock(monkeypatch):
    """Moves the clock of everything that keeps times: `clock(seconds)`."""
    offset_s = [0.0]
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + offset_s[0])

    def move(seconds):
        offset_s[0] += seconds

    return move


@pytest.fixture(params=["memory", "file", "tiered"])
def kit(request, tmp_path):
    kit = StoreKit(request.param, tmp_path / "state")
    yield kit
    kit.close()


def test_unused_spans_go_and_used_ones_with_their_ancestors_stay(kit, clock):
    store = kit.open()
    old, root, tip, pinned = (
        make_record("old"),
        make_record("root"),
        make_record("tip", parent="root", span_idx=1),
        make_record("pinned"),
    )
    for record in (old, root, tip, pinned):
        assert put(store, record)
    store.flush()
    store.pin([pinned.span_id])
    clock(2 * HOUR_S)
    store.touch([tip.span_id])
    gone = store.expire(time.time() - HOUR_S)
    store.flush()
    assert gone == [old.span_id]
    assert store.find(old.span_id) is None and store.why_missing(old.span_id) == "expired"
    assert all(holds(store, record) for record in (root, tip, pinned))
    store.unpin([pinned.span_id])
    assert store.expire(time.time() - HOUR_S) == [pinned.span_id] or holds(store, pinned)
    assert put(store, old, writer=1) and holds(store, old, writer=1)


def test_the_bytes_leave_the_disk(tmp_path, clock):
    kit = StoreKit("file", tmp_path / "state")
    store = kit.open()
    put(store, make_record("a"))
    put(store, make_record("b"))
    store.flush()
    before = disk_bytes(kit.path)
    clock(2 * HOUR_S)
    store.touch([make_record("b").span_id])
    store.expire(time.time() - HOUR_S)
    store.flush()
    assert disk_bytes(kit.path) <= before - SPAN_BYTES
    secret = bytes(make_record("a").token_ids)
    kit.close()
    assert all(secret not in path.read_bytes() for path in kit.path.glob("catalog*"))


@pytest.mark.parametrize("dram_capacity_bytes", [0, 4 * SPAN_BYTES])
def test_time_goes_on_while_the_server_is_down(dram_capacity_bytes, tmp_path, clock):
    def opened(**settings):
        return closing(open_state(tmp_path / "state", 1 << 21, dram_capacity_bytes, **settings))

    with opened() as state:
        put(state.store, make_record("early"))
        state.transcripts.remember(b"", "early", [1, 2])
        state.store.flush()
        clock(HOUR_S)
        put(state.store, make_record("late"))
        state.transcripts.remember(b"", "late", [3, 4])
    clock(HOUR_S)
    with opened(expire_after_s=3 * HOUR_S) as state:
        assert state.store.stats().num_spans == 2 and len(state.transcripts) == 2
    with opened(expire_after_s=1.5 * HOUR_S) as state:
        assert not holds(state.store, make_record("early"))
        assert holds(state.store, make_record("late"))
        assert state.transcripts.longest_prefix(b"", "early") is None
        assert state.transcripts.longest_prefix(b"", "late") == (4, [3, 4])
    with opened() as state:
        assert state.store.stats().num_spans == 1 and len(state.transcripts) == 1


def test_it_happens_by_itself(tmp_path, clock, monkeypatch):
    kit = StoreKit("file", tmp_path / "state")
    store, transcripts = kit.open(), Transcripts(None)
    put(store, make_record("a"))
    transcripts.remember(b"", "abc", [1])
    monkeypatch.setattr("mii_hcache.storage.expiry._MOST_WAIT_S", 0.01)
    expiry = Expiry(store, transcripts, HOUR_S)
    try:
        assert holds(store, make_record("a")), "not yet"
        clock(2 * HOUR_S)
        wait_until(lambda: store.find(make_record("a").span_id) is None and not len(transcripts))
    finally:
        expiry.close()
        expiry.close()
    kit.close()


def test_trouble_does_not_end_it(tmp_path, monkeypatch, caplog):
    kit = StoreKit("file", tmp_path / "state")
    store, transcripts = kit.open(), Transcripts(None)
    expiry = Expiry(store, transcripts, 0.05)
    expire, calls = store.expire, []

    def failing_once(since_s):
        calls.append(since_s)
        if len(calls) == 1:
            raise OSError("gone for a moment")
        return expire(since_s)

    monkeypatch.setattr(store, "expire", failing_once)
    wait_until(lambda: len(calls) > 1)
    expiry.close()
    assert "tried again" in caplog.text
    kit.close()


def test_last_uses_are_written_without_anything_being_saved(tmp_path, clock):
    """Else a crash after days of reading would make all that was read look unused."""
    kit = StoreKit("file", tmp_path / "state")
    store = kit.open()
    put(store, make_record("a"))
    store.flush()
    expiry = Expiry(store, Transcripts(None), 10 * HOUR_S)
    clock(9 * HOUR_S)
    store.touch([make_record("a").span_id])
    store._commits._ticks_due_s = 0.0
    expiry.run()
    ticks = dict(store._index._order.take_moved())
    assert ticks == {}, "written already"
    clock(9 * HOUR_S)
    expiry.run()
    assert store.find(make_record("a").span_id) is not None
    expiry.close()
    kit.close()
