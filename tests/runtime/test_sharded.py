"""Ranks save and restore a model's state together: each its share, all the same spans, or none."""

from __future__ import annotations

import dataclasses
import itertools
import threading

import pytest

from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind, ModelGeometry
from mii_hcache.core.identity import spans_of
from mii_hcache.core.plans import StoragePlan, uniform_storage
from mii_hcache.errors import RankLostError
from mii_hcache.runtime import sharded_saver
from mii_hcache.runtime.following_saver import NUM_WRITERS
from mii_hcache.runtime.following_tiles import NUM_READERS
from mii_hcache.runtime.lookup import look_up
from mii_hcache.runtime.share import Share
from mii_hcache.storage.file import FileStore
from mii_hcache.storage.open_striped import open_striped
from mii_hcache.storage.state_dir import StateDir
from mii_hcache.storage.stripe_set import StripeSet
from tests.runtime.kit import GIVE_UP_S, SEED, FakeEngine, open_saver, path, wait_until
from tests.runtime.ranks_kit import Ranks, expected_chunks, spans_in

HIDDEN, KV = ChunkKind.HIDDEN, ChunkKind.KV
MHA = ModelGeometry(num_layers=3, hidden_size=8, num_heads=4, num_kv_heads=4, head_size=2, dtype="float32")
GQA = dataclasses.replace(MHA, num_kv_heads=2)
"""With 4 ranks, two of them have the same head."""
MIXED = StoragePlan(method="mixed", kinds=(None, HIDDEN, KV))
PLANS = {
    "hidden": uniform_storage(MHA, HIDDEN),
    "kv": uniform_storage(MHA, KV),
    "mixed": MIXED,
    "two patterns": StoragePlan(
        method="token-wise", kinds=(None, HIDDEN, HIDDEN), other_kinds=(KV, KV, KV), other_share=0.3
    ),
}
LENGTHS = (1, 63, 64, 65, 64 * 8 - 1, 64 * 8, 64 * 8 + 1, 64 * 9 + 30)


@pytest.fixture
def store(tmp_path):
    state_dir = StateDir(tmp_path / "state")
    store = FileStore(state_dir, 64 << 20)
    yield store
    store.close()
    state_dir.close()


@pytest.fixture
def make_ranks():
    made = []

    def make(geometry, num_ranks, **settings):
        made.append(Ranks(geometry, num_ranks, **settings))
        return made[-1]

    yield make
    for ranks in made:
        ranks.close()


def run(ranks, saver, uid, tokens, pieces=(100, 1, 1, 30, 255)):
    """Feed a sequence in steps of ragged sizes."""
    at = 0
    for idx in range(len(tokens)):
        size = pieces[idx % len(pieces)]
        ranks.engines[0].step(saver, {uid: tokens[at : at + size]})
        at += size
        if at >= len(tokens):
            return


def save(ranks, store, plan, histories, **settings):
    saver = ranks.open_saver(store, plan, **settings)
    for tokens in histories:
        uid = ranks.engines[0].open()
        saver.open(uid, seed=SEED, token_ids=[])
        run(ranks, saver, uid, tokens)
        assert saver.heal(uid, 30.0)
        saver.close(uid)
        ranks.engines[0].evict(uid)
    assert saver.drain(30.0)
    ranks.settle()
    saver.stop()
    return saver


