"""Two-stage saving: what is taken when, who waits for what and how long, and that nothing is lost on the way."""

from __future__ import annotations

import threading
import time

import pytest

from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind
from mii_hcache.core.identity import spans_of
from mii_hcache.core.plans import StoragePlan
from mii_hcache.runtime import flusher as flusher_module
from mii_hcache.runtime.pace import Pace
from mii_hcache.runtime.saver import Saver
from mii_hcache.runtime.stats import Counters
from tests.runtime.kit import (
    GIVE_UP_S,
    SCATTERS,
    SEED,
    FakeEngine,
    FakeStore,
    geometry_of,
    kind_of,
    open_saver,
    path,
    scatter_named,
    span_chunks,
    span_record,
    wait_until,
)

GEOMETRY = geometry_of()
MAX_BATCH = 2 * SPAN_TOKENS
HIDDEN, KV = ChunkKind.HIDDEN, ChunkKind.KV

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


class Bench:
    """A saver with what is around it. One background thread, and one span may wait for the store."""

    def __init__(self, scatter: str) -> None:
        self.scatter = scatter
        self.engine = FakeEngine(GEOMETRY, max_batch_tokens=MAX_BATCH)
        self.store = FakeStore()
        self.counters = Counters()
        self.savers: list[Saver] = []

    def open_saver(self, kind: ChunkKind | None = HIDDEN, **settings) -> Saver:
        settings.setdefault("num_threads", 1)
        settings.setdefault("scatter", scatter_named(self.scatter))
        self.savers.append(open_saver(self.engine, self.store, kind, counters=self.counters, **settings))
        return self.savers[-1]

    def open(self, num_tokens: int = 0, branch: int = 1) -> int:
        uid = self.engine.open(path(branch, 0, num_tokens))
        self.savers[-1].open(uid, seed=SEED, token_ids=path(branch, 0, num_tokens))
        return uid

    def run(self, *parts: tuple[int, int], branch: int = 1) -> None:
        """One step: `(uid, num_tokens)` each."""
        batch = {uid: path(branch, len(self.engine.tokens[uid]), num_tokens) for uid, num_tokens in parts}
        self.engine.step(self.savers[-1], batch)

    def jam(self) -> None:
        """Hang the store and fill ring or buffers until nothing more is taken."""
        assert self.savers[-1].drain(GIVE_UP_S)
        num_puts = len(self.store.puts)
        self.store.put_gate.clear()
        uid = self.open(branch=9)
        for _ in range(20):
            self.run((uid, SPAN_TOKENS), branch=9)
        wait_until(lambda: len(self.store.puts) == num_puts + 1)
        dropped = self.counters.get("dropped_rows_total")
        self.run((uid, SPAN_TOKENS), branch=9)
        assert self.counters.get("dropped_rows_total") == dropped + SPAN_TOKENS, "the saver takes everything"

    def stored(self, uid: int) -> list[ChunkKind | None]:
        """Kinds in which the sequence's spans are stored; their bytes are checked."""
        assert self.savers[-1].drain(GIVE_UP_S)
        tokens, kinds = self.engine.tokens[uid], []
        for span_idx, (span_id, _) in enumerate(spans_of(SEED, tokens)):
            found = self.store.spans.get(span_id)
            kinds.append(kind_of(found[0]) if found else None)
            if found:
                history = tokens[: (span_idx + 1) * SPAN_TOKENS]
                assert found[0] == span_record(history, kinds[-1], GEOMETRY)
                assert found[1] == span_chunks(history, kinds[-1], GEOMETRY)
        return kinds


@pytest.fixture(params=SCATTERS)
def bench(monkeypatch, request):
    monkeypatch.setattr(flusher_module, "MAX_WAITING_PUTS", 1)
    bench = Bench(request.param)
    yield bench
    bench.store.put_gate.set()
    for saver in bench.savers:
        saver.stop()


# --- what is saved ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ChunkKind)
@pytest.mark.parametrize("chunk", [1, 7, 63, 64, 65, MAX_BATCH])
def test_every_whole_span_is_saved_in_every_layer(bench, kind, chunk):
    saver = bench.open_saver(kind)
    uid, other = bench.open(), bench.open(branch=2)
    for start in range(0, 300, chunk):
        bench.engine.step(
            saver, {uid: path(1, start, min(chunk, 300 - start))} | ({other: path(2, start, 1)} if chunk == 1 else {})
        )
        assert saver.drain(GIVE_UP_S)
    assert bench.stored(uid) == [kind] * 4
    assert bench.stored(other) == ([kind] * 4 if chunk == 1 else [])
    assert bench.counters.get("dropped_rows_total") == 0
    assert bench.counters.get("saved_spans_total") == len(bench.store.spans)
    assert bench.counters.get("saved_bytes_total") == len(bench.store.spans) * GEOMETRY.span_bytes(kind)


