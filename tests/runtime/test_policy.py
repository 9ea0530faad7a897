"""The policy follows load, observations and regret, and decides nothing where a method needs no costs."""

from __future__ import annotations

import pytest

from mii_hcache.core.cost import LayerCost
from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind
from mii_hcache.core.methods import METHODS
from mii_hcache.errors import ConfigError
from mii_hcache.runtime.policy import RestorePolicy, make_policy
from mii_hcache.runtime.stats import Counters
from tests.runtime.kit import FakeBlocks, FakeEngine, FakeStore, geometry_of, open_restorer, path

NUM_SPANS = 8
TOKENS = path(1, 0, NUM_SPANS * SPAN_TOKENS)
READS_WIN = LayerCost(io_hidden_s=1e-7, io_kv_s=2e-7, c_hidden_s=1e-7, c_kv_s=1e-8, c_token_s=1e-6)


def _policy(method: str = "auto", costs: LayerCost | None = READS_WIN, **settings) -> RestorePolicy:
    return make_policy(
        **{
            "method": METHODS[method],
            "geometry": geometry_of(),
            "costs": None if costs is None else {"fake": costs},
            "max_context_tokens": 4096,
            "counters": Counters(),
            "max_fill_tokens": 128,
            **settings,
        }
    )


def _records(kind: ChunkKind = ChunkKind.KV):
    return FakeStore().add(TOKENS, [kind] * NUM_SPANS, geometry_of())


@pytest.mark.parametrize("method", ["hidden", "kv"])
def test_a_method_without_costs_restores_everything(method):
    policy = _policy(method, costs=None)
    choice = policy.choose(_records(ChunkKind(method)), ["fake"] * NUM_SPANS, compute_share=0.01, num_others=5)
    assert (choice.recompute_tokens, choice.plan, choice.is_prefill) == (0, None, False)
    assert choice.recompute_layers == (1 if method == "hidden" else 0)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.needs_costs])
def test_methods_that_plan_say_what_they_need(method):
    with pytest.raises(ConfigError, match="was not measured"):
        _policy(method, costs=None)
    with pytest.raises(ConfigError, match="this engine cannot"):
        _policy(method, max_fill_tokens=0)


def test_nothing_is_saved_where_computing_always_wins():
    dear = LayerCost(io_hidden_s=1.0, io_kv_s=1.0, c_hidden_s=1.0, c_token_s=1e-9)
    assert _policy(costs=dear).storage is None


def test_an_engine_that_is_busy_prefills_what_an_idle_one_restores():
    policy, tiers = _policy(), ["fake"] * NUM_SPANS
    assert not policy.choose(_records(), tiers).is_prefill
    assert not policy.choose(_records(), tiers, compute_share=0.5).is_prefill
    assert policy.choose(_records(), tiers, compute_share=2.0**-9).is_prefill


def test_other_restores_take_their_part_of_the_bandwidth():
    costs = LayerCost(io_hidden_s=4e-7, io_kv_s=8e-7, c_hidden_s=1e-7, c_kv_s=1e-8, c_token_s=1e-6)
    policy, tiers = _policy(costs=costs), ["fake"] * NUM_SPANS
    alone = policy.choose(_records(), tiers).plan.timeline
    shared = policy.choose(_records(), tiers, num_others=3).plan.timeline
    assert shared.makespan_s > alone.makespan_s
    assert policy.choose(_records(), tiers, num_others=30).is_prefill or shared.compute_s > alone.compute_s


def _restored(policy: RestorePolicy, read_s: float):
    """A finished restore whose reads took so long."""
    engine, store = FakeEngine(geometry_of()), FakeStore()
    records = store.add(TOKENS, [ChunkKind.KV] * NUM_SPANS, engine.geometry)
    choice = policy.choose(records, ["fake"] * NUM_SPANS)
    store.read_delays = iter(lambda: read_s, None)
    restorer = open_restorer(engine, store)
    restore = restorer.start(FakeBlocks(engine), records, TOKENS, recompute_tokens=choice.recompute_tokens)
    while restore.step(60.0, wait=True) is None:
        pass
    restorer.stop()
    return choice, restore, records


def test_a_restore_that_prefilling_beats_changes_the_next_plan():
    policy = _policy()
    choice, restore, records = _restored(policy, read_s=0.005)
    policy.learn(choice, restore, records)
    assert policy._counters.get("regretted_restores_total") == 1
    assert choice.recompute_tokens == 0
    assert policy.choose(records, choice.tiers).recompute_tokens > len(TOKENS) / 2
    assert policy.estimate.factors["read fake"] > 1


def test_a_baseline_is_what_it_is_known_for():
    policy = _policy(method="naive-hybrid")
    for _ in range(20):
        choice, restore, records = _restored(policy, read_s=0.005)
        policy.learn(choice, restore, records)
    assert policy._counters.get("regretted_restores_total") == 0
    assert policy.estimate.penalty("fake", 0.0) == 1.0 and not policy.choose(records, choice.tiers).is_prefill


def test_a_restore_that_was_worth_it_is_planned_again():
    costs = LayerCost(io_hidden_s=1e-2, io_kv_s=2e-2, c_hidden_s=1e-5, c_kv_s=1e-6, c_token_s=10.0)
    policy = _policy(costs=costs)
    choice, restore, records = _restored(policy, read_s=0.002)
    policy.learn(choice, restore, records)
    assert policy._counters.get("regretted_restores_total") == 0
    assert not policy.choose(records, choice.tiers).is_prefill
    assert policy.estimate.factors["read fake"] < 1, "reads were faster than the profile said"


def test_prefills_teach_what_prefills_take():
    policy = _policy()
    took_s = 5 * geometry_of().num_layers * READS_WIN.forward_s(0, 4096)
    for _ in range(60):
        policy.learn_prefill(0, 4096, took_s)
    assert policy.estimate.factors["fill"] == pytest.approx(5, rel=0.1)
    assert policy.estimate.factors["project"] == 1


def test_nothing_to_learn_from_is_no_error():
    policy = _policy(costs=LayerCost(io_hidden_s=0.0, io_kv_s=0.0, c_hidden_s=0.0, c_token_s=1e-3))
    choice, restore, records = _restored(policy, read_s=0.0)
    policy.learn(choice, restore, records)
    restore.timeline.events.clear()
    policy.learn(choice, restore, records)