def check_saved(store, tokens, geometry):
    records = spans_in(store, tokens)
    assert len(records) == len(tokens) // SPAN_TOKENS
    for record in records:
        outs = [memoryview(bytearray(chunk.num_bytes)) for chunk in record.layout.chunks]
        outcome = store.get_into([record.read_of(idx, out) for idx, out in enumerate(outs)])
        assert outcome.num_ok == len(outs)
        assert [bytes(out) for out in outs] == expected_chunks(record, tokens, geometry)
    return records


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(("geometry", "num_ranks"), [(MHA, 2), (MHA, 4), (GQA, 4)], ids=["mha2", "mha4", "gqa4"])
def test_what_ranks_save_together_they_restore_together(store, make_ranks, geometry, num_ranks, name):
    ranks, plan = make_ranks(geometry, num_ranks), PLANS[name]
    histories = [path(branch, 0, length) for branch, length in enumerate(LENGTHS)]
    save(ranks, store, plan, histories)
    for tokens in histories:
        records = check_saved(store, tokens, geometry)
        uid, outcome = ranks.restore(store, records, tokens)
        assert outcome.num_tokens == len(records) * SPAN_TOKENS
        ranks.expect_restored(uid, tokens, outcome, records)
    wait_until(lambda: all(state.tiles.num_held == state.parts.num_kept == 0 for state in ranks.states[1:]))
    assert all(engine.hashes.keys() == ranks.engines[0].hashes.keys() for engine in ranks.engines)


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("kind", ChunkKind)
def test_each_rank_reads_and_writes_its_share(store, make_ranks, num_ranks, kind):
    ranks = make_ranks(MHA, num_ranks)
    tokens = path(1, 0, 64 * 13 + 5)
    save(ranks, store, uniform_storage(MHA, kind), [tokens], save_wait=1e6)
    records = spans_in(store, tokens)
    all_bytes = sum(record.num_bytes for record in records)
    written = ranks.counted("shard_written_bytes_total")
    assert sum(written) == all_bytes
    _, outcome = ranks.restore(store, records, tokens)
    read = ranks.counted("shard_read_bytes_total")
    assert sum(read) == all_bytes and outcome.num_tokens == 64 * 13
    a_chunk_a_layer = len(MHA.saved_layers(kind)) * MHA.chunk_bytes(kind)
    for num_bytes in (*written, *read):
        assert abs(num_bytes - all_bytes / num_ranks) <= (a_chunk_a_layer if kind is HIDDEN else 0)


def striped(tmp_path, names):
    stripes = StripeSet.of([tmp_path / name for name in names])
    return open_striped(stripes, len(names) * (64 << 20), segment_bytes=1 << 20)


def moved_in(ranks, totals):
    """Bytes that each rank moved in each directory since the last call. `totals`: of each directory, all ranks'."""
    moved = ranks.moved.copy()
    ranks.moved.clear()
    for name, total in totals.items():
        moved[0, name] = total - sum(num for (_, one), num in moved.items() if one == name)
    return +moved


def totals_of(store, name):
    return {one.path.name: getattr(one.store.stats(), name) for one in store.paths}


@pytest.mark.parametrize(
    ("num_ranks", "num_paths", "expected"),
    [(2, 2, ["a", "b"]), (2, 4, ["ac", "bd"]), (4, 4, ["a", "b", "c", "d"]), (2, 3, ["ac", "bc"]), (4, 2, "aabb")],
)
def test_each_rank_has_directories_of_its_own(tmp_path, make_ranks, num_ranks, num_paths, expected):
    """Of hidden states: by the bytes that each rank moved in each directory. All directories hold as much."""
    store, ranks = striped(tmp_path, "abcd"[:num_paths]), make_ranks(MHA, num_ranks)
    histories = [path(branch, 0, 64 * 24 + 5) for branch in range(4)]
    # room for all: nothing is dropped and healed; and no span overtakes another, or the next ones begin a new cycle
    save(ranks, store, PLANS["hidden"], histories, ring_batches=8, num_threads=1)
    written = moved_in(ranks, totals_of(store, "put_bytes"))
    for tokens in histories:
        records = spans_in(store, tokens)
        assert len(records) == 24
        uid, outcome = ranks.restore(store, records, tokens)
        ranks.expect_restored(uid, tokens, outcome, records)
    read = moved_in(ranks, totals_of(store, "read_bytes"))
    for moved in (written, read):
        assert ["".join(sorted(name for one, name in moved if one == rank)) for rank in range(num_ranks)] == [*expected]
        by_rank = [sum(num for (one, _), num in moved.items() if one == rank) for rank in range(num_ranks)]
        assert len(set(by_rank)) == 1 and sum(by_rank) == 4 * 24 * 2 * MHA.chunk_bytes(HIDDEN)
        by_directory = [sum(num for (_, one), num in moved.items() if one == name) for name in "abcd"[:num_paths]]
        assert max(by_directory) - min(by_directory) <= 4 * 2 * MHA.chunk_bytes(HIDDEN), "a span of each history"
    store.close()


def test_where_ranks_put_their_spans_any_other_number_finds_them(tmp_path, make_ranks):
    histories = {num_ranks: path(num_ranks, 0, 64 * 9) for num_ranks in (2, 4)}
    for num_ranks, names in ((2, "ab"), (4, "abcd")):
        store = striped(tmp_path, names)
        save(make_ranks(MHA, num_ranks), store, PLANS["hidden"], [histories[num_ranks]], save_wait=1e6)
        store.close()
    store = striped(tmp_path, "dcba")
    for tokens in histories.values():
        records = check_saved(store, tokens, MHA)
        for num_ranks in (2, 4):
            ranks = make_ranks(MHA, num_ranks)
            uid, outcome = ranks.restore(store, records, tokens)
            assert outcome.num_tokens == len(tokens)
            ranks.expect_restored(uid, tokens, outcome, records)
    store.close()