@pytest.mark.parametrize("kind", ChunkKind)
def test_a_span_that_two_sequences_share_is_saved_once(bench, kind):
    bench.open_saver(kind)
    first, second = bench.open(), bench.open()
    for num_tokens in (10, 54, 64):  # whole in one step, and gathered from two
        bench.run((first, num_tokens))
        assert bench.savers[-1].drain(GIVE_UP_S)
        bench.run((second, num_tokens))
    assert bench.stored(second) == [kind] * 2
    assert len(bench.store.puts) == 2


def test_a_sequence_that_is_not_open_is_left_alone(bench):
    bench.open_saver()
    stranger, uid = bench.engine.open(), bench.open(branch=2)
    bench.engine.step(bench.savers[-1], {stranger: path(1, 0, 64), uid: path(2, 0, 64)})
    assert bench.stored(uid) == [HIDDEN]
    assert len(bench.store.spans) == 1


@pytest.mark.parametrize("kind", ChunkKind)
def test_a_span_that_is_not_worth_it_is_neither_saved_nor_healed(bench, kind):
    tokens = path(1, 0, 4 * SPAN_TOKENS)
    unwanted = {span_id for idx, (span_id, _) in enumerate(spans_of(SEED, tokens)) if idx % 2}
    saver = bench.open_saver(kind, is_worth_saving=lambda span_id: span_id not in unwanted)
    uid = bench.open()
    for num_tokens in (100, 28, 64, 64):
        bench.run((uid, num_tokens))
        assert saver.drain(GIVE_UP_S)
    assert bench.stored(uid) == [kind, None, kind, None]
    saver.heal(uid)
    assert bench.stored(uid) == [kind, None, kind, None]
    saver.close(uid)
    _assert_all_memory_is_back(saver)


def test_recompute_saves_nothing(bench):
    saver = bench.open_saver(None)
    uid = bench.open()
    bench.run((uid, MAX_BATCH))
    saver.truncate(uid, 10)
    saver.heal(uid)
    saver.close(uid)
    assert saver.plan is None and bench.store.puts == []


def test_tokens_before_the_first_step_are_not_saved_and_can_be_healed(bench):
    """A restored prefix that ends inside a span: its first rows never pass the saver."""
    saver = bench.open_saver()
    uid = bench.open(num_tokens=SPAN_TOKENS + 6)
    bench.run((uid, 58))
    bench.run((uid, 64))
    assert bench.stored(uid) == [None, None, HIDDEN]
    saver.heal(uid)
    assert bench.stored(uid) == [KV, KV, HIDDEN]
    assert bench.counters.get("healed_spans_total") == 2


def test_what_was_accepted_is_pending_until_it_can_be_found(bench):
    saver = bench.open_saver()
    uid = bench.open()
    bench.store.put_gate.clear()
    bench.run((uid, 100))
    bench.run((uid, 28))
    ids = [span_id for span_id, _ in spans_of(SEED, bench.engine.tokens[uid])]
    assert saver.is_pending(ids[:1]) and saver.is_pending(ids[1:]) and saver.num_pending == 2
    assert not saver.drain(0.01)
    threading.Timer(0.02, bench.store.put_gate.set).start()
    for span_id in ids:
        while saver.is_pending([span_id]):
            time.sleep(0)
        assert bench.store.find(span_id) is not None


# --- who waits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ChunkKind)
def test_decode_never_waits(bench, kind):
    """Had it any right to wait, it would wait here for seconds each time."""
    bench.open_saver(kind, save_wait=0.0)
    bench.jam()
    bench.savers[-1]._patience.share = 1000.0
    uids = [bench.open(num_tokens=63, branch=branch) for branch in (1, 2)]
    dropped = bench.counters.get("dropped_rows_total")
    started_s = time.monotonic()
    for _ in range(70):
        bench.run(*((uid, 1) for uid in uids))
    assert time.monotonic() - started_s < GIVE_UP_S
    assert bench.counters.get("dropped_rows_total") - dropped == (140 if kind is HIDDEN else 4 * SPAN_TOKENS)
    assert bench.counters.get("save_wait_seconds_total") == 0


