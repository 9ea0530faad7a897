"""On which directories ranks put their shares of spans."""

from __future__ import annotations

import pytest

from mii_hcache.storage.open_striped import open_striped
from mii_hcache.storage.stripe_set import StripeSet
from tests.runtime.kit import path
from tests.runtime.ranks_kit import spans_in
from tests.runtime.sharded_kit import HIDDEN, MHA, PLANS, check_saved, save


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
    # room for all: nothing is dropped and healed
    save(ranks, store, PLANS["hidden"], histories, ring_batches=8)
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
    save(ranks, store, PLANS["kv"], [tokens], save_wait=1e6)
    assert [one.store.stats().num_spans for one in store.paths] == [6, 6]
    assert set(ranks.moved) == {(1, "a"), (1, "b")}
    check_saved(store, tokens, MHA)
    store.close()