def test_k_and_v_of_all_ranks_lie_together_in_turn(tmp_path, make_ranks):
    store, ranks = striped(tmp_path, "ab"), make_ranks(MHA, 2)
    tokens = path(1, 0, 64 * 12)
    save(ranks, store, PLANS["kv"], [tokens], save_wait=1e6, num_threads=1)  # none overtakes another
    assert [one.store.stats().num_spans for one in store.paths] == [6, 6]
    assert set(ranks.moved) == {(1, "a"), (1, "b")}
    check_saved(store, tokens, MHA)
    store.close()


def test_tiles_shorter_than_the_ranks_and_recomputed_tokens(store, make_ranks):
    ranks = make_ranks(MHA, 4)
    tokens = path(1, 0, 64 * 9)
    save(ranks, store, MIXED, [tokens])
    records = spans_in(store, tokens)
    for tile_spans in (1, 2, 3, 5):
        for recompute_tokens in (0, 64, 192):
            uid, outcome = ranks.restore(
                store, records, tokens, recompute_tokens=recompute_tokens, restorer={"tile_spans": tile_spans}
            )
            assert (outcome.num_tokens, outcome.recomputed_tokens) == (64 * 9, recompute_tokens)
            ranks.expect_restored(uid, tokens, outcome, records)


def damage(store, record, chunk_idx):
    """Change a byte of a chunk where it lies."""
    store.flush()
    (held,) = [span for span in store._index._spans.values() if span.record.span_id == record.span_id]
    file, offset = store._segments.where(held.places[chunk_idx])
    import os

    byte = os.pread(file.fd, 1, offset + 9)
    os.pwrite(file.fd, bytes([byte[0] ^ 0x40]), offset + 9)


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("name", ["hidden", "kv", "mixed"])
def test_all_ranks_fall_back_together_where_one_finds_damage(store, make_ranks, num_ranks, name):
    ranks, plan = make_ranks(MHA, num_ranks), PLANS[name]
    tokens = path(1, 0, 64 * 11)
    save(ranks, store, plan, [tokens])
    records = spans_in(store, tokens)
    for bad_span in range(8, 2, -1):  # each rank's, in turn
        last = records[bad_span].layout.num_chunks - 1
        damage(store, records[bad_span], last - bad_span % num_ranks % (last + 1))
        uid, outcome = ranks.restore(store, records[: bad_span + 3], tokens)
        assert outcome.num_tokens == 64 * bad_span
        assert outcome.cut_reason in ("corrupt", "missing")  # for another tile, which came later to the same span
        ranks.expect_restored(uid, tokens, outcome, records)
        assert store.find(records[bad_span].span_id) is None
    assert store.stats().corrupt_chunks == 6


def test_spans_that_went_meanwhile_cut_all_ranks_alike(store, make_ranks):
    ranks = make_ranks(MHA, 4)
    tokens = path(1, 0, 64 * 11)
    save(ranks, store, PLANS["hidden"], [tokens])
    records = spans_in(store, tokens)
    store.delete([records[6].span_id])
    uid, outcome = ranks.restore(store, records, tokens)
    assert (outcome.num_tokens, outcome.cut_reason) == (64 * 6, "missing")
    ranks.expect_restored(uid, tokens, outcome, records)


def test_a_cancelled_restore_leaves_nothing_on_any_rank(store, make_ranks):
    ranks = make_ranks(MHA, 4)
    tokens = path(1, 0, 64 * 11)
    save(ranks, store, MIXED, [tokens])
    restorer = ranks.open_restorer(store, tile_spans=2)
    from tests.runtime.ranks_kit import LeadBlocks

    for num_steps in range(4):
        restore = restorer.start(LeadBlocks(ranks, ranks.engines[0].open()), spans_in(store, tokens), tokens)
        for _ in range(num_steps):
            restore.step(0.0, wait=True)
        restore.cancel()
    restorer.stop()
    wait_until(lambda: all(state.tiles.num_held == 0 for state in ranks.states[1:]))
    wait_until(lambda: restorer.buffers.num_in_use == 0)
    records = spans_in(store, tokens)
    uid, outcome = ranks.restore(store, records, tokens)
    ranks.expect_restored(uid, tokens, outcome, records)