def _note_waits(room) -> list[float]:
    """How long whoever finds no room says that he would wait: what a clock tells of it is also the machine's doing."""
    asked_s, acquire = [], room.acquire

    def noted(*args):
        got = acquire(*args)
        if got is None:
            asked_s.append(args[-1])
        return got

    room.acquire = noted
    return asked_s


@pytest.mark.parametrize("kind", ChunkKind)
def test_a_prefill_that_finds_no_room_waits_its_share_and_no_longer(bench, kind):
    saver = bench.open_saver(kind, save_wait=0.0)
    bench.jam()
    saver._patience.share, saver._patience.pace = 0.6, Pace(MAX_BATCH)
    allowed_s = 0.6 * 0.5  # half a second is what a full step is first thought to take
    dropped = bench.counters.get("dropped_rows_total")
    uid = bench.open()
    room = saver._capture.ring if kind is HIDDEN else saver._cutter._kv_blocks
    asked_s = _note_waits(room)
    started_s = time.monotonic()
    bench.run((uid, MAX_BATCH))  # kv: two spans, and one share between them
    waited_s = time.monotonic() - started_s
    assert asked_s == pytest.approx([allowed_s] if kind is HIDDEN else [allowed_s, 0.0]), "no longer"
    assert allowed_s <= bench.counters.get("save_wait_seconds_total") <= waited_s
    assert bench.counters.get("dropped_rows_total") - dropped == MAX_BATCH


@pytest.mark.parametrize("kind", ChunkKind)
def test_a_prefill_goes_on_as_soon_as_there_is_room(bench, kind):
    saver = bench.open_saver(kind, save_wait=0.0)
    bench.jam()
    saver._patience.share = 1000.0
    uid = bench.open()
    threading.Timer(0.05, bench.store.put_gate.set).start()
    bench.run((uid, MAX_BATCH))
    assert bench.stored(uid) == [kind] * 2
    assert 0 < bench.counters.get("save_wait_seconds_total") < GIVE_UP_S, "it could have been minutes"


def test_room_is_found_for_two_full_batches_while_the_store_hangs(bench):
    bench.open_saver(save_wait=0.0)
    bench.store.put_gate.clear()
    uid = bench.open()
    bench.run((uid, MAX_BATCH))
    bench.run((uid, MAX_BATCH))
    assert bench.counters.get("dropped_rows_total") == 0
    bench.run((uid, MAX_BATCH))
    assert bench.counters.get("dropped_rows_total") == MAX_BATCH
    bench.store.put_gate.set()
    assert bench.stored(uid) == [HIDDEN] * 4 + [None] * 2


def test_a_store_that_hangs_for_long_does_not_pile_up_steps(bench):
    bench.open_saver(save_wait=0.0)
    bench.jam()
    uid = bench.open()
    waiting = bench.savers[-1]._sink._num_snapshots
    for _ in range(200):
        bench.run((uid, 1))
    assert bench.savers[-1]._sink._num_snapshots <= waiting


# --- healing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ChunkKind)
def test_what_was_dropped_is_healed_from_the_blocks(bench, kind):
    saver = bench.open_saver(kind, save_wait=0.0)
    uid = bench.open()
    bench.run((uid, SPAN_TOKENS))
    bench.jam()
    bench.run((uid, MAX_BATCH))
    bench.run((uid, 30))
    bench.store.put_gate.set()
    assert saver.drain(GIVE_UP_S)
    for _ in range(34):
        bench.run((uid, 1))
    assert bench.stored(uid)[1:3] == [None, None]
    saver.heal(uid)
    saver.close(uid)
    expected = [HIDDEN, KV, KV, KV] if kind is HIDDEN else [KV] * 4
    assert bench.stored(uid) == expected
    assert bench.counters.get("unhealed_spans_total") == 0


def test_healing_saves_nothing_twice(bench):
    saver = bench.open_saver()
    uid = bench.open()
    bench.store.put_gate.clear()
    bench.run((uid, MAX_BATCH))
    saver.heal(uid)  # one span is being put, one waits
    assert saver.num_pending == 2
    bench.store.put_gate.set()
    assert bench.stored(uid) == [HIDDEN] * 2
    saver.heal(uid)
    assert bench.stored(uid) == [HIDDEN] * 2 and len(bench.store.puts) == 2
    assert bench.counters.get("healed_spans_total") == 0


