"""The paper's schedules from its own numbers (`paper.md` 3.4, 3.5), its ablations, and the linear model's optimum."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mii_hcache.core.cost import LayerCost
from mii_hcache.core.geometry import ChunkKind, ModelGeometry
from mii_hcache.core.layout import first_stored
from mii_hcache.core.makespan import Timeline
from mii_hcache.core.methods import METHODS, plan_storage
from mii_hcache.core.plans import RestorePlan, StoragePlan, runs_of
from mii_hcache.core.splits import best_mix, hcache_split, naive_split
from mii_hcache.errors import ConfigError
from tests.core.planner_kit import (
    LLAMA_2_7B,
    LLAMA_2_13B,
    OPT_30B,
    PAPER_7B_1SSD,
    PAPER_7B_4SSD,
    PAPER_7B_4SSD_24GB,
    PAPER_13B_1SSD,
    PAPER_13B_4SSD,
    PAPER_30B_4SSD,
    costs,
    linear_costs,
)

H, KV = ChunkKind.HIDDEN, ChunkKind.KV
N = 1024


def plan_of(method: str, geometry: ModelGeometry, cost: LayerCost) -> tuple[StoragePlan, RestorePlan]:
    stored = plan_storage(method, geometry, cost, lengths=[N], tile_tokens=64)
    return stored, METHODS[method].restore(cost, stored.runs(N // 64), N, 64, None)


@pytest.mark.parametrize(
    ("geometry", "cost", "closed_form", "ceiled", "summary"),
    [
        (LLAMA_2_13B, PAPER_13B_4SSD, 35.47, 36, "35H+5KV"),
        (LLAMA_2_13B, PAPER_13B_1SSD, 30.51, 31, "9RE+31H"),
        (LLAMA_2_7B, PAPER_7B_4SSD, 29.9, 30, "30H+2KV"),
        (LLAMA_2_7B, PAPER_7B_4SSD_24GB, 31.86, 32, "32H"),
        (LLAMA_2_7B, PAPER_7B_1SSD, 22.8, 23, "9RE+23H"),
        (OPT_30B, PAPER_30B_4SSD, 40.7, 41, "7RE+41H"),
    ],
    ids=["13B 4 SSD", "13B 1 SSD", "7B 4 SSD, 81K", "7B 4 SSD, 24 GB/s", "7B 1 SSD", "30B 4 SSD"],
)
def test_equation_11(geometry, cost, closed_form, ceiled, summary):
    """`paper.md` 3.5. The paper has 36H+4KV, 31H+9RE, 31H+1KV (between the two), nothing, 40H+8RE (one layer off)."""
    split = hcache_split(cost, geometry.num_layers, N)
    assert split.closed_form == pytest.approx(closed_form, abs=0.1)
    assert split.ceiled == ceiled
    stored, plan = plan_of("hcache", geometry, cost)
    assert stored.summary == summary
    assert stored.closed_form == split.closed_form
    assert (plan.recompute_tokens, plan.recompute_layers) == (0, first_stored(stored.kinds))


def test_rounding_down_is_said():
    """Equation 10 at 13B with 4 SSDs: 35 hidden layers are 0.3 % faster than the paper's 36."""
    stored, _ = plan_of("hcache", LLAMA_2_13B, PAPER_13B_4SSD)
    assert stored.note == "35 layers, rounded down from 35.50, are faster than the paper's 36"
    assert plan_of("hcache", LLAMA_2_13B, PAPER_13B_1SSD)[0].note == ""


