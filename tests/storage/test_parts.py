"""The small parts: order of use, reasons, lanes, copies, DRAM's own checks, opening it all."""

from __future__ import annotations

import sqlite3
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mii_hcache.errors import ConfigError, StateDirBusyError
from mii_hcache.storage.borrowing import PlainMemory
from mii_hcache.storage.copying import copy_bytes
from mii_hcache.storage.file import FileStore
from mii_hcache.storage.lanes import Lanes
from mii_hcache.storage.memory import MemoryStore
from mii_hcache.storage.open import open_state
from mii_hcache.storage.pulse import Pulse
from mii_hcache.storage.reasons import MAX_REASONS, Reasons
from mii_hcache.storage.recency import Recency
from mii_hcache.storage.records import ReadOutcome
from mii_hcache.storage.tiered import TieredStore
from tests.storage.storage_kit import (
    CHUNK_BYTES,
    SPAN_BYTES,
    holds,
    make_chunks,
    make_id,
    make_record,
    put,
    reads_of,
    wait_until,
    wanted_of,
)


def chain_in(recency: Recency, name: str, num: int) -> list[bytes]:
    keys = [f"{name}{idx}".encode() for idx in range(num)]
    for idx, key in enumerate(keys):
        recency.add(key, keys[idx - 1] if idx else None, idx)
    return keys


def test_recency_children_go_before_their_parents():
    recency = Recency()
    a = chain_in(recency, "a", 3)
    b = chain_in(recency, "b", 2)
    recency.add(b"fork", a[0], 1)
    assert list(recency.victims()) == [a[2], a[1], b[1], b[0], b"fork", a[0]]
    recency.use([b[0], b"unknown"])
    assert list(recency.victims()) == [a[2], a[1], b[1], b"fork", a[0], b[0]]
    recency.use([a[2], a[0]])
    assert list(recency.victims()) == [b[1], b"fork", b[0], a[2], a[1], a[0]]
    assert recency.tick_of(a[0]) == recency.tick_of(a[2])


@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(0, 9), st.integers(0, 9)),
            st.tuples(st.just("use"), st.integers(0, 9), st.integers(0, 9)),
            st.tuples(st.just("remove"), st.integers(0, 9), st.just(0)),
        )
    )
)
def test_recency_survives_saving(steps):
    """Order by (tick, depth) is the whole truth: it is what a catalog brings back."""
    recency = Recency()
    known: dict[bytes, tuple[bytes | None, int]] = {}
    for verb, left, right in steps:
        key, other = b"%d" % left, b"%d" % right
        if verb == "add" and key not in recency:
            parent = other if other in known and left != right else None
            known[key] = (parent, known[parent][1] + 1 if parent else 0)
            recency.add(key, *known[key])
        elif verb == "use":
            recency.use([key, other])
        elif verb == "remove" and key in recency:
            recency.remove(key)
            del known[key]
    order = list(recency.victims())
    assert sorted(order) == sorted(known)
    loaded = Recency()
    loaded.load((key, *known[key], recency.tick_of(key)) for key in sorted(known))
    position = {key: (recency.tick_of(key), -known[key][1]) for key in known}
    assert [position[key] for key in loaded.victims()] == [position[key] for key in order] == sorted(position.values())
    loaded.add(b"new", None, 0)
    assert list(loaded.victims())[-1] == b"new"


def test_recency_does_not_hang_on_a_ring_of_parents():
    recency = Recency()
    recency.load([(b"a", b"b", 1, 5), (b"b", b"a", 0, 6)])
    recency.use([b"a"])
    assert list(recency.victims()) == [b"a", b"b"]


def test_recency_says_what_moved():
    recency = Recency()
    keys = chain_in(recency, "a", 3)
    recency.add(b"b", None, 0)
    recency.take_moved()
    recency.use([keys[1]])
    recency.remove(keys[0])
    assert recency.take_moved() == [(keys[1], recency.tick_of(keys[1]))]
    assert recency.take_moved() == []


def test_recency_counts_pins():
    recency = Recency()
    recency.add(b"a", None, 0)
    recency.pin([b"a", b"a", b"later"])
    recency.add(b"later", None, 0)
    recency.unpin([b"a", b"unknown"])
    assert list(recency.victims()) == []
    recency.unpin([b"a", b"a", b"later"])
    assert list(recency.victims()) == [b"a", b"later"]


