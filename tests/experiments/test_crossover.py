"""The crossover map: the planner wins where the formulas say, and mixing never loses."""

from __future__ import annotations

import itertools
from importlib.util import find_spec

import pytest

from experiments.common import runner
from experiments.common.item import Context
from experiments.common.rows import read_rows
from experiments.crossover import config
from experiments.crossover.config import (
    BALANCES,
    LONG_TOKENS,
    MODELS,
    PURE,
    RATIOS,
    TOKENS,
    balance_of,
    forward,
    hidden_above,
    nominal_cost,
    nominal_model,
    predicted,
    ratio_of,
    recompute_below,
    steps,
)
from experiments.crossover.run import measure, restored, times_s
from mii_hcache.core.platforms import PLATFORMS
from mii_hcache.core.splits import best_mix

NEAR = 0.05
"""Of the best, within which two methods are too close to call: a layer of 32 is 3 %."""
COARSE = list(itertools.product(steps(RATIOS, 5), steps(BALANCES, 5)))


def fastest(times):
    return min(times, key=times.get)


@pytest.mark.parametrize("num_tokens", [TOKENS, LONG_TOKENS])
def test_the_planner_agrees_with_the_formulas_away_from_the_boundaries(num_tokens):
    seen = set()
    for ratio, balance in itertools.product(steps(RATIOS, 17), steps(BALANCES, 17)):
        geometry, cost = nominal_model(ratio), nominal_cost(ratio, balance)
        said = predicted(ratio_of(geometry), balance, num_tokens)
        best, second, _ = sorted(said.values())
        if second > best * (1 + NEAR):
            assert fastest(times_s(PURE, geometry, cost, num_tokens)) == fastest(said), (ratio, balance)
            seen.add(fastest(said))
    assert seen == set(PURE)


def test_the_formulas_give_the_planners_seconds():
    for ratio, balance in COARSE:
        geometry, cost = nominal_model(ratio), nominal_cost(ratio, balance)
        unit_s = geometry.num_layers * TOKENS * cost.io_hidden_s
        said = predicted(ratio_of(geometry), balance, TOKENS)
        for method, took_s in times_s(PURE, geometry, cost, TOKENS).items():
            assert took_s / unit_s == pytest.approx(said[method], rel=0.04), (method, ratio, balance)


def test_both_numbers_are_ratios_of_costs_that_every_profile_has():
    for ratio, balance in COARSE:
        cost, geometry = nominal_cost(ratio, balance), nominal_model(ratio)
        assert cost.io_kv_s / cost.io_hidden_s == pytest.approx(ratio_of(geometry))
        assert cost.c_hidden_s / cost.io_kv_s == pytest.approx(balance)
        assert cost.token_s(TOKENS) / cost.io_hidden_s == pytest.approx(
            forward(ratio_of(geometry), TOKENS) * balance, rel=1e-3
        )
    for name in ("a100-1ssd", "a30-4ssd", "h200-dram"):
        for geometry in MODELS.values():
            cost = PLATFORMS[name].layer_cost(geometry)
            assert balance_of(geometry, PLATFORMS[name]) == pytest.approx(cost.c_hidden_s / cost.io_kv_s)


def test_auto_is_never_slower_than_what_it_is_made_of():
    for ratio, balance in COARSE:
        geometry, cost = nominal_model(ratio), nominal_cost(ratio, balance)
        times = times_s((*PURE, "cake", "auto"), geometry, cost, TOKENS)
        assert times["auto"] <= min(times.values()) * (1 + 1e-9), (ratio, balance)
        bound_s = best_mix(cost, TOKENS).layer_token_s * geometry.num_layers * TOKENS
        assert times["auto"] <= 1.05 * bound_s, "a plan of 32 layers comes near the optimum of the linear model"


def test_hidden_states_enter_the_best_mix_at_a_ratio_that_no_machine_changes():
    start = hidden_above(TOKENS)
    assert 1.0 < hidden_above(LONG_TOKENS) < start < 1.15
    for balance in steps(BALANCES, 9):
        assert best_mix(nominal_cost(0.97 * start, balance), TOKENS).hidden == 0
        assert best_mix(nominal_cost(1.03 * start, balance), TOKENS).hidden > 0

    def gain(ratio):
        took_s = times_s(("cake", "auto"), nominal_model(ratio), nominal_cost(ratio, 0.3), TOKENS)
        return took_s["cake"] / took_s["auto"]

    assert gain(0.25) < 1.04 and gain(0.5) < 1.04 and gain(2.0) > 1.3


def test_faster_reads_never_hurt():
    for method, ratio in itertools.product((*PURE, "auto"), (0.25, 1.0, 2.5)):
        balances = list(steps(BALANCES, 7))
        times = [
            restored(method, nominal_model(ratio), nominal_cost(ratio, balance), TOKENS)[1].timeline.makespan_s
            for balance in balances
        ]
        assert all(fast <= slow * (1 + 1e-9) for slow, fast in itertools.pairwise(times)), (method, ratio)


def test_long_histories_leave_less_to_recomputation():
    for ratio in steps(RATIOS, 7):
        assert recompute_below(ratio, LONG_TOKENS) < recompute_below(ratio, TOKENS)
    below_one = [recompute_below(ratio, TOKENS) for ratio in (0.125, 0.25, 0.5, 1.0)]
    assert below_one == sorted(below_one)


def test_shapes_of_today():
    ratios = {name: ratio_of(geometry) for name, geometry in MODELS.items()}
    assert ratios["Llama-2-7B"] == ratios["OPT-30B"] == ratios["Phi-3-mini"] == ratios["Qwen3-0.6B"] == 2.0
    assert ratios["Llama-3-8B"] == ratios["Mistral-7B"] == ratios["Qwen3-8B"] == 0.5
    assert ratios["Llama-3-70B"] == 0.25 and ratios["Gemma-7B"] == pytest.approx(8 / 3)
    assert list(ratios.values()) == sorted(ratios.values())
    layer_flop = 2 * (2 * 3584 * (3584 + 512) + MODELS["Qwen2.5-7B"].ffn_weights)
    assert layer_flop == pytest.approx(466e6, rel=0.01)


def test_a_table_row_is_what_the_planner_says():
    rows = [row for row in measure(Context(scale="smoke")) if row.panel == "d"]
    assert len(rows) == len(MODELS) * len(config.COLUMNS[::3]) and all(row.y >= 1 - 1e-9 for row in rows)
    row = next(row for row in rows if row.series.startswith("Llama-3-8B") and row.x == "a100-1ssd")
    assert row.series == "Llama-3-8B / kv"


def test_smoke(tmp_path):
    options = [] if find_spec("matplotlib") else ["--no-plots"]
    assert runner.main([*options, "--out", str(tmp_path), "crossover"]) == 0
    rows = read_rows(tmp_path / "crossover.jsonl")
    assert {row.how for row in rows} == {"simulated"} and {row.panel for row in rows} == {"b", "c", "d", "e"}
    for name in ("crossover", "crossover_models") if not options else ():
        assert 1000 < (tmp_path / f"{name}.png").stat().st_size < 200_000
