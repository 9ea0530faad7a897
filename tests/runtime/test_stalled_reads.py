"""Reads that hang: the restore goes on without them, and whatever they hold is given back when they end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

import pytest

from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind
from mii_hcache.core.identity import SpanId
from mii_hcache.runtime.pieces import HOST
from mii_hcache.runtime.restore import Restore
from mii_hcache.runtime.tiles import TileRead
from mii_hcache.storage.records import ChunkRead, ReadOutcome, SpanRecord
from tests.runtime.kit import GIVE_UP_S, FakeStore, wait_until
from tests.runtime.test_restorer import Bench, _run

HIDDEN, KV = ChunkKind.HIDDEN, ChunkKind.KV
DEADLINE_S = 0.2


class HangingStore(FakeStore):
    """A store whose reads of some spans hang; a moment later it says so."""

    def __init__(self) -> None:
        super().__init__()
        self.stuck: set[SpanId] = set()
        self.answer = threading.Event()
        self.says_so = True
        self.hanging: list[tuple[SpanId, int]] = []
        """First chunk of each read that hangs, or did."""
        self._known: set[SpanId] = set()

    def get_into(self, reads: Sequence[ChunkRead]) -> ReadOutcome:
        for idx, read in enumerate(reads):
            if read.span_id in self._known:  # away by now
                head = super().get_into(reads[:idx])
                return head if head.reason is not None else ReadOutcome(num_ok=idx, reason="unavailable")
        hangs = [read.span_id for read in reads if read.span_id in self.stuck]
        if hangs and not self.answer.is_set():
            if self.says_so:
                self._known.update(self.stuck)
            self.hanging.append((reads[0].span_id, reads[0].layer_idx))
            assert self.answer.wait(GIVE_UP_S)
        return super().get_into(reads)

    def find(self, span_id: SpanId) -> SpanRecord | None:
        return None if span_id in self._known else super().find(span_id)


@pytest.fixture
def bench(monkeypatch) -> Iterator[Bench]:
    """Time passes for the reads that hang; others may take as long as a busy machine likes."""
    monkeypatch.setattr("tests.runtime.test_restorer.FakeStore", HangingStore)
    bench = Bench(tile_spans=4, read_deadline_s=DEADLINE_S)
    is_overdue = Restore._is_overdue

    def hangs(restore: Restore, read: TileRead) -> bool:
        first = restore._span_ids[read.tile.first_span], read.tile.layer_idx
        return first in bench.store.hanging and is_overdue(restore, read)

    monkeypatch.setattr(Restore, "_is_overdue", hangs)
    yield bench
    bench.store.answer.set()
    bench.restorer.stop()


@pytest.mark.parametrize("kinds", [[HIDDEN] * 8, [KV] * 8, [HIDDEN, KV] * 4])
@pytest.mark.parametrize("first_bad", [0, 2, 5, 7])
def test_the_prefix_before_the_first_span_that_hangs_comes_back(bench, kinds, first_bad):
    restore, target = bench.start(kinds)
    ids = list(bench.store.spans)
    bench.store.stuck = {ids[first_bad], ids[-1]}
    started_s = time.monotonic()
    outcome = _run(restore, 0.05)
    assert time.monotonic() - started_s < GIVE_UP_S / 2
    assert [outcome.num_tokens] == [first_bad * SPAN_TOKENS] == target.committed
    assert outcome.cut_reason in ("stalled", "unavailable")
    bench.check(target, kinds, first_bad)
    assert len(bench.store.spans) == 8, "nothing is forgotten"
    assert bench.restorer.buffers.num_in_use > 0, "what hangs keeps its memory"
    bench.store.answer.set()
    bench.check_all_is_given_back()


def test_a_store_that_does_not_say_which_spans_hang_costs_the_tile(bench):
    bench.store.says_so = False
    kinds = [HIDDEN] * 8
    restore, target = bench.start(kinds)
    ids = list(bench.store.spans)
    bench.store.stuck = {ids[6]}
    outcome = _run(restore)
    assert (outcome.num_tokens, outcome.cut_reason) == (4 * SPAN_TOKENS, "stalled")
    bench.check(target, kinds, 4)
    bench.store.answer.set()
    bench.check_all_is_given_back()


def test_other_restores_go_on_beside_reads_that_hang(bench):
    stuck, _ = bench.start([KV] * 8)
    bench.store.stuck = set(bench.store.spans)
    bench.store.says_so = False
    stuck.read_ahead()
    for branch in (2, 3):
        restore, target = bench.start([HIDDEN] * 4, branch=branch)
        stop_s = time.monotonic() + GIVE_UP_S
        outcome = None
        while outcome is None and time.monotonic() < stop_s:
            stuck_outcome = stuck.step(0.001, wait=False) if stuck._is_open else None
            assert stuck_outcome is None or stuck_outcome.num_tokens == 0
            outcome = restore.step(0.01, wait=True)
        assert outcome is not None and outcome.num_tokens == 4 * SPAN_TOKENS
        bench.check(target, [HIDDEN] * 4, 4, branch=branch)
    bench.store.answer.set()
    bench.check_all_is_given_back()


def test_cancelled_restores_leave_no_reader_behind(bench):
    bench.store.says_so = False
    for branch in range(1, 5):
        restore, _ = bench.start([KV] * 4, branch=branch)
        bench.store.stuck = set(bench.store.spans)
        restore.read_ahead()
        wait_until(lambda: len(bench.store.hanging) >= branch)  # noqa: B023, waited for in this turn
        restore.cancel()
    bench.store.stuck = set()
    restore, target = bench.start([HIDDEN] * 4, branch=6)
    assert _run(restore).num_tokens == 4 * SPAN_TOKENS
    bench.check(target, [HIDDEN] * 4, 4, branch=6)
    assert bench.restorer.buffers.num_in_use >= HOST.least_ahead
    bench.store.answer.set()
    bench.check_all_is_given_back()


def test_stopping_does_not_wait_for_what_hangs(bench, monkeypatch):
    monkeypatch.setattr("mii_hcache.runtime.restorer.STOP_S", 0.1)
    restore, _ = bench.start([KV] * 4)
    bench.store.stuck = set(bench.store.spans)
    restore.read_ahead()
    wait_until(lambda: bench.store.hanging)
    restore.cancel()
    started_s = time.monotonic()
    bench.restorer.stop()
    assert time.monotonic() - started_s < GIVE_UP_S / 2
    assert bench.store.lent, "memory that is being read into stays the store's"
    bench.store.answer.set()
    wait_until(lambda: bench.restorer.buffers.num_in_use == 0)