def test_what_reaches_the_store_while_it_is_looked_for_is_not_healed(bench, monkeypatch):
    saver = bench.open_saver()
    uid = bench.open()
    bench.store.put_gate.clear()
    bench.run((uid, SPAN_TOKENS))
    wait_until(lambda: bench.store.puts)
    find = bench.store.find

    def find_slowly(span_id):
        found = find(span_id)
        bench.store.put_gate.set()
        assert saver.drain(GIVE_UP_S)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(bench.store, "find", find_slowly)
        assert saver.heal(uid)
    bench.store.put_gate.set()
    assert bench.stored(uid) == [HIDDEN]
    assert bench.counters.get("healed_spans_total") == 0 and len(bench.store.puts) == 1


def test_a_store_that_hangs_holds_up_an_eviction_once_not_for_every_span(bench):
    saver = bench.open_saver()
    bench.store.put_gate.clear()
    uid = bench.open(num_tokens=12 * SPAN_TOKENS)
    asked_s = _note_waits(saver._healer._blocks)
    started_s = time.monotonic()
    assert not saver.heal(uid, 0.2)
    assert time.monotonic() - started_s >= 0.2
    assert len(asked_s) == 1 and asked_s[0] <= 0.2, "once, and for what is left of it"
    assert not saver.heal(uid, 0.0)
    saver.give_up(uid)
    assert bench.counters.get("healed_spans_total") + bench.counters.get("unhealed_spans_total") == 12
    saver.close(uid)
    bench.store.put_gate.set()
    assert bench.stored(uid).count(KV) == bench.counters.get("healed_spans_total") > 0


# --- what goes wrong -------------------------------------------------------------------------------------------------


def _assert_all_memory_is_back(saver: Saver) -> None:
    assert saver.drain(GIVE_UP_S)
    assert saver._cutter._kv_blocks.num_in_use == saver._healer._blocks.num_in_use == 0
    if saver._capture is not None:
        assert saver._capture.ring.leased_rows == 0
        assert saver._cutter._open_buffers.num_in_use == 0


@pytest.mark.parametrize("layer", range(GEOMETRY.num_layers))
def test_a_failed_step_gives_its_rows_back_and_saves_nothing(bench, layer):
    saver = bench.open_saver(ring_batches=2)
    uid, other = bench.open(), bench.open(branch=2)
    bench.run((uid, 30))
    assert saver.drain(GIVE_UP_S)
    for _ in range(5):
        with pytest.raises(RuntimeError, match="the engine failed"):
            bench.engine.step(saver, {other: path(2, 0, MAX_BATCH)}, fail_at_layer=layer)
        bench.engine.truncate(other, 0)
    bench.run((uid, 34))
    assert bench.stored(uid) == [HIDDEN]
    assert len(bench.store.spans) == 1 and bench.counters.get("dropped_rows_total") == 0
    saver.close(uid)
    _assert_all_memory_is_back(saver)


@pytest.mark.parametrize("num_before", [0, 10])
def test_a_step_whose_rows_cannot_be_taken_is_dropped_for_that_sequence_alone(bench, num_before):
    """The step itself was fine: its requests go on, the spans are healed."""
    saver = bench.open_saver()
    uid, other = bench.open(), bench.open(branch=2)
    if num_before:
        bench.run((uid, num_before))
    bench.store.fail_find = OSError("the catalog is gone")
    bench.engine.step(saver, {uid: path(1, num_before, 64 - num_before), other: path(2, 0, 20)})
    bench.store.fail_find = None
    bench.engine.step(saver, {uid: path(1, 64, 30), other: path(2, 20, 44)})
    bench.run((uid, 34))
    assert bench.stored(uid) == [None, HIDDEN]
    assert bench.stored(other) == [HIDDEN]
    assert bench.counters.get("save_errors_total") == 1
    saver.heal(uid)
    assert bench.stored(uid) == [KV, HIDDEN]
    saver.close(uid)
    _assert_all_memory_is_back(saver)


@pytest.mark.parametrize("kind", ChunkKind)
def test_blocks_that_cannot_be_read_cost_the_span_and_no_buffer(bench, kind, monkeypatch):
    saver = bench.open_saver(kind)
    uid = bench.open(num_tokens=10 * SPAN_TOKENS)
    with monkeypatch.context() as patch:
        patch.setattr("tests.runtime.kit.FakeBlocks.read_kv", lambda *args: 1 / 0)
        saver.heal(uid)
        bench.run((uid, SPAN_TOKENS))
    assert bench.counters.get("unhealed_spans_total") == 10
    assert bench.counters.get("save_errors_total") == (10 if kind is HIDDEN else 11)
    assert saver._cutter._kv_blocks.num_in_use == saver._healer._blocks.num_in_use == 0
    saver.heal(uid)
    assert bench.stored(uid) == [KV] * 10 + [kind]


