"""Costs follow observations, slowly, within bounds; penalties bite and fade."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mii_hcache.core.cost import LayerCost
from mii_hcache.core.estimate import MAX_FACTOR, MAX_STEP, PENALTY_HALF_LIFE_S, CostEstimate

BASE = LayerCost(
    io_hidden_s=1e-6, io_kv_s=2e-6, c_hidden_s=1e-6, c_kv_s=1e-7, c_token_s=6e-6, c_attention_s=1e-9, io_start_s=1e-4
)
SLOW = LayerCost(io_hidden_s=4e-6, io_kv_s=8e-6, c_hidden_s=1e-6, c_token_s=6e-6)


def _estimate() -> CostEstimate:
    return CostEstimate({"memory": BASE, "file": SLOW})


def test_starts_from_the_profile():
    assert _estimate().cost(["memory"] * 3, 0.0) == BASE
    assert _estimate().cost([], 0.0) == BASE
    assert _estimate().cost(["unheard of"], 0.0) == BASE


def test_spans_that_are_nowhere_weigh_nothing():
    """Gaps count neither for nor against a tier, or what is learned of one would drift with the share of gaps."""
    assert _estimate().cost(["tiered", "file", "tiered"], 0.0) == _estimate().cost(["file"], 0.0)


def test_several_tiers_are_weighted_by_their_spans():
    cost = _estimate().cost(["memory", "file", "file", "file"], 0.0)
    assert cost.io_hidden_s == pytest.approx(0.25e-6 + 3e-6)


def test_follows_what_is_observed_within_a_few_dozen_restores():
    estimate = _estimate()
    for _ in range(60):
        expected_s = estimate.factors["read file"] * 1.0
        estimate.observe_read("file", expected_s, 3.0)
        estimate.observe_compute("project", estimate.factors["project"] * 1.0, 0.5)
    cost = estimate.cost(["file"], 0.0)
    assert cost.io_kv_s == pytest.approx(3 * SLOW.io_kv_s, rel=0.06)
    assert cost.c_hidden_s == pytest.approx(0.5 * SLOW.c_hidden_s, rel=0.06)
    assert estimate.cost(["memory"], 0.0).io_kv_s == BASE.io_kv_s, "the other tier learnt nothing"
    assert cost.c_token_s == SLOW.c_token_s


def test_one_odd_observation_moves_little():
    estimate = _estimate()
    estimate.observe_read("file", 1.0, 1e6)
    assert 1.0 < estimate.factors["read file"] <= MAX_STEP**0.2 * 1.001


@given(st.lists(st.tuples(st.floats(0, 1e9), st.floats(0, 1e9)), max_size=300))
def test_cannot_run_away(observations):
    estimate = _estimate()
    for expected_s, observed_s in observations:
        estimate.observe_read("file", expected_s, observed_s)
        estimate.observe_compute("fill", expected_s, observed_s)
    for factor in estimate.factors.values():
        assert 1 / MAX_FACTOR <= factor <= MAX_FACTOR
    estimate.cost(["file"], 0.0)


def test_a_penalty_makes_reads_dearer_and_fades():
    estimate = _estimate()
    estimate.punish("file", 4.0, 100.0)
    assert estimate.cost(["file"], 100.0).io_kv_s == pytest.approx(4 * SLOW.io_kv_s, rel=0.03)
    assert estimate.cost(["file"], 100.0 + PENALTY_HALF_LIFE_S).io_kv_s == pytest.approx(2 * SLOW.io_kv_s, rel=0.03)
    assert estimate.cost(["file"], 100.0 + 20 * PENALTY_HALF_LIFE_S).io_kv_s == SLOW.io_kv_s
    assert estimate.factors["read file"] == 1.0


def test_costs_change_in_steps_so_that_plans_can_be_remembered():
    estimate = _estimate()
    costs = set()
    for step in range(200):
        estimate.observe_read("file", 1.0, 1.0 + 1e-4 * (step % 7))
        costs.add(estimate.cost(["file"], 0.0))
    assert len(costs) <= 2