def test_reasons_are_bounded_and_the_latest_counts():
    reasons = Reasons()
    assert reasons.of(b"a") == "not_saved"
    reasons.note([b"a", b"b"], "evicted")
    reasons.note([b"a"], "corrupt")
    reasons.clear(b"b")
    assert (reasons.of(b"a"), reasons.of(b"b")) == ("corrupt", "not_saved")
    reasons.note((idx.to_bytes(4, "big") for idx in range(MAX_REASONS)), "deleted")
    assert reasons.of(b"a") == "not_saved"
    assert reasons.of(bytes(4)) == "deleted"


@pytest.mark.parametrize("num_threads", [1, 4])
def test_lanes_report_the_first_failure_and_finish_before_they_return(num_threads):
    lanes = Lanes(num_threads, "test")
    running = set()

    def job(idx: int) -> str | None:
        running.add(idx)
        time.sleep(0.001)
        running.remove(idx)
        return {7: "seven", 9: "nine"}.get(idx)

    for num_jobs, expected in ((0, (0, None)), (1, (1, None)), (7, (7, None)), (8, (7, "seven")), (40, (7, "seven"))):
        assert lanes.run(num_jobs, job) == expected
        assert not running
    lanes.close()
    assert lanes.run(40, job) == (7, "seven"), "closed lanes work on the calling thread"


def test_lanes_work_side_by_side():
    lanes = Lanes(4, "test")
    barrier = threading.Barrier(4, timeout=60)

    def job(idx: int) -> None:
        barrier.wait()

    assert lanes.run(4, job) == (4, None)
    lanes.close()


def test_lanes_take_a_raised_error_to_the_caller_as_no_success():
    lanes = Lanes(3, "test")

    def job(idx: int) -> None:
        if idx == 2:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        lanes.run(9, job)
    lanes.close()


@pytest.mark.parametrize("raising", [{0}, {1}, {0, 1}])
def test_lanes_raise_when_nobody_works_any_more(raising):
    """Whatever thread it was that raised first: the others still write to where the caller's bytes are."""
    lanes = Lanes(4, "test")
    running = set()
    for _ in range(20):
        barrier = threading.Barrier(4, timeout=60)

        def job(idx: int, barrier: threading.Barrier = barrier) -> None:
            running.add(idx)
            barrier.wait()
            if idx in raising:
                running.remove(idx)
                raise ZeroDivisionError
            time.sleep(0.005)
            running.remove(idx)

        with pytest.raises(ZeroDivisionError):
            lanes.run(4, job)
        assert not running
    lanes.close()


def test_single_reads_do_not_pay_the_threads():
    lanes = Lanes(4, "test")
    threads = set()
    for _ in range(20):
        lanes.run(1, lambda idx: threads.add(threading.get_ident()))
    assert threads == {threading.get_ident()}
    lanes.close()


@pytest.mark.parametrize("num_bytes", [0, 1, 32 << 10, 100_001])
@pytest.mark.parametrize("readonly", [True, False])
def test_copies(num_bytes, readonly):
    source = bytes(idx * 7 % 256 for idx in range(num_bytes))
    out = bytearray(num_bytes)
    copy_bytes(memoryview(out), memoryview(source if readonly else bytearray(source)))
    assert out == source
    with pytest.raises(ValueError, match="cannot copy"):
        copy_bytes(memoryview(bytearray(num_bytes + 1)), memoryview(source))


def test_a_pulse_beats_soon_and_again_after_a_failure(caplog):
    beats = []

    def beat() -> None:
        beats.append(time.monotonic())
        if len(beats) == 1:
            raise RuntimeError("first one fails")

    pulse = Pulse(beat, 0.02, "test-pulse")
    for num_beats in (1, 2):
        pulse.poke()
        wait_until(lambda num_beats=num_beats: len(beats) >= num_beats)
    pulse.stop()
    assert "test-pulse failed" in caplog.text
    pulse.stop()
    pulse.stop()
    pulse.poke(at_once=True)
    assert not pulse._thread.is_alive(), "nobody is left to beat"
    assert len(beats) == 2