@pytest.mark.parametrize(
    ("geometry", "kinds", "hidden_kib", "kv_kib", "ratio"),
    [
        (LLAMA_2_7B, (*(H,) * 31, KV), 264, 512, 1.94),
        (LLAMA_2_13B, (*(H,) * 36, *(KV,) * 4), 440, 800, 1.82),
        (OPT_30B, (*(None,) * 8, *(H,) * 40), 560, 1344, 2.40),
    ],
    ids=["31H+1KV", "36H+4KV", "40H+8RE"],
)
def test_table_3_in_bytes(geometry, kinds, hidden_kib, kv_kib, ratio):
    """The paper prints Ki-elements: half of this."""
    kv = plan_storage("kv", geometry, PAPER_7B_4SSD, tile_tokens=64).bytes_per_token(geometry)
    stored = StoragePlan(method="hcache", kinds=kinds).bytes_per_token(geometry)
    assert (stored, kv) == (1024 * hidden_kib, 1024 * kv_kib)
    assert kv / stored == pytest.approx(ratio, abs=0.005)


@pytest.mark.parametrize(
    ("geometry", "cost", "ratio"),
    [
        (LLAMA_2_7B, PAPER_7B_4SSD_24GB, 2.00),
        (LLAMA_2_7B, PAPER_7B_4SSD, 1.88),
        (LLAMA_2_13B, PAPER_13B_4SSD, 1.78),
        (LLAMA_2_13B, PAPER_13B_1SSD, 2.58),
        (OPT_30B, PAPER_30B_4SSD, 2.34),
    ],
)
def test_table_3_from_the_plans(geometry, cost, ratio):
    """Around the paper's 1.94, 1.82 and 2.40: each within a layer of its schedule."""
    hcache, kv = (plan_of(method, geometry, cost)[0].bytes_per_token(geometry) for method in ("hcache", "kv"))
    assert kv / hcache == pytest.approx(ratio, abs=0.01)


@pytest.mark.parametrize(
    ("geometry", "cost", "measured", "rel"),
    [
        (LLAMA_2_13B, PAPER_13B_4SSD, {"kv": 29.9, "recompute": 8.37, "naive-hybrid": 35.7, "hcache": 51.0}, 0.09),
        (LLAMA_2_13B, PAPER_13B_1SSD, {"kv": 8.81, "recompute": 8.37, "hcache": 22.3}, 0.06),
        (LLAMA_2_7B, PAPER_7B_1SSD, {"kv": 13.6, "recompute": 15.6, "naive-hybrid": 28.5, "hcache": 36.3}, 0.07),
        (OPT_30B, PAPER_30B_4SSD, {"kv": 14.1, "recompute": 10.6, "hcache": 29.6}, 0.14),
    ],
    ids=["13B 4 SSD", "13B 1 SSD", "7B 1 SSD", "30B 4 SSD"],
)
def test_speeds_of_figures_11_and_12(geometry, cost, measured, rel):
    """Thousand tokens per second as read off the figures; two linear resources come within 3 to 14 %."""
    for method, speed in measured.items():
        timeline = plan_of(method, geometry, cost)[1].timeline
        assert N / timeline.makespan_s / 1e3 == pytest.approx(speed, rel=rel), method


def test_hidden_states_beat_the_naive_hybrid_by_the_papers_factor():
    """1.28 to 1.42 (section 6.3.1)."""
    for geometry, cost in ((LLAMA_2_13B, PAPER_13B_4SSD), (LLAMA_2_7B, PAPER_7B_1SSD)):
        naive, hcache = (plan_of(method, geometry, cost)[1].timeline for method in ("naive-hybrid", "hcache"))
        assert 1.25 < naive.makespan_s / hcache.makespan_s < 1.50


def test_the_naive_hybrid_adds_speeds():
    """KV speed plus recompute speed (`paper.md` 3.5), before rounding to layers."""
    split = naive_split(PAPER_13B_4SSD, 40, N)
    assert 40 / split.closed_form * 29.9 == pytest.approx(29.9 + 8.37, rel=0.001)
    stored, plan = plan_of("naive-hybrid", LLAMA_2_13B, PAPER_13B_4SSD)
    assert stored.summary in ("8RE+32KV", "9RE+31KV") and plan.recompute_layers == first_stored(stored.kinds)


