"""Damage, losses and hangs on one rank of several: all fall back together, and nothing wrong is kept or placed."""

from __future__ import annotations

import itertools
import threading

import pytest

from mii_hcache.core.identity import spans_of
from mii_hcache.errors import RankLostError
from mii_hcache.runtime import sharded_saver
from mii_hcache.runtime.following_saver import NUM_WRITERS
from mii_hcache.runtime.following_tiles import NUM_READERS
from tests.runtime.kit import GIVE_UP_S, SEED, path, wait_until
from tests.runtime.ranks_kit import spans_in
from tests.runtime.sharded_kit import MHA, MIXED, PLANS, check_saved, damage, run, save


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