def test_hidden_states_of_any_number_of_ranks_serve_any_other(store, make_ranks):
    tokens, plan = path(1, 0, 64 * 9), PLANS["hidden"]
    save(make_ranks(MHA, 4), store, plan, [tokens], save_wait=1e6)
    spans = list(spans_of(SEED, tokens))
    for num_ranks in (2, 4):
        ranks = make_ranks(MHA, num_ranks)
        lookup = look_up(store, spans, max_tokens=len(tokens), num_ranks=num_ranks)
        assert lookup.num_tokens == len(tokens)
        uid, outcome = ranks.restore(store, lookup.records, tokens)
        assert outcome.num_tokens == len(tokens)
        ranks.expect_restored(uid, tokens, outcome, lookup.records)
    assert look_up(store, spans, max_tokens=len(tokens)).num_tokens == len(tokens), "and a single one"


def test_k_and_v_of_other_ranks_are_a_miss_and_saved_anew(store, make_ranks):
    tokens = path(1, 0, 64 * 3)
    spans = list(spans_of(SEED, tokens))
    save(make_ranks(MHA, 2), store, PLANS["kv"], [tokens])
    for num_ranks in (1, 4):
        lookup = look_up(store, spans, max_tokens=len(tokens), num_ranks=num_ranks)
        assert (lookup.num_tokens, lookup.why_missing) == (0, "other_parallelism")
    filled = look_up(store, spans, max_tokens=len(tokens), fill_layers=3, num_ranks=4)
    assert (filled.num_tokens, filled.why_missing) == (0, "other_parallelism")
    save(make_ranks(MHA, 4), store, PLANS["kv"], [tokens])
    assert {record.layout.kv_shards for record in check_saved(store, tokens, MHA)} == {4}
    engine = FakeEngine(MHA)
    saver = open_saver(engine, store, KV)
    uid = engine.open()
    saver.open(uid, seed=SEED, token_ids=[])
    engine.step(saver, {uid: tokens})
    assert saver.drain(30.0)
    saver.stop()
    assert {record.layout.kv_shards for record in check_saved(store, tokens, MHA)} == {1}


def test_a_rank_that_dropped_rows_costs_nothing_once_the_span_is_healed(store, make_ranks):
    """One follower has no room for a step's rows: rank 0 hears of it, and K and V are read from all blocks."""
    ranks = make_ranks(MHA, 2)
    saver = ranks.open_saver(store, PLANS["hidden"])
    ranks.settle()
    ring = ranks.states[1].saver._capture.ring
    lease = ring.acquire(ring.capacity_rows)
    assert lease is not None
    tokens = path(1, 0, 64 * 4)
    uid = ranks.engines[0].open()
    saver.open(uid, seed=SEED, token_ids=[])
    ranks.engines[0].step(saver, {uid: tokens})
    assert saver.drain(30.0)
    ranks.settle()
    ring.release(lease)
    there = [store.find(span_id) is not None for span_id, _ in spans_of(SEED, tokens)]
    assert there == [True, False, True, False], "rank 1's are not"
    assert ranks.counters[0].get("lost_parts_total") == 2
    assert saver.heal(uid, 30.0)
    assert saver.drain(30.0)
    saver.close(uid)
    records = check_saved(store, tokens, MHA)
    assert [record.layout.kind_names for record in records] == [("hidden",), ("kv",), ("hidden",), ("kv",)]
    saver.stop()


def test_a_span_that_is_read_again_is_waited_for_before_its_blocks_go(store, make_ranks, monkeypatch):
    """A rank says that it has lost its rows just when rank 0 looks whether all is there: then it is not done."""
    ranks = make_ranks(MHA, 2)
    saver = ranks.open_saver(store, PLANS["hidden"])
    ranks.settle()
    ring = ranks.states[1].saver._capture.ring
    lease = ring.acquire(ring.capacity_rows)
    ranks.held_orders.clear()
    uid, tokens = ranks.engines[0].open(), path(1, 0, 64 * 2)
    saver.open(uid, seed=SEED, token_ids=[])
    ranks.engines[0].step(saver, {uid: tokens})
    is_pending = saver.is_pending

    def is_pending_late(span_ids):
        if lease is not None and not ranks.held_orders.is_set():
            ranks.held_orders.set()
            assert saver.drain(30.0)
            ranks.settle()
            ring.release(lease)
            ranks.held_orders.clear()
            monkeypatch.setattr(saver, "is_pending", is_pending)
        return is_pending(span_ids)

    monkeypatch.setattr(saver, "is_pending", is_pending_late)
    assert not saver.heal(uid, 0.1), "a rank may lose it again"
    ranks.held_orders.set()
    assert saver.heal(uid, 30.0)
    assert [record.layout.kind_names for record in check_saved(store, tokens, MHA)] == [("hidden",), ("kv",)]
    saver.stop()