def test_figure_13():
    """1,024 tokens of 13B, 1 SSD: 794 hidden tokens, rounded 768; layer-wise is 31H+9RE."""
    _, plan = plan_of("token-wise", LLAMA_2_13B, PAPER_13B_1SSD)
    assert plan.closed_form == pytest.approx(794, rel=0.02)
    assert plan.num_tokens - plan.recompute_tokens == 832
    stored, rounded = plan_of("token-wise-rounded", LLAMA_2_13B, PAPER_13B_1SSD)
    assert rounded.num_tokens - rounded.recompute_tokens == 768
    assert stored.summary == "40H"


def test_token_wise_with_kv_stores_some_spans_as_kv():
    stored, plan = plan_of("token-wise", LLAMA_2_13B, PAPER_13B_4SSD)
    assert stored.other_share == pytest.approx(1 - 35.5 / 40, abs=0.001)
    spans = [stored.kinds_of(span) for span in range(800)]
    assert spans.count((KV,) * 40) == pytest.approx(800 * stored.other_share, abs=1)
    assert stored.runs(800) == runs_of(spans)
    assert plan.recompute_tokens == plan.recompute_layers == 0
    hidden, kv = 40 * 10240, 40 * 20480
    assert stored.bytes_per_token(LLAMA_2_13B) == pytest.approx(hidden + stored.other_share * (kv - hidden))
    rounded = plan_of("token-wise-rounded", LLAMA_2_13B, PAPER_13B_4SSD)[0]
    assert rounded.other_share == 0.0 and rounded.closed_form == stored.closed_form  # 909 tokens: nearest is all


def test_pure_methods():
    cost = PAPER_7B_4SSD
    hidden, plan = plan_of("hidden", LLAMA_2_7B, cost)
    assert hidden.kinds == (None, *(H,) * 31) and plan.recompute_layers == 1
    assert plan.timeline.io_s == pytest.approx(31 * N * cost.io_hidden_s)
    assert plan.timeline.compute_s == pytest.approx(32 * N * cost.c_hidden_s)
    kv, plan = plan_of("kv", LLAMA_2_7B, cost)
    assert kv.kinds == (KV,) * 32 and plan.recompute_layers == 0
    assert plan.timeline.makespan_s == pytest.approx(32 * N * cost.io_kv_s)
    nothing, plan = plan_of("recompute", LLAMA_2_7B, cost)
    assert nothing.bytes_per_token(LLAMA_2_7B) == 0 and plan.is_prefill
    assert plan.timeline.makespan_s == pytest.approx(32 * N * cost.c_token_s)
    ideal, plan = plan_of("ideal", LLAMA_2_7B, cost)
    assert ideal.bytes_per_token(LLAMA_2_7B) == 0 and plan.timeline.makespan_s == 0 and not plan.is_prefill


def test_cake_meets_in_the_middle():
    stored, plan = plan_of("cake", LLAMA_2_13B, PAPER_13B_1SSD)
    assert stored.kinds == (KV,) * 40 and plan.recompute_layers == 0
    share = PAPER_13B_1SSD.io_kv_s / (PAPER_13B_1SSD.io_kv_s + PAPER_13B_1SSD.c_token_s)
    assert plan.recompute_tokens == pytest.approx(N * share, abs=64)


def test_every_method_has_a_name_and_a_plan():
    for name, method in METHODS.items():
        stored, plan = plan_of(name, LLAMA_2_13B, PAPER_13B_4SSD)
        assert method.name == stored.method == name and method.summary
        assert plan.num_tokens == N


# --- the linear model -----------------------------------------------------------------------------------------------


def busier_s(cost: LayerCost, shares: Sequence[float]) -> float:
    hidden, kv, recompute = shares
    io_s = hidden * cost.io_hidden_s + kv * cost.io_kv_s
    compute_s = hidden * cost.c_hidden_s + kv * cost.c_kv_s + recompute * cost.token_s(N)
    return max(io_s, compute_s)