@pytest.mark.parametrize("event", ["_wanted", "_at_once"])
def test_a_pulse_that_is_stopped_at_the_very_moment_of_a_beat_stops(event, monkeypatch):
    """Its poke may be swept away together with the one before."""
    pulse = Pulse(lambda: None, 0.0, "test-pulse")
    swept = getattr(pulse, event)
    clear = swept.clear

    def cleared_a_moment_late() -> None:
        pulse._stopped = True
        pulse.poke(at_once=True)
        clear()

    monkeypatch.setattr(swept, "clear", cleared_a_moment_late)
    pulse.poke()
    pulse._thread.join(30)
    assert not pulse._thread.is_alive()


def test_damage_in_dram_is_corrupt_once_then_gone():
    store = MemoryStore(10 * SPAN_BYTES)
    records = [make_record(idx) for idx in range(3)]
    for record in records:
        put(store, record)
    with store.held(records[1].span_id) as span:
        span.chunk(0)[3] ^= 0x40
    reads = [reads_of(record)[0] for record in records]
    assert store.get_into(reads) == ReadOutcome(num_ok=1, reason="corrupt")
    assert store.get_into(reads) == ReadOutcome(num_ok=1, reason="missing")
    assert store.stats().corrupt_chunks == 1
    assert store.why_missing(records[1].span_id) == "corrupt"
    assert put(store, records[1], writer=2)
    assert holds(store, records[1], writer=2)


def test_damage_in_what_is_lent_is_corrupt_once_then_gone():
    store = MemoryStore(3 * SPAN_BYTES)
    records = [make_record(idx) for idx in range(3)]
    for record in records:
        put(store, record)
    with store.held(records[1].span_id) as span:
        span.chunk(0)[3] ^= 0x40
    wanted = [wanted_of(record)[0] for record in records]
    borrowed = store.borrow(wanted)
    assert borrowed.outcome == ReadOutcome(num_ok=1, reason="corrupt")
    assert list(borrowed.chunks) == make_chunks(records[0])[:1]
    again = store.borrow(wanted)
    assert again.outcome == ReadOutcome(num_ok=1, reason="missing")
    assert store.stats().corrupt_chunks == 1 and store.why_missing(records[1].span_id) == "corrupt"
    borrowed.give_back()
    assert put(store, records[1])
    assert not put(store, make_record("four", chunk_bytes=2 * SPAN_BYTES)), "one span is lent still"
    again.give_back()
    assert put(store, make_record("four", num_chunks=1, chunk_bytes=3 * SPAN_BYTES)), "none is"


class _Pinned(PlainMemory):
    """Pinned up to a number of buffers."""

    def __init__(self, num_pinned: int) -> None:
        self._num_pinned = num_pinned
        self.made: list[memoryview] = []

    def new_buffer(self, num_bytes: int) -> memoryview:
        self.made.append(super().new_buffer(num_bytes))
        return self.made[-1]

    def is_pinned(self, buffer: memoryview) -> bool:
        return any(buffer is one for one in self.made[: self._num_pinned])


def test_spans_lie_in_the_memory_that_was_given_and_are_lent_as_pinned_only_if_all_are():
    memory = _Pinned(2)
    store = MemoryStore(10 * SPAN_BYTES, memory=memory)
    records = [make_record(idx) for idx in range(3)]
    for record in records:
        put(store, record)
    assert len(memory.made) == 3
    first, second, third = (wanted_of(record) for record in records)
    borrowed = store.borrow([*first, *second], must_be_pinned=True)
    assert list(borrowed.chunks) == [*make_chunks(records[0]), *make_chunks(records[1])]
    assert bytes(memory.made[0][:CHUNK_BYTES]) == make_chunks(records[0])[0]
    borrowed.give_back()
    assert store.borrow([*first, *third], must_be_pinned=True) is None
    store.borrow([*first, *third]).give_back()
    store.delete([record.span_id for record in records])
    assert store._lent_bytes == 0 and not store._order._pins
    for idx in range(10, 20):
        assert put(store, make_record(idx))


