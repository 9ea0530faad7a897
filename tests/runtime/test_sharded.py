"""Ranks save and restore a model's state together: each its share, all the same spans, or none."""

from __future__ import annotations

import pytest

from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind
from mii_hcache.core.identity import spans_of
from mii_hcache.core.plans import uniform_storage
from mii_hcache.runtime.lookup import look_up
from mii_hcache.runtime.share import Share
from tests.runtime.kit import SEED, FakeEngine, open_saver, path, wait_until
from tests.runtime.ranks_kit import spans_in
from tests.runtime.sharded_kit import GQA, HIDDEN, KV, LENGTHS, MHA, MIXED, PLANS, check_saved, run, save


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