@settings(deadline=None)
@given(linear_costs, st.lists(st.floats(0.001, 1), min_size=3, max_size=3))
def test_no_mix_of_three_beats_the_best_of_two(cost, weights):
    mix = best_mix(cost, N)
    shares = [mix.hidden, mix.kv, mix.recompute]
    assert sum(shares) == pytest.approx(1) and min(shares) >= 0 and 0.0 in shares
    assert busier_s(cost, shares) == pytest.approx(mix.layer_token_s)
    assert mix.layer_token_s <= busier_s(cost, [weight / sum(weights) for weight in weights]) * (1 + 1e-9)


def test_the_optimum_uses_what_fits():
    assert best_mix(PAPER_13B_4SSD, N).recompute == 0
    assert best_mix(PAPER_13B_1SSD, N).kv == 0
    grouped = LayerCost(io_hidden_s=2.0, io_kv_s=1.0, c_hidden_s=0.1, c_token_s=3.0)
    assert best_mix(grouped, N).hidden == 0


@settings(deadline=None)
@given(costs, st.floats(1.01, 4))
def test_equation_11_is_the_best_of_its_two_methods(cost, kv_to_hidden):
    """Both resources end together, so one layer more or less is no better: as long as a kv row is the larger one."""
    cost = dataclasses.replace(cost, io_kv_s=kv_to_hidden * cost.io_hidden_s, c_kv_s=0.0)
    split = hcache_split(cost, 32, N)
    assert 0 <= split.closed_form <= 32 and split.ceiled - 1 <= split.best <= split.ceiled

    def linear_s(num_hidden: int) -> float:
        rest = 32 - num_hidden
        is_kv = cost.c_hidden_s > cost.io_hidden_s
        return busier_s(cost, (num_hidden, rest, 0) if is_kv else (num_hidden, 0, rest))

    assert linear_s(split.best) <= min(map(linear_s, range(33))) * (1 + 1e-9)


# --- plans as values ------------------------------------------------------------------------------------------------

NO_TIME = Timeline(io_s=0, compute_s=0, makespan_s=0)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"num_tokens": 100}, "num_tokens must be a multiple of 64, got 100"),
        ({"recompute_tokens": 10}, "recompute_tokens must be a multiple of 64, got 10"),
        ({"recompute_tokens": -64}, "recompute_tokens must be a multiple of 64"),
        ({"recompute_tokens": 192}, "recompute_tokens must be at most 128"),
        ({"recompute_layers": -1}, "recompute_layers must be >= 0"),
    ],
)
def test_a_restore_plan_that_cannot_be(changes, complaint):
    with pytest.raises(ConfigError, match=complaint):
        RestorePlan(
            **{"num_tokens": 128, "recompute_tokens": 64, "recompute_layers": 1, "timeline": NO_TIME, **changes}
        )


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"kinds": ()}, "kinds must name a layer"),
        ({"other_share": 0.5}, "other_share must be 0 without other_kinds"),
        ({"other_kinds": (KV,), "other_share": 1.5}, "other_share must be between 0 and 1"),
        ({"other_kinds": (KV, KV), "other_share": 0.5}, "other_kinds must have 1 layers"),
    ],
)
def test_a_storage_plan_that_cannot_be(changes, complaint):
    with pytest.raises(ConfigError, match=complaint):
        StoragePlan(**{"method": "auto", "kinds": (H,), **changes})


def test_spans_take_turns():
    plan = StoragePlan(method="token-wise", kinds=(H,), other_kinds=(KV,), other_share=0.25)
    assert [plan.kinds_of(span)[0] for span in range(8)] == [H, H, H, KV, H, H, H, KV]
    assert plan.runs(5) == (((H,), 3), ((KV,), 1), ((H,), 1))
    assert plan.runs(0) == () and StoragePlan(method="kv", kinds=(KV,)).runs(0) == ()
    assert plan.summary == "1H or 25% 1KV"


def test_the_first_layer_that_is_stored():
    assert [first_stored(kinds) for kinds in ((H, KV), (None, H), (H, None), (None, None))] == [0, 1, 2, 2]