def test_a_rank_that_is_gone_publishes_nothing(store, make_ranks, caplog):
    ranks = make_ranks(MHA, 2)
    saver = ranks.open_saver(store, PLANS["kv"])
    tokens = path(1, 0, 64 * 4)
    uid = ranks.engines[0].open()
    saver.open(uid, seed=SEED, token_ids=[])
    ranks.engines[0].step(saver, {uid: tokens[:128]})
    assert saver.drain(30.0)
    ranks.lost.add(1)
    ranks.engines[0].step(saver, {uid: tokens[128:]})
    assert saver.drain(30.0)
    ranks.lost.clear()
    saver.stop()
    assert len(spans_in(store, tokens)) == 2
    assert ranks.counters[0].get("save_errors_total") == 2
    check_saved(store, tokens[:128], MHA)
    assert not [record for record in caplog.records if record.levelname == "ERROR"], "the engine's end says it once"


def test_a_step_that_fails_is_saved_by_nobody(store, make_ranks):
    ranks = make_ranks(MHA, 2)
    saver = ranks.open_saver(store, MIXED)
    tokens = path(1, 0, 64 * 2)
    uid = ranks.engines[0].open()
    saver.open(uid, seed=SEED, token_ids=[])
    with pytest.raises(RuntimeError, match="the engine failed"):
        ranks.engines[0].step(saver, {uid: tokens}, fail_at_layer=1)
    saver.close(uid)
    ranks.engines[0].evict(uid)
    other = ranks.engines[0].open()
    saver.open(other, seed=SEED, token_ids=[])
    run(ranks, saver, other, tokens)
    assert saver.drain(30.0)
    ranks.settle()
    saver.stop()
    check_saved(store, tokens, MHA)


def test_truncated_and_shared_histories(store, make_ranks):
    """A sequence goes back within a span, and on another way; both ways' spans are right."""
    ranks = make_ranks(MHA, 4)
    saver = ranks.open_saver(store, MIXED)
    first, second = path(1, 0, 200), path(1, 0, 100) + path(2, 100, 200)
    uid = ranks.engines[0].open()
    saver.open(uid, seed=SEED, token_ids=[])
    run(ranks, saver, uid, first, pieces=(90, 40, 7))
    saver.truncate(uid, 100)
    ranks.engines[0].truncate(uid, 100)
    run(ranks, saver, uid, second[100:], pieces=(1, 50))
    assert saver.heal(uid, 30.0) and saver.drain(30.0)
    saver.close(uid)
    ranks.settle()
    saver.stop()
    for tokens in (first, second):
        records = check_saved(store, tokens, MHA)
        uid, outcome = ranks.restore(store, records, tokens)
        ranks.expect_restored(uid, tokens, outcome, records)


def test_orders_that_come_late_are_waited_for(store, make_ranks):
    """Rank 0's threads ask for chunks before the followers have heard of the step."""
    ranks = make_ranks(MHA, 2)
    saver = ranks.open_saver(store, MIXED)
    tokens = path(1, 0, 64 * 4)
    uid = ranks.engines[0].open()
    saver.open(uid, seed=SEED, token_ids=[])
    ranks.settle()
    ranks.held_orders.clear()
    ranks.engines[0].step(saver, {uid: tokens})
    wait_until(lambda: len(ranks.states[1].parts._asked) >= 2)
    assert not spans_in(store, tokens)
    ranks.held_orders.set()
    assert saver.drain(30.0)
    saver.stop()
    check_saved(store, tokens, MHA)


