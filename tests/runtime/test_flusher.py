"""Snapshots become spans in order, their memory is given back once, and nothing that goes wrong stays pending."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind
from mii_hcache.runtime import flusher as flusher_module
from mii_hcache.runtime.flusher import Flusher
from mii_hcache.runtime.snapshot import RowCopy, Snapshot, SpanPut
from mii_hcache.runtime.stats import Counters
from mii_hcache.runtime.track import OpenSpan
from mii_hcache.storage.records import SpanRecord
from tests.runtime.kit import (
    GIVE_UP_S,
    SCATTERS,
    FakeStore,
    geometry_of,
    path,
    scatter_named,
    span_record,
    wait_until,
)

GEOMETRY = geometry_of()
LAYERS = len(GEOMETRY.saved_layers(ChunkKind.HIDDEN))

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


class Releases:
    """Counts calls, and scribbles over the memory that was given back."""

    def __init__(self, memory: torch.Tensor | None = None) -> None:
        self.num_calls = 0
        self._memory = memory
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:  # several threads put
            self.num_calls += 1
        if self._memory is not None:
            self._memory.fill_(float("nan"))


class _FailingEvent:
    def synchronize(self) -> None:
        raise RuntimeError("the copy failed")


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
def counters() -> Counters:
    return Counters()


@pytest.fixture(params=SCATTERS)
def flusher(store, counters, monkeypatch, request):
    monkeypatch.setattr(flusher_module, "MAX_WAITING_PUTS", 2)
    flusher = Flusher(store=store, counters=counters, num_threads=1, scatter=scatter_named(request.param))
    yield flusher
    store.put_gate.set()
    flusher.stop()


def _record(branch: int) -> SpanRecord:
    return span_record(path(branch, 0, SPAN_TOKENS), ChunkKind.HIDDEN, GEOMETRY)


def _rows(value: float, num_rows: int = SPAN_TOKENS) -> torch.Tensor:
    return torch.full((LAYERS, num_rows, GEOMETRY.hidden_size), float(value))


def _whole(branch: int, rows: torch.Tensor | None = None) -> SpanPut:
    return SpanPut(record=_record(branch), rows=list(_rows(branch) if rows is None else rows))


def _stored(store: FakeStore, put: SpanPut) -> torch.Tensor:
    """What the store holds of a span: `[LAYERS, SPAN_TOKENS, hidden_size]`."""
    chunks = store.spans[put.record.span_id][1]
    return torch.stack([torch.frombuffer(bytearray(chunk), dtype=torch.float32) for chunk in chunks]).view(
        LAYERS, SPAN_TOKENS, -1
    )


def test_rows_of_several_snapshots_become_a_span(flusher, store, counters):
    span = OpenSpan(span_idx=0, rows=_rows(float("nan")))
    given_back = Releases(span.rows)
    put = SpanPut(record=_record(1), rows=list(span.rows), releases=[given_back])
    for start, stop in ((0, 10), (10, 63), (63, 64)):
        source = torch.arange(start, stop, dtype=torch.float32).view(1, -1, 1).expand(LAYERS, -1, 4).contiguous()
        completes = put if stop == SPAN_TOKENS else None
        copy = RowCopy(source=source, target=span, span_row=start, completes=completes)
        flusher.submit(Snapshot(copies=[copy], release=Releases(source)))
    assert flusher.drain(GIVE_UP_S)
    assert torch.equal(_stored(store, put)[1, :, 2], torch.arange(64.0))
    assert store.spans[put.record.span_id][0] == put.record
    assert given_back.num_calls == 1
    assert counters.snapshot() == {"saved_spans_total": 1, "saved_bytes_total": put.record.num_bytes}


def test_a_later_snapshot_overwrites_an_earlier_one(flusher, store):
    """A truncated sequence writes the same rows again."""
    span = OpenSpan(span_idx=0, rows=_rows(float("nan")))
    put = SpanPut(record=_record(1), rows=list(span.rows))
    store.put_gate.clear()
    for branch in range(2, 6):
        flusher.submit(Snapshot(whole=[_whole(branch)]))  # the scattering thread comes to a stop
    for value in range(100):
        flusher.submit(Snapshot(copies=[RowCopy(source=_rows(value, 63), target=span, span_row=0)]))
    flusher.submit(Snapshot(copies=[RowCopy(source=_rows(7, 1), target=span, span_row=63, completes=put)]))
    store.put_gate.set()
    assert flusher.drain(GIVE_UP_S)
    assert (_stored(store, put)[:, :63] == 99).all() and (_stored(store, put)[:, 63] == 7).all()


def test_memory_of_a_snapshot_is_given_back_once_after_its_last_span_was_put(flusher, store):
    memory = _rows(0, 3 * SPAN_TOKENS)
    puts = []
    for idx in range(3):
        rows = memory[:, idx * SPAN_TOKENS : (idx + 1) * SPAN_TOKENS]
        rows.fill_(idx + 1)
        puts.append(_whole(idx + 1, rows))
    span = OpenSpan(span_idx=0, rows=_rows(float("nan")))
    copy = RowCopy(source=memory[:, :5], target=span, span_row=0)
    given_back = Releases(memory)
    store.put_gate.clear()
    flusher.submit(Snapshot(whole=puts, copies=[copy], release=given_back))
    wait_until(lambda: len(store.puts) == 1)
    assert given_back.num_calls == 0
    store.put_gate.set()
    assert flusher.drain(GIVE_UP_S)
    assert given_back.num_calls == 1
    for idx, put in enumerate(puts):
        assert (_stored(store, put) == idx + 1).all()
    assert (span.rows[:, :5] == 1).all()


def test_memory_is_given_back_without_waiting_for_the_store_when_no_span_lies_in_it(flusher, store):
    store.put_gate.clear()
    flusher.submit(Snapshot(whole=[_whole(1)]))
    wait_until(lambda: store.puts != [])
    given_back = Releases()
    flusher.submit(Snapshot(release=given_back))
    wait_until(lambda: given_back.num_calls == 1)


def test_discards_come_after_the_copies_of_earlier_snapshots(flusher, store):
    """A buffer that is given back too early is written by its next owner and by us."""
    store.put_gate.clear()
    for branch in range(1, 5):
        flusher.submit(Snapshot(whole=[_whole(branch)]))
    span = OpenSpan(span_idx=0, rows=_rows(0))
    flusher.submit(Snapshot(copies=[RowCopy(source=_rows(5, 5), target=span, span_row=0)]))
    discarded = Releases(span.rows)
    flusher.submit(Snapshot(discard=[discarded]))
    time.sleep(0.02)
    assert discarded.num_calls == 0
    store.put_gate.set()
    assert flusher.drain(GIVE_UP_S)
    assert discarded.num_calls == 1 and span.rows.isnan().all()


def test_spans_are_pending_from_submission_until_they_can_be_found(flusher, store):
    put, other = _whole(1), _whole(2)
    span_id, other_id = put.record.span_id, other.record.span_id
    store.put_gate.clear()
    flusher.submit(Snapshot(whole=[put]))
    assert flusher.is_pending([other_id, span_id]) and not flusher.is_pending([other_id]) and not flusher.is_pending([])
    assert flusher.num_pending == 1
    threading.Timer(0.02, store.put_gate.set).start()
    while flusher.is_pending([span_id]):
        time.sleep(0)
    assert store.find(span_id) is not None
    assert flusher.num_pending == 0
    assert flusher.drain(GIVE_UP_S)  # the scattering thread may not have seen yet that it is done
    assert flusher.drain(0)


def test_a_span_that_was_submitted_twice_is_pending_until_both_are_done(flusher, store):
    """Two sequences with the same history."""
    put, last = _whole(1), _whole(2)
    steps = threading.Semaphore(0)
    take = store.put
    store.put = lambda *args: steps.acquire(timeout=GIVE_UP_S) and take(*args)
    flusher.submit(Snapshot(whole=[put, put, last]))
    steps.release()
    wait_until(lambda: len(store.puts) == 1)
    time.sleep(0.01)
    assert flusher.is_pending([put.record.span_id])
    steps.release(2)
    assert flusher.drain(GIVE_UP_S)
    assert len(store.puts) == 3 and flusher.num_pending == 0


def test_what_waits_for_the_store_is_bounded(flusher, store):
    store.put_gate.clear()
    passed = Releases()
    for branch in range(1, 11):
        flusher.submit(Snapshot(whole=[_whole(branch)], discard=[passed]))
    wait_until(lambda: passed.num_calls == 3)  # one in the store, two waiting; the fourth holds up its snapshot
    time.sleep(0.03)
    assert passed.num_calls == 3
    assert flusher.num_pending == 10
    store.put_gate.set()
    assert flusher.drain(GIVE_UP_S)
    assert passed.num_calls == 10 and len(store.spans) == 10


def test_drain_gives_up_in_time_and_waits_when_told_to(flusher, store):
    assert flusher.drain(0)
    store.put_gate.clear()
    flusher.submit(Snapshot(whole=[_whole(1)]))
    started_s = time.monotonic()
    assert not flusher.drain(0.05)
    assert time.monotonic() - started_s >= 0.05
    threading.Timer(0.05, store.put_gate.set).start()
    assert flusher.drain()
    assert len(store.spans) == 1


def test_drain_waits_for_copies_too(flusher, store):
    store.put_gate.clear()
    for branch in range(1, 5):
        flusher.submit(Snapshot(whole=[_whole(branch)]))
    given_back = Releases()
    flusher.submit(Snapshot(release=given_back))
    store.put_gate.set()
    assert flusher.drain(GIVE_UP_S)
    assert given_back.num_calls == 1


def test_several_threads_put_at_the_same_time(store, counters):
    flusher = Flusher(store=store, counters=counters, num_threads=3)
    store.put_gate.clear()
    flusher.submit(Snapshot(whole=[_whole(branch) for branch in range(1, 6)]))
    wait_until(lambda: len(store.puts) == 3)
    store.put_gate.set()
    flusher.stop()
    assert len(store.spans) == 5


def test_stop_drains_and_ends_the_threads(store, counters):
    before = set(threading.enumerate())
    flusher = Flusher(store=store, counters=counters, num_threads=2)
    threads = {thread for thread in set(threading.enumerate()) - before if thread.name.startswith("hcache-")}
    assert len(threads) == 3
    store.put_gate.clear()
    given_back = Releases()
    for branch in range(1, 100):
        flusher.submit(Snapshot(whole=[_whole(branch)], release=given_back))
    threading.Timer(0.02, store.put_gate.set).start()
    flusher.stop()
    assert len(store.spans) == given_back.num_calls == 99
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize(("mode", "counter"), [("full", "dropped_spans_total"), ("broken", "save_errors_total")])
def test_a_store_that_takes_nothing_costs_the_spans_and_nothing_else(flusher, store, counters, mode, counter):
    store.mode = mode
    given_back, buffer_back = Releases(), Releases()
    span = OpenSpan(span_idx=0, rows=_rows(0))
    completes = SpanPut(record=_record(2), rows=list(span.rows), releases=[buffer_back])
    copy = RowCopy(source=_rows(1), target=span, span_row=0, completes=completes)
    flusher.submit(Snapshot(whole=[_whole(1)], copies=[copy], release=given_back))
    assert flusher.drain(GIVE_UP_S)
    assert (given_back.num_calls, buffer_back.num_calls) == (1, 1)
    assert flusher.num_pending == 0 and store.spans == {}
    assert counters.snapshot() == {counter: 2}
    store.mode = "ok"
    flusher.submit(Snapshot(whole=[_whole(1)]))
    assert flusher.drain(GIVE_UP_S)
    assert len(store.spans) == 1


def _broken_snapshots() -> dict[str, Snapshot]:
    good = OpenSpan(span_idx=0, rows=_rows(0))
    completes = SpanPut(record=_record(3), rows=list(good.rows), releases=[Releases()])
    return {
        "event": Snapshot(
            ready=[_FailingEvent()],
            copies=[RowCopy(source=_rows(1), target=good, span_row=0, completes=completes)],
        ),
        "copy": Snapshot(
            copies=[
                RowCopy(source=_rows(1, 2), target=OpenSpan(span_idx=0, rows=_rows(0)), span_row=63),
                RowCopy(source=_rows(1), target=good, span_row=0, completes=completes),
            ],
        ),
    }


@pytest.mark.parametrize("broken", ["event", "copy"])
def test_a_snapshot_that_fails_gives_everything_back(flusher, store, counters, broken):
    """A ring gives rows out in order: one lease that never comes back ends all saving."""
    snapshot = _broken_snapshots()[broken]
    snapshot.whole = [_whole(1), _whole(2)]
    given_back, discarded = Releases(), Releases()
    snapshot.release = given_back
    snapshot.discard = [discarded]
    flusher.submit(snapshot)
    assert flusher.drain(GIVE_UP_S)
    assert (given_back.num_calls, discarded.num_calls) == (1, 1)
    buffer_back = snapshot.copies[-1].completes.releases[0]
    assert buffer_back.num_calls == 1
    assert flusher.num_pending == 0 and store.puts == []
    assert counters.snapshot() == {"save_errors_total": 1, "dropped_spans_total": 3}
    flusher.submit(Snapshot(whole=[_whole(1)]))
    assert flusher.drain(GIVE_UP_S)
    assert len(store.spans) == 1


@pytest.mark.parametrize("broken", ["event", "copy"])
def test_a_span_that_misses_rows_of_a_failed_snapshot_is_never_put(flusher, store, counters, broken):
    snapshot = _broken_snapshots()[broken]
    span = OpenSpan(span_idx=0, rows=_rows(0))
    snapshot.copies.append(RowCopy(source=_rows(1, 63), target=span, span_row=0))
    flusher.submit(snapshot)
    buffer_back = Releases()
    put = SpanPut(record=_record(1), rows=list(span.rows), releases=[buffer_back])
    flusher.submit(Snapshot(copies=[RowCopy(source=_rows(1, 1), target=span, span_row=63, completes=put)]))
    assert flusher.drain(GIVE_UP_S)
    assert store.puts == [] and flusher.num_pending == 0
    assert buffer_back.num_calls == 1
    assert counters.get("save_errors_total") == 1
