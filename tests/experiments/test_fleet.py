"""A fleet: the stack distances are an LRU's, nothing is lost, and what must grow with capacity does."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.common import runner
from experiments.common.rows import read_rows
from experiments.fleet.config import (
    DRIVE_WRITES_PER_DAY,
    METHOD_OF,
    MODELS,
    PAUSE_MEDIAN_S,
    ROUNDS_PER_S,
    SSD_SIZES_TB,
    THINK_MEDIAN_S,
)
from experiments.fleet.lru import NEVER, characteristic_times_s, depths, larger_before
from experiments.fleet.run import DAY_S, capacities_tokens, dollars_per_day, outcome, store, watch
from experiments.fleet.traffic import Trace, conversations, think_times_s

TRACE = conversations(2000, 1, seed=1)
WATCHED = watch(TRACE, 1)
GQA = MODELS["Llama-3-8B"]


def trace_of(rounds):
    """(context, new tokens) a second each."""
    held, last, history, previous = {}, {}, [], []
    for idx, (context, new) in enumerate(rounds):
        history.append(held.get(context, 0))
        previous.append(last.get(context, -1))
        held[context], last[context] = history[-1] + new, idx
    return Trace(
        at_s=np.arange(len(rounds), dtype=float),
        history_tokens=np.array(history),
        new_tokens=np.array([new for _, new in rounds]),
        previous=np.array(previous),
        horizon_s=float(len(rounds)),
        num_contexts=len(held),
    )


def lru_hits(trace, capacity_tokens):
    """The plain simulation: contexts in order of use, the oldest go until all fit."""
    kept, names, hits = OrderedDict(), {}, []
    for idx, previous in enumerate(trace.previous):
        name = names[idx] = names.get(previous, idx)
        hits.append(name in kept)
        kept[name] = trace.held_tokens[idx]
        kept.move_to_end(name)
        while sum(kept.values()) > capacity_tokens:
            kept.popitem(last=False)
    return hits


def test_depths_by_hand():
    trace = trace_of([("a", 10), ("b", 20), ("a", 5), ("c", 7), ("b", 1), ("b", 1), ("a", 1)])
    # a: b 20 + a 10; b: a 15 + c 7 + b 20; b again: alone, 21; a: b 22 + c 7 + a 15
    assert depths(trace).tolist() == [NEVER, NEVER, 30, NEVER, 42, 21, 44]


@given(rounds=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 30)), min_size=1, max_size=40))
def test_depths_are_an_lru_of_any_capacity(rounds):
    trace = trace_of(rounds)
    found = depths(trace)
    for capacity in {edge for depth in found.tolist() if depth != NEVER for edge in (depth - 1, depth)}:
        assert (found <= capacity).tolist() == lru_hits(trace, capacity)


def test_depths_of_conversations_are_an_lru():
    trace = conversations(120, 1, seed=2)
    for capacity in (5_000, 50_000, 200_000):
        assert (depths(trace) <= capacity).tolist() == lru_hits(trace, capacity)


@given(order=st.integers(0, 40).flatmap(lambda count: st.permutations(range(count))), seed=st.integers(0, 99))
def test_larger_before(order, seed):
    weights = np.random.default_rng(seed).integers(1, 100, len(order))
    expected = [0] * len(order)
    for place, value in enumerate(order):
        expected[value] = sum(weights[idx] for idx in range(place) if order[idx] > value)
    assert larger_before(np.array(order, dtype=np.int64), weights).tolist() == expected


def test_a_trace_is_in_order_and_adds_up():
    assert (np.diff(TRACE.at_s) >= 0).all() and TRACE.at_s[-1] < TRACE.horizon_s
    later = TRACE.previous >= 0
    assert (TRACE.history_tokens[later] == TRACE.held_tokens[TRACE.previous[later]]).all()
    assert not TRACE.history_tokens[~later].any() and (~later).sum() <= TRACE.num_contexts
    assert (TRACE.gap_s[later] > 0).all() and np.isinf(TRACE.gap_s[~later]).all()
    assert np.isfinite(TRACE.next_s).sum() == later.sum()
    again = conversations(2000, 1, seed=1)
    assert (again.at_s == TRACE.at_s).all() and (conversations(2000, 1, seed=2).at_s[:9] != TRACE.at_s[:9]).any()


def test_the_load_is_what_the_configuration_says():
    trace = conversations(60_000, 1, seed=0)
    late = (trace.at_s > trace.horizon_s / 2).sum() / (trace.horizon_s / 2)
    assert late == pytest.approx(ROUNDS_PER_S, rel=0.05)
    gaps_s = think_times_s(np.random.default_rng(0), 100_000)
    assert THINK_MEDIAN_S < np.median(gaps_s) < 1.3 * THINK_MEDIAN_S
    assert (gaps_s > PAUSE_MEDIAN_S).mean() == pytest.approx(0.05, abs=0.005)


def test_ches_time_stands_for_an_lru():
    trace = conversations(20_000, 1, seed=3)
    since_s, depth = trace.horizon_s / 2, depths(trace)
    returns = (trace.at_s >= since_s) & (trace.previous >= 0)
    capacities = np.geomspace(2e4, 1e7, 9)
    times_s = characteristic_times_s(trace, capacities, since_s=since_s, snapshots=100)
    exact = [(depth[returns] <= capacity).mean() for capacity in capacities]
    che = [(trace.gap_s[returns] <= time_s).mean() for time_s in times_s]
    assert che == pytest.approx(exact, abs=0.03)
    assert exact == sorted(exact) and exact[0] < 0.2 and exact[-1] > 0.9
    assert np.isinf(characteristic_times_s(trace, [1e12], since_s=since_s)).all()


@pytest.mark.parametrize("series", METHOD_OF)
def test_every_return_is_found_somewhere_or_nowhere(series):
    stored = store(GQA, METHOD_OF[series])
    found, wear = [], []
    for ssd_tb in SSD_SIZES_TB:
        capacities = capacities_tokens(GQA, stored, 1e12 * ssd_tb)
        seen = outcome(WATCHED, stored, capacities)
        assert capacities == sorted(capacities)
        assert seen.shares.sum() == pytest.approx(1) and (seen.shares >= 0).all()
        hits = (WATCHED.depth_tokens <= capacities[-1]).sum()
        misses = (WATCHED.depth_tokens > capacities[-1]).sum()
        assert hits + misses == len(WATCHED.history_tokens) == len(seen.took_s)
        assert seen.shares[-1] == pytest.approx(
            WATCHED.history_tokens[WATCHED.depth_tokens > capacities[-1]].sum() / WATCHED.history_tokens.sum()
        )
        found.append(1 - seen.shares[-1])
        wear.append(seen.written_bytes_per_day)
    assert found == sorted(found) and wear == sorted(wear, reverse=True)


def test_what_is_written_is_what_is_new_or_lost():
    kv, nothing = store(GQA, "kv"), store(GQA, "recompute")
    everything = outcome(WATCHED, kv, [0.0, 0.0, float(NEVER)])
    assert everything.written_bytes_per_day == pytest.approx(WATCHED.new_tokens_per_day * kv.bytes_per_token)
    lost = outcome(WATCHED, kv, [0.0, 0.0, 0.0])
    tokens = WATCHED.new_tokens_per_day + WATCHED.history_tokens_per_day
    assert lost.shares.tolist() == pytest.approx([0, 0, 0, 1])
    assert lost.written_bytes_per_day == pytest.approx(tokens * kv.bytes_per_token)
    assert outcome(WATCHED, nothing, [0.0, 0.0, 0.0]).written_bytes_per_day == 0.0
    assert kv.bytes_per_token == 131_072 and nothing.bytes_per_token == 0
    assert everything.gpu_s_per_day == 0.0 < lost.gpu_s_per_day


def test_restores_get_slower_down_the_tiers():
    for series, method in METHOD_OF.items():
        stored = store(MODELS["Llama-2-7B"], method)
        for faster, slower in itertools.pairwise(("GPU", "DRAM", "SSD")):
            assert (stored.took_s[faster] <= stored.took_s[slower] + 1e-9).all(), series
    auto = store(MODELS["Llama-2-7B"], "auto")
    assert (auto.took_s["SSD"] <= auto.took_s["nowhere"] * (1 + 1e-9)).all()


def test_a_worn_drive_costs_more():
    seen = outcome(WATCHED, store(MODELS["Llama-2-7B"], "kv"), [0.0, 0.0, 0.0])
    assert seen.written_bytes_per_day > DRIVE_WRITES_PER_DAY * 1e12

    def dollars(ssd_tb, **changes):
        return dollars_per_day(seen, ssd_tb, **{"has_store": True, "counts_waiting": False, **changes})

    assert dollars(0.5) == pytest.approx(dollars(1)), "half the drive wears out twice as fast"
    assert dollars(1, has_store=False) < dollars(1) <= dollars(1, counts_waiting=True)
    idle = outcome(WATCHED, store(MODELS["Llama-2-7B"], "kv"), [0.0, 0.0, float(NEVER)])
    assert idle.gpu_s_per_day == 0 < idle.busy_s_per_day
    assert WATCHED.history_tokens_per_day > 0 and DAY_S == 86400


def test_smoke(tmp_path):
    options = [] if find_spec("matplotlib") else ["--no-plots"]
    assert runner.main([*options, "--out", str(tmp_path), "fleet"]) == 0
    rows = read_rows(tmp_path / "fleet.jsonl")
    assert {row.how for row in rows} == {"simulated"} and {row.panel for row in rows} == set("abcdefghijklmn")
    for name in ("fleet", "fleet_llama2", "fleet_llama3") if not options else ():
        assert 1000 < (tmp_path / f"{name}.png").stat().st_size < 200_000
