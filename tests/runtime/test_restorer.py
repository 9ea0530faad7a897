"""A restore writes every row of the prefix exactly, commits once, and gives everything back however it ends."""

from __future__ import annotations

import random
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind
from mii_hcache.runtime.pieces import HOST
from mii_hcache.runtime.restore import Restore, RestoreOutcome
from mii_hcache.runtime.restorer import Restorer
from mii_hcache.runtime.stats import Counters
from mii_hcache.storage.records import ReadOutcome
from tests.runtime.kit import (
    GIVE_UP_S,
    FakeBlocks,
    FakeEngine,
    FakeStore,
    address_of,
    geometry_of,
    history_hashes,
    open_restorer,
    path,
    rows_of,
    wait_until,
)

GEOMETRY = geometry_of()
HIDDEN, KV = ChunkKind.HIDDEN, ChunkKind.KV
TOKENS = path(1, 0, 9 * SPAN_TOKENS)

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")

kinds_of_spans = st.lists(st.sampled_from(ChunkKind), max_size=8)


class Bench:
    """A restorer with what is around it."""

    def __init__(self, tile_spans: int = 2, dtype: str = "float32", **settings: int) -> None:
        self.engine = FakeEngine(geometry_of(dtype=dtype))
        self.store = FakeStore()
        self.counters = Counters()
        self.restorer: Restorer = open_restorer(
            self.engine, self.store, counters=self.counters, tile_spans=tile_spans, **settings
        )

    def start(self, kinds: list[ChunkKind], branch: int = 1) -> tuple[Restore, FakeBlocks]:
        """A restore of saved spans of a branch."""
        tokens = path(branch, 0, 9 * SPAN_TOKENS)
        records = self.store.add(tokens, kinds, self.engine.geometry)
        target = FakeBlocks(self.engine)
        return self.restorer.start(target, records, tokens), target

    def check(self, target: FakeBlocks, kinds: list[ChunkKind], num_spans: int, branch: int = 1) -> None:
        """The first spans are written, each row once; no row anywhere is wrong."""
        geometry = self.engine.geometry
        tokens = path(branch, 0, len(kinds) * SPAN_TOKENS)
        hashes = history_hashes(tokens)
        expected = {}
        for layer in range(geometry.num_layers):
            rows = {kind: rows_of(hashes, kind, layer, geometry).tolist() for kind in ChunkKind} if tokens else {}
            for position, token in enumerate(tokens):
                kind = kinds[position // SPAN_TOKENS]
                if kind is HIDDEN and layer == 0:
                    expected[layer, position] = "tokens", [token]
                else:
                    expected[layer, position] = kind.value, rows[kind][position]
        for place, row in target.written.items():
            assert row == expected[place], f"wrong row at (layer, position) {place}"
        for layer, position in expected:
            if position < num_spans * SPAN_TOKENS:
                assert target.num_writes[layer, position] == 1, f"layer {layer}, position {position}"

    def check_all_is_given_back(self) -> None:
        wait_until(lambda: self.restorer.buffers.num_in_use == 0)
        assert self.store.num_pins == self.store.num_unpins
        assert not +self.store.pins


@pytest.fixture
def bench():
    bench = Bench()
    yield bench
    bench.store.read_gate.set()
    bench.restorer.stop()


def _run(restore: Restore, budget_s: float = GIVE_UP_S) -> RestoreOutcome:
    deadline = time.monotonic() + GIVE_UP_S
    while time.monotonic() < deadline:
        outcome = restore.step(budget_s, wait=True)
        if outcome is not None:
            return outcome
    pytest.fail("a restore without end")


def _wait_for_work(restore: Restore) -> None:
    restore.read_ahead()
    wait_until(lambda: restore.can_work)


def _layers_of(kind: ChunkKind) -> range:
    return GEOMETRY.saved_layers(kind)


# --- what arrives ----------------------------------------------------------------------------------------------------


@given(kinds=kinds_of_spans, tile_spans=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_row_arrives_in_its_place(kinds, tile_spans, seed):
    """Reads come late and out of order."""
    bench, chooser = Bench(tile_spans), random.Random(seed)
    bench.store.read_delays = iter(lambda: chooser.choice([0, 0, 0.0005, 0.003]), None)
    restore, target = bench.start(kinds)
    assert bench.store.num_unpins == 0 and target.committed == []
    outcome = _run(restore)
    bench.check(target, kinds, len(kinds))
    assert target.committed == [outcome.num_tokens] == [len(kinds) * SPAN_TOKENS]
    assert outcome.cut_reason is None
    assert outcome.kinds == sorted({kind.value for kind in kinds})
    assert outcome.tiers == (["fake"] if kinds else [])
    assert outcome.read_bytes == sum(GEOMETRY.span_bytes(kind) for kind in kinds)
    layers = [layer for layer, _, _ in target.writes if layer > 0]
    assert layers == sorted(layers)
    assert all(num_tokens <= tile_spans * SPAN_TOKENS for _, _, num_tokens in target.writes)
    assert bench.store.touched == [record.span_id for record, _ in bench.store.spans.values()]
    bench.check_all_is_given_back()
    bench.restorer.stop()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_keep_their_dtype(dtype):
    bench = Bench(dtype=dtype)
    restore, target = bench.start([HIDDEN, KV, KV])
    assert _run(restore).num_tokens == 3 * SPAN_TOKENS
    assert len(target.written) == 3 * GEOMETRY.num_layers * SPAN_TOKENS
    geometry = bench.engine.geometry
    hashes = history_hashes(TOKENS[: 3 * SPAN_TOKENS])
    assert target.written[1, 5] == ("hidden", rows_of(hashes, HIDDEN, 1, geometry)[5].tolist())
    assert target.written[2, 100] == ("kv", rows_of(hashes, KV, 2, geometry)[100].tolist())
    bench.restorer.stop()


def test_a_tile_is_a_run_of_one_kind(bench):
    restore, target = bench.start([HIDDEN, HIDDEN, HIDDEN, KV, HIDDEN])
    _run(restore)
    for layer in range(GEOMETRY.num_layers):
        pieces = [(start // SPAN_TOKENS, num // SPAN_TOKENS) for at, start, num in target.writes if at == layer]
        assert sorted(pieces) == [(0, 2), (2, 1), (3, 1), (4, 1)]
    assert len(target.writes) == 4 * GEOMETRY.num_layers


def test_the_next_reads_are_in_flight_while_a_tile_is_written(bench, monkeypatch):
    restore, target = bench.start([HIDDEN] * 2)
    next_span = next(iter(bench.store.spans))

    def project_hidden(layer_idx, start, hidden):
        if layer_idx == 1:
            wait_until(lambda: (next_span, 2) in bench.store.reads)

    monkeypatch.setattr(target, "project_hidden", project_hidden)
    assert _run(restore).num_tokens == 2 * SPAN_TOKENS


def test_reads_ahead_are_bounded():
    bench = Bench(read_ahead_bytes=1)
    bench.store.read_gate.clear()
    restore, _ = bench.start([KV] * 8)
    for _ in range(20):
        assert restore.step(1.0, wait=False) is None
    wait_until(lambda: len(bench.store.reads) == HOST.least_ahead * 2)
    for _ in range(20):
        assert restore.step(1.0, wait=False) is None
    time.sleep(0.02)
    assert bench.restorer.buffers.num_in_use == HOST.least_ahead
    assert len(bench.store.reads) == HOST.least_ahead * 2
    bench.store.read_gate.set()
    assert _run(restore).num_tokens == 8 * SPAN_TOKENS
    bench.restorer.stop()


def test_two_restores_take_turns(bench):
    restores = [bench.start([HIDDEN, KV, HIDDEN], branch=branch) for branch in (1, 2)]
    outcomes: list[RestoreOutcome | None] = [None, None]
    while None in outcomes:
        for idx, (restore, _) in enumerate(restores):
            if outcomes[idx] is None:
                outcomes[idx] = restore.step(0.0, wait=False)
    for branch, (_, target) in enumerate(restores, start=1):
        bench.check(target, [HIDDEN, KV, HIDDEN], 3, branch=branch)
        assert target.committed == [3 * SPAN_TOKENS]
    bench.check_all_is_given_back()


# --- damage ----------------------------------------------------------------------------------------------------------


@given(
    kinds=st.lists(st.sampled_from(ChunkKind), min_size=1, max_size=6),
    tile_spans=st.integers(1, 4),
    damage=st.dictionaries(
        st.tuples(st.integers(0, 5), st.integers(0, GEOMETRY.num_layers - 1)),
        st.sampled_from(["corrupt", "missing"]),
        max_size=4,
    ),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_damage_cuts_the_prefix_at_its_span(kinds, tile_spans, damage, seed):
    bench, chooser = Bench(tile_spans), random.Random(seed)
    bench.store.read_delays = iter(lambda: chooser.choice([0, 0, 0, 0.001]), None)
    restore, target = bench.start(kinds)
    ids = list(bench.store.spans)
    stored = {
        (span, layer): reason
        for (span, layer), reason in damage.items()
        if span < len(kinds) and layer in _layers_of(kinds[span])
    }
    bench.store.damage = {(ids[span], layer): reason for (span, layer), reason in stored.items()}
    outcome = _run(restore)
    first_bad, layer = min(stored, default=(len(kinds), 0))
    assert outcome.num_tokens == first_bad * SPAN_TOKENS
    assert outcome.cut_reason == stored.get((first_bad, layer))
    assert target.committed == [outcome.num_tokens]
    bench.check(target, kinds, first_bad)
    assert outcome.kinds == sorted({kind.value for kind in kinds[:first_bad]})
    assert bool(bench.counters.get("restore_cuts_total")) == bool(stored)
    bench.check_all_is_given_back()
    bench.restorer.stop()


@pytest.mark.parametrize("layer", range(GEOMETRY.num_layers))
@pytest.mark.parametrize("span", range(5))
def test_damage_at_each_place(bench, span, layer):
    kinds = [KV] * 5
    restore, target = bench.start(kinds)
    bench.store.damage = {(list(bench.store.spans)[span], layer): "corrupt"}
    outcome = _run(restore)
    assert (outcome.num_tokens, outcome.cut_reason) == (span * SPAN_TOKENS, "corrupt")
    assert target.committed == [span * SPAN_TOKENS]
    bench.check(target, kinds, span)
    assert bench.counters.get("restore_cuts_total") == 1


@pytest.mark.parametrize("span", [0, 2])
def test_a_span_that_is_gone_cuts_the_prefix(bench, span):
    restore, target = bench.start([HIDDEN] * 4)
    bench.store.delete([list(bench.store.spans)[span]])
    outcome = _run(restore)
    assert (outcome.num_tokens, outcome.cut_reason) == (span * SPAN_TOKENS, "missing")
    bench.check(target, [HIDDEN] * 4, span)


@pytest.mark.parametrize(("planned", "now"), [(HIDDEN, KV), (KV, HIDDEN)])
def test_a_span_that_was_saved_anew_in_another_kind_is_missing(bench, planned, now):
    """Chunks of both kinds are equally long here, as in many models with half as many KV heads."""
    kinds = [planned] * 3
    restore, target = bench.start(kinds)
    bench.store.add(TOKENS, [planned, now], GEOMETRY)
    outcome = _run(restore)
    assert (outcome.num_tokens, outcome.cut_reason) == (SPAN_TOKENS, "missing")
    bench.check(target, kinds, 1)


def test_tiers_and_kinds_are_those_of_what_was_brought_back(bench):
    restore, _ = bench.start([HIDDEN, KV])
    first, second = bench.store.spans
    restore.cancel()
    bench.store.tiers = {first: "file", second: "memory"}
    both, _ = bench.start([HIDDEN, KV])
    outcome = _run(both)
    assert (outcome.tiers, outcome.kinds) == (["file", "memory"], ["hidden", "kv"])
    bench.store.damage = {(second, 2): "corrupt"}
    cut, _ = bench.start([HIDDEN, KV])
    outcome = _run(cut)
    assert (outcome.tiers, outcome.kinds) == (["file"], ["hidden"])


# --- slices ----------------------------------------------------------------------------------------------------------


def test_a_slice_is_a_tile_at_least_and_ends_when_its_time_is_up(bench, monkeypatch):
    restore, target = bench.start([KV] * 6)
    num_tiles = 3 * GEOMETRY.num_layers
    for done in range(1, num_tiles + 1):
        _wait_for_work(restore)
        assert restore.step(0.0, wait=False) is None
        assert len(target.writes) == done
    assert restore.step(0.0, wait=False) is not None
    assert target.committed == [6 * SPAN_TOKENS]

    restore, target = bench.start([KV] * 6)
    write_kv = target.write_kv
    monkeypatch.setattr(target, "write_kv", lambda *args: (time.sleep(0.02), write_kv(*args)))
    _wait_for_work(restore)
    assert restore.step(0.05, wait=True) is None
    assert 1 <= len(target.writes) <= 3
    assert _run(restore).num_tokens == 6 * SPAN_TOKENS


def test_a_slice_that_may_not_wait_never_does(bench):
    bench.store.read_gate.clear()
    restore, target = bench.start([HIDDEN] * 4)
    started_s = time.monotonic()
    for _ in range(100):
        assert restore.step(60.0, wait=False) is None
    assert time.monotonic() - started_s < GIVE_UP_S
    assert {layer for layer, _, _ in target.writes} == {0}  # from token ids: needs no read
    bench.store.read_gate.set()
    assert _run(restore).num_tokens == 4 * SPAN_TOKENS
    bench.check(target, [HIDDEN] * 4, 4)


def test_a_slice_that_waits_ends_when_its_time_is_up(bench):
    """Or a disk that hangs would hold up new requests, and nobody could cancel."""
    bench.store.read_gate.clear()
    restore, target = bench.start([KV] * 4)
    started_s = time.monotonic()
    assert restore.step(0.05, wait=True) is None
    assert 0.05 <= time.monotonic() - started_s < GIVE_UP_S / 2, "it waits for the reads"
    threading.Timer(0.02, bench.store.read_gate.set).start()
    assert restore.step(float("inf"), wait=True) is not None
    bench.check(target, [KV] * 4, 4)


# --- ends ------------------------------------------------------------------------------------------------------------


@given(
    kinds=st.lists(st.sampled_from(ChunkKind), min_size=1, max_size=5),
    num_steps=st.integers(0, 16),
    seed=st.integers(0, 99),
)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_restore_can_be_cancelled_at_any_point(kinds, num_steps, seed):
    bench, chooser = Bench(), random.Random(seed)
    bench.store.read_delays = iter(lambda: chooser.choice([0, 0.001]), None)
    restore, target = bench.start(kinds)
    is_done = False
    for _ in range(num_steps):
        is_done = is_done or restore.step(0.0, wait=chooser.random() < 0.5) is not None
        if is_done:
            break
    restore.cancel()
    restore.cancel()
    assert target.committed == ([len(kinds) * SPAN_TOKENS] if is_done else [])
    assert bench.store.num_unpins == 1
    bench.check_all_is_given_back()
    bench.restorer.stop()


def test_a_cancelled_restore_does_not_wait_for_its_reads_and_keeps_their_buffers(bench):
    bench.store.read_gate.clear()
    restore, target = bench.start([KV] * 4)
    assert restore.step(0.0, wait=False) is None
    wait_until(lambda: bench.store.reads != [])
    started_s = time.monotonic()
    restore.cancel()
    assert time.monotonic() - started_s < GIVE_UP_S / 2, "it waits for the reads"
    assert not +bench.store.pins
    assert bench.restorer.buffers.num_in_use > 0, "a buffer that is still being read into was given back"
    other, other_target = bench.start([HIDDEN] * 4, branch=2)
    assert other.step(0.0, wait=False) is None
    bench.store.read_gate.set()
    assert _run(other).num_tokens == 4 * SPAN_TOKENS
    bench.check(other_target, [HIDDEN] * 4, 4, branch=2)
    assert target.committed == []
    bench.check_all_is_given_back()


@pytest.mark.parametrize("layer", range(GEOMETRY.num_layers))
def test_a_store_that_raises_ends_the_restore(bench, layer):
    restore, target = bench.start([KV] * 5)
    bench.store.damage = {(list(bench.store.spans)[3], layer): OSError("the device is gone")}
    with pytest.raises(OSError, match="the device is gone"):
        _run(restore)
    assert target.committed == []
    assert bench.store.num_unpins == 1
    bench.check_all_is_given_back()


@pytest.mark.parametrize("method", ["fill", "project_hidden", "write_kv", "commit"])
def test_an_engine_that_raises_ends_the_restore(bench, method, monkeypatch):
    restore, target = bench.start([HIDDEN, KV, HIDDEN])
    monkeypatch.setattr(target, method, lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        _run(restore)
    assert target.committed == []
    assert bench.store.num_unpins == 1
    bench.check_all_is_given_back()


@pytest.mark.parametrize("end", ["finished", "cancelled", "failed"])
def test_a_restore_that_is_over_does_nothing_more(bench, end):
    restore, target = bench.start([KV] * 3)
    if end == "finished":
        _run(restore)
    elif end == "cancelled":
        restore.cancel()
    else:
        bench.store.damage = {(next(iter(bench.store.spans)), 0): OSError("gone")}
        with pytest.raises(OSError, match="gone"):
            _run(restore)
    committed, num_writes = list(target.committed), len(target.writes)
    with pytest.raises(RuntimeError, match="this restore is over"):
        restore.step(1.0, wait=True)
    assert (target.committed, len(target.writes)) == (committed, num_writes)
    bench.check_all_is_given_back()


@pytest.mark.parametrize("what", ["touch", "pin", "open_tiles"])
def test_a_start_that_fails_pins_and_opens_nothing(bench, monkeypatch, what):
    """Other ranks would keep what they opened for it."""
    opened = []
    with monkeypatch.context() as patch:
        patch.setattr(bench.restorer, "open_tiles", lambda *args: opened.append(args))
        patch.setattr(bench.restorer if what == "open_tiles" else bench.store, what, lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            bench.start([KV] * 3)
    assert not opened and bench.restorer.num_open == 0
    bench.check_all_is_given_back()


def test_fewer_tokens_than_spans_are_refused(bench):
    """Layer 0 comes from them: what is not given would stay unwritten, and be committed."""
    records = bench.store.add(TOKENS, [HIDDEN] * 3, GEOMETRY)
    with pytest.raises(ValueError, match="191 token ids for 3 spans"):
        bench.restorer.start(FakeBlocks(bench.engine), records, TOKENS[: 3 * SPAN_TOKENS - 1])
    bench.check_all_is_given_back()


@pytest.mark.parametrize("reason", ["corrupt", "missing"])
def test_what_follows_a_damaged_span_is_saved_anew(bench, reason):
    restore, _ = bench.start([KV] * 5)
    ids = list(bench.store.spans)
    bench.store.damage = {(ids[2], 1): reason}
    _run(restore)
    assert list(bench.store.spans) == (ids[:2] if reason == "corrupt" else ids)


def test_a_store_knows_the_memory_that_it_reads_into(bench):
    restore, _ = bench.start([KV] * 5)
    _run(restore)
    lent = [range(address_of(buffer), address_of(buffer) + len(buffer)) for buffer in bench.store.lent]
    assert bench.store.read_into
    assert all(any(address in memory for memory in lent) for address in bench.store.read_into)
    bench.restorer.stop()
    assert not bench.store.lent, "kept from being freed"


def test_a_read_that_has_begun_keeps_all_memory_lent(bench, monkeypatch):
    """It has none yet, and may take some a moment later."""
    monkeypatch.setattr("mii_hcache.runtime.restorer.STOP_S", 0.05)
    _run(bench.start([KV] * 5)[0])
    begun, goes_on = threading.Event(), threading.Event()

    def late() -> ReadOutcome:
        begun.set()
        assert goes_on.wait(GIVE_UP_S)
        return ReadOutcome(num_ok=0)

    outcome = bench.restorer.submit_read(late)
    assert begun.wait(GIVE_UP_S)
    num_lent = len(bench.store.lent)
    bench.restorer.stop()
    assert len(bench.store.lent) == num_lent > 0
    goes_on.set()
    assert outcome.result(GIVE_UP_S).num_ok == 0