def test_memory_is_used_again_but_never_under_a_holder():
    store = MemoryStore(3 * SPAN_BYTES)
    held = make_record("held")
    put(store, held)
    with store.held(held.span_id) as span:
        for idx in range(9):
            put(store, make_record(idx))
        assert store.find(held.span_id) is None
        assert [span.chunk(chunk_idx) for chunk_idx in range(3)] == make_chunks(held)
        with store.held(make_id("unknown")) as nothing:
            assert nothing is None
    with store.held(make_record(8).span_id) as span:
        buffer = span.buffer
    for idx in range(20, 23):
        put(store, make_record(idx))
    spans = []
    for idx in range(20, 23):
        with store.held(make_record(idx).span_id) as span:
            spans.append(span)
    assert any(span.buffer is buffer for span in spans)
    assert all(holds(store, make_record(idx)) for idx in range(20, 23))


@given(
    sizes=st.lists(st.sampled_from([100, 5000, 9000]), max_size=30), deletions=st.lists(st.integers(0, 29), max_size=9)
)
def test_memory_in_use_and_spare_is_bounded(sizes, deletions):
    store = MemoryStore(60_000)
    for idx, size in enumerate(sizes):
        record = make_record(idx, chunk_bytes=size)
        assert put(store, record)
        assert store.stats().num_bytes + store._spare.num_bytes <= 60_000
        assert holds(store, record)
        if idx in deletions:
            store.delete([record.span_id])
            assert store._spare.num_bytes == 0
    store.close()


def test_no_memory_is_a_drop(monkeypatch):
    store = MemoryStore(10 * SPAN_BYTES)

    def exhausted(record, chunks, buffer):
        raise MemoryError

    monkeypatch.setattr("mii_hcache.storage.memory._copy_in", exhausted)
    assert not put(store, make_record("a"))
    monkeypatch.undo()
    assert store.stats().dropped_spans == 1
    assert all(put(store, make_record(idx)) for idx in range(10))
    assert store.stats().num_spans == 10, "nothing stays reserved"


@pytest.mark.parametrize("capacity_bytes", [0, -1])
def test_a_file_store_needs_capacity(tmp_path, capacity_bytes):
    with pytest.raises(ConfigError, match="capacity_bytes must be > 0"):
        open_state(tmp_path, capacity_bytes, 0)
    open_state(tmp_path, 1 << 20, 0).close()  # and the directory was released


def test_open_state_without_a_directory_lives_in_dram():
    state = open_state(None, 1 << 20, 10 * SPAN_BYTES)
    assert type(state.store) is MemoryStore
    assert state.state_dir is None
    put(state.store, make_record("a"))
    state.transcripts.remember(b"", "ab", [1])
    assert holds(state.store, make_record("a"))
    state.close()
    state.close()


@pytest.mark.parametrize(("dram_capacity_bytes", "kind"), [(0, FileStore), (4 * SPAN_BYTES, TieredStore)])
def test_open_state_keeps_all_over_a_restart_and_notes_damage(tmp_path, dram_capacity_bytes, kind):
    def opened():
        return open_state(tmp_path / "new" / "state", 1 << 20, dram_capacity_bytes)

    state = opened()
    assert type(state.store) is kind
    assert state.notes == []
    put(state.store, make_record("a"))
    state.transcripts.remember(b"t", "ab", [1, 2])
    with pytest.raises(StateDirBusyError):
        opened()
    state.close()
    state.close()
    state = opened()
    assert holds(state.store, make_record("a"))
    assert state.transcripts.longest_prefix(b"t", "abc") == (2, [1, 2])
    state.close()
    for name in ("catalog", "transcripts"):
        connection = sqlite3.connect(tmp_path / "new" / "state" / f"{name}.sqlite")
        connection.execute("PRAGMA user_version = 99")
        connection.close()
    state = opened()
    assert [note.split()[0] for note in state.notes] == ["catalog.sqlite", "transcripts.sqlite"]
    assert all("set aside as" in note and "format version 99" in note for note in state.notes)
    state.close()


def test_threads_end_with_the_store(tmp_path):
    before = set(threading.enumerate())
    state = open_state(tmp_path, 1 << 20, 4 * SPAN_BYTES)
    for idx in range(6):
        put(state.store, make_record(idx))
    for idx in range(6):
        holds(state.store, make_record(idx))
    assert set(threading.enumerate()) - before
    state.close()
    wait_until(lambda: set(threading.enumerate()) <= before)  # a thread that has done its last is seen a moment longer