def test_a_span_for_whose_k_and_v_there_is_no_memory_gives_its_rows_back(bench, monkeypatch):
    def no_memory(*shape, dtype):
        raise RuntimeError("no memory")

    saver = bench.open_saver(StoragePlan(method="mixed", kinds=(None, HIDDEN, KV)))
    uid = bench.open()
    bench.run((uid, 10))
    with monkeypatch.context() as patch:
        patch.setattr("mii_hcache.runtime.buffers.host_empty", no_memory)
        bench.run((uid, 54))
    assert bench.counters.get("save_errors_total") == 1
    assert saver.heal(uid)
    assert bench.stored(uid) == [KV]
    saver.close(uid)
    _assert_all_memory_is_back(saver)


def test_rows_of_a_step_in_which_a_layer_was_not_tapped_are_dropped(bench, monkeypatch):
    """A forward that does not pass the tap (a replayed graph, a patched model) leaves rows that nobody wrote."""
    saver = bench.open_saver()
    uid = bench.open()
    bench.run((uid, 10))
    with monkeypatch.context() as patch:
        tap = saver.tap
        patch.setattr(saver, "tap", lambda layer_idx, hidden: tap(layer_idx, hidden) if layer_idx != 1 else None)
        bench.run((uid, 60))
    bench.run((uid, 58))
    assert bench.stored(uid) == [None, None]
    assert bench.counters.get("save_errors_total") == 1
    assert bench.counters.get("dropped_rows_total") == 60
    saver.close(uid)
    _assert_all_memory_is_back(saver)


def test_stop_drains(bench):
    saver = bench.open_saver()
    uid = bench.open()
    bench.store.put_gate.clear()
    bench.run((uid, MAX_BATCH))
    threading.Timer(0.02, bench.store.put_gate.set).start()
    saver.stop()
    bench.savers.pop()
    assert len(bench.store.spans) == 2


def test_stop_does_not_wait_for_a_disk_that_hangs(bench, monkeypatch, caplog):
    monkeypatch.setattr(flusher_module, "STALL_S", 0.3)
    saver = bench.open_saver(num_threads=2)
    for branch in (1, 2):
        bench.run((bench.open(branch=branch), SPAN_TOKENS), branch=branch)
    assert saver.drain(GIVE_UP_S)
    bench.store.put_gate.clear()
    for branch in (3, 4, 5, 6):  # one more than threads and queue hold
        bench.run((bench.open(branch=branch), SPAN_TOKENS), branch=branch)
    before = bench.store.spans.copy()
    started_s = time.monotonic()
    saver.stop()
    assert 0.3 <= time.monotonic() - started_s < GIVE_UP_S / 2
    assert bench.counters.get("unsaved_spans_total") == 4 and "4 spans" in caplog.text
    assert saver._capture.ring.leased_rows > 0, "memory was taken from what still reads it"
    assert bench.store.spans == before
    bench.savers.pop()
    bench.store.put_gate.set()
    assert saver.drain(GIVE_UP_S), "the threads go on if the disk does"


def test_stop_waits_for_a_disk_that_is_slow(bench, monkeypatch):
    monkeypatch.setattr(flusher_module, "STALL_S", 0.3)
    saver = bench.open_saver()
    put, changed, granted_s = bench.store.put, saver._sink._changed, []
    wait_for = changed.wait_for

    def patient(condition, timeout_s):
        granted_s.append(timeout_s)
        return wait_for(condition, GIVE_UP_S)  # what a busy machine takes longer is no fault of the disk's

    monkeypatch.setattr(bench.store, "put", lambda *args: time.sleep(0.02) or put(*args))
    monkeypatch.setattr(changed, "wait_for", patient)
    for branch in range(1, 5):
        bench.run((bench.open(branch=branch), SPAN_TOKENS), branch=branch)
    saver.stop()
    bench.savers.pop()
    assert bench.counters.get("unsaved_spans_total") == bench.counters.get("dropped_rows_total") == 0
    assert len(bench.store.spans) == 4
    assert set(granted_s) == {0.3} and len(granted_s) > 1, "the whole of it, after each thing that got done"