def test_shares_tile_every_span():
    for num_ranks in (1, 2, 4):
        shares = [Share(rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
        for span_idx in range(9):
            from mii_hcache.core.layout import SpanLayout

            layout = SpanLayout.of(MHA, (None, HIDDEN, KV), num_ranks)
            idxs = [idx for share in shares for idx in share.chunks(span_idx, layout)]
            assert sorted(idxs) == list(range(layout.num_chunks))
    with pytest.raises(ValueError, match="rank must be 0 to 1, got 2"):
        Share(rank=2, num_ranks=2)


def test_chunks_that_are_asked_for_before_saving_began_are_waited_for(store, make_ranks):
    """Followers that are slow to start lose nothing, and no disk is taken for broken."""
    ranks = make_ranks(MHA, 2)
    ranks.held_orders.clear()
    saver = ranks.open_saver(store, MIXED)
    tokens = path(1, 0, 64 * 4)
    uid = ranks.engines[0].open()
    saver.open(uid, seed=SEED, token_ids=[])
    ranks.engines[0].step(saver, {uid: tokens})
    wait_until(lambda: len(ranks.states[1].parts._asked) >= 2)
    assert ranks.states[1].saver is None
    ranks.held_orders.set()
    assert saver.drain(30.0)
    saver.stop()
    check_saved(store, tokens, MHA)
    assert ranks.counters[0].get("lost_parts_total") == 0


def test_a_question_that_fails_leaves_those_after_it_answered(store, make_ranks, monkeypatch):
    """No memory for a part of a tile: the tile is cut there, on all ranks, and the next restore is whole."""
    ranks = make_ranks(MHA, 2)
    tokens = path(1, 0, 64 * 9)
    save(ranks, store, PLANS["hidden"], [tokens], save_wait=1e6)
    records = spans_in(store, tokens)
    tiles = ranks.states[1].tiles
    with monkeypatch.context() as patch:
        patch.setattr(tiles, "_pool", lambda num_bytes: 1 // 0)
        uid, outcome = ranks.restore(store, records, tokens)
    assert (outcome.num_tokens, outcome.cut_reason) == (64, "unavailable"), "the first span is rank 0's"
    ranks.expect_restored(uid, tokens, outcome, records)
    uid, outcome = ranks.restore(store, records, tokens)
    assert outcome.num_tokens == len(tokens)
    ranks.expect_restored(uid, tokens, outcome, records)


def test_a_rank_that_fails_for_itself_costs_a_span_and_no_disk(store, make_ranks, monkeypatch):
    ranks = make_ranks(MHA, 2)
    tokens = path(1, 0, 64 * 4)
    with monkeypatch.context() as patch:
        patch.setattr(ranks.states[1]._files, "write", lambda payloads, chunks: 1 // 0)
        saver = ranks.open_saver(store, PLANS["hidden"])
        uid = ranks.engines[0].open()
        saver.open(uid, seed=SEED, token_ids=[])
        ranks.engines[0].step(saver, {uid: tokens})
        assert saver.drain(30.0)
    assert [store.find(span_id) is not None for span_id, _ in spans_of(SEED, tokens)] == [True, False, True, False]
    assert saver.heal(uid, 30.0) and saver.drain(30.0)
    saver.stop()
    check_saved(store, tokens, MHA)
    assert store.stats().num_away == 0


def test_a_tile_that_rank_0_fails_to_place_is_the_end_of_the_engine(store, make_ranks, monkeypatch):
    """The others wait in a gather, and would take the rows of the next tile for those of this one."""
    ranks = make_ranks(MHA, 2)
    tokens = path(1, 0, 64 * 5)
    save(ranks, store, PLANS["hidden"], [tokens], save_wait=1e6)

    def fail(out, rows):
        raise MemoryError("no room to gather in")

    monkeypatch.setattr(ranks, "gather", fail)
    with pytest.raises(RankLostError, match="rank 0 failed to place a tile that the others place: no room to gather"):
        ranks.restore(store, spans_in(store, tokens), tokens)
    wait_until(lambda: ranks._meeting.n_waiting)
    ranks._meeting.abort()  # as its process would be killed
    wait_until(lambda: ranks.errors)
    ranks.errors.clear()


def test_reads_that_hang_on_a_follower_hold_up_no_others(store, make_ranks, monkeypatch):
    """As many as it has threads to read with: a disk hangs, and the others do not."""
    ranks = make_ranks(MHA, 2)
    tokens = path(1, 0, 64 * 9)
    save(ranks, store, PLANS["hidden"], [tokens])
    records, tiles = spans_in(store, tokens), ranks.states[1].tiles
    answers, num_reads, hanging, read = threading.Event(), itertools.count(), [], tiles._files.read

    def hang(slots, outs):
        number = next(num_reads)
        if number < NUM_READERS:
            hanging.append(number)
            assert answers.wait(60)
        return read(slots, outs)

    monkeypatch.setattr(tiles._files, "read", hang)
    monkeypatch.setattr("mii_hcache.runtime.restorer.STOP_S", 0.1)  # nothing that hangs is waited for
    settings = {"read_deadline_s": 0.5, "tile_spans": 2}
    while len(hanging) < NUM_READERS:
        _, outcome = ranks.restore(store, records, tokens, restorer=settings)
        assert outcome.cut_reason == "stalled"
    uid, outcome = ranks.restore(store, records, tokens, restorer={"read_deadline_s": GIVE_UP_S})
    assert outcome.num_tokens == len(tokens)
    ranks.expect_restored(uid, tokens, outcome, records)
    answers.set()
    wait_until(lambda: tiles.num_held == 0 and all(pool.num_in_use == 0 for pool in list(tiles._pools.values())))


def test_writes_that_hang_on_a_follower_hold_up_no_others(store, make_ranks, monkeypatch):
    ranks = make_ranks(MHA, 2)
    tokens = path(1, 0, 64 * 9)
    answers, num_writes, write = threading.Event(), itertools.count(), ranks.states[1]._files.write
    hung = threading.Barrier(1 + NUM_WRITERS)

    def hang(payloads, chunks):
        if next(num_writes) < NUM_WRITERS:
            hung.wait(GIVE_UP_S)
            assert answers.wait(60)
        return write(payloads, chunks)

    def wait_for(answers, timeout):
        """The deadline passes for the writes that hang, which are the first, and for no others on a busy machine."""
        return real_wait_for(answers, timeout if answers and next(num_waits) < NUM_WRITERS else GIVE_UP_S)

    num_waits, real_wait_for = itertools.count(), sharded_saver.wait_for
    monkeypatch.setattr(sharded_saver, "wait_for", wait_for)
    monkeypatch.setattr(ranks.states[1]._files, "write", hang)
    saver = ranks.open_saver(store, PLANS["hidden"], save_wait=1e6)
    saver._sink._write_deadline_s = 0.2
    uid = ranks.engines[0].open()
    saver.open(uid, seed=SEED, token_ids=[])
    run(ranks, saver, uid, tokens)
    hung.wait(GIVE_UP_S)
    assert saver.drain(30.0)
    there = [store.find(span_id) is not None for span_id, _ in spans_of(SEED, tokens)]
    assert there.count(False) == NUM_WRITERS and all(there[::2]), there
    assert saver.heal(uid, 30.0) and saver.drain(30.0)
    saver.stop()
    answers.set()
    check_saved(store, tokens, MHA)
    wait_until(lambda: not ranks.states[1].parts._writing and not ranks.states[1].parts.num_pending)


def test_a_rank_captures_nothing_of_a_step_without_spans_of_its_own(store, make_ranks, monkeypatch):
    ranks = make_ranks(MHA, 2)
    saver = ranks.open_saver(store, PLANS["hidden"], save_wait=1e6)
    ranks.settle()
    captured = [0, 0]
    for rank, own in enumerate((saver, ranks.states[1].saver)):

        def acquire(num_rows, wait_s=0.0, rank=rank, acquire=own._capture.ring.acquire):
            captured[rank] += num_rows
            return acquire(num_rows, wait_s)

        monkeypatch.setattr(own._capture.ring, "acquire", acquire)
    tokens = path(1, 0, 64 * 5)
    uid = ranks.engines[0].open()
    saver.open(uid, seed=SEED, token_ids=[])
    run(ranks, saver, uid, tokens, pieces=[1])
    assert saver.heal(uid, 30.0) and saver.drain(30.0)
    ranks.settle()
    assert captured == [64 * 3, 64 * 2]
    other = path(2, 0, 64 * 4)
    uid = ranks.engines[0].open()
    saver.open(uid, seed=SEED, token_ids=[])
    run(ranks, saver, uid, other, pieces=[32, 64])  # across borders: all of them
    assert saver.heal(uid, 30.0) and saver.drain(30.0)
    saver.stop()
    for history in (tokens, other):
        check_saved(store, history, MHA)
    assert [counters.get("dropped_rows_total") for counters in ranks.counters] == [0, 0]
