"""Whatever the plan, the tokens are those of a context that never left; and a hit is never slower than a miss twice.

Freed blocks hold NaN in every test here, and the norm reuses its output buffer.
"""

from __future__ import annotations

import json
import random

import pytest

from mii_hcache.core.cost import LayerCost
from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind
from mii_hcache.core.methods import METHODS
from mii_hcache.core.plans import StoragePlan
from mii_hcache.runtime.policy import RestoreChoice, RestorePolicy
from mii_hcache.runtime.restore import Restore
from mii_hcache.runtime.restorer import Restorer
from mii_hcache.storage.memory import MemoryStore
from mii_hcache.storage.throttled import ThrottledStore
from tests.engine_kit import VOCAB, Client, answers, interleave, open_client, poisoned_engine, restorable

READS_DEAR = LayerCost(io_hidden_s=2e-5, io_kv_s=4e-5, c_hidden_s=5e-6, c_kv_s=1e-7, c_token_s=3e-5)
"""Hidden states, and a part recomputed while they are read."""
READS_CHEAP = LayerCost(io_hidden_s=2e-6, io_kv_s=4e-6, c_hidden_s=5e-6, c_kv_s=1e-7, c_token_s=3e-5)
"""Some layers as K and V, because projecting takes longer than reading."""
COSTS = {"dear": READS_DEAR, "cheap": READS_CHEAP}


@pytest.fixture(scope="module")
def never_evicted(tiny_model):
    """Answers of a server that saves nothing and evicts nothing."""
    known: dict[str, list] = {}

    def of(family: str) -> list:
        if family not in known:
            engine = poisoned_engine(tiny_model(family), num_blocks=900, max_batch_tokens=256)
            client = open_client(engine, method="recompute", keep="none")
            known[family] = answers(_talk(client))
            client.service.close()
        return known[family]

    return of


def _talk(client: Client) -> list:
    return interleave(client, 4, 3, num_tokens=45)


@pytest.mark.parametrize(
    ("method", "costs"),
    [
        (name, costs)
        for name, method in METHODS.items()
        for costs in COSTS
        if name != "ideal" and (method.needs_costs or costs == "dear")  # who asks for none has one way
    ],
)
@pytest.mark.parametrize("family", ["llama", "llama-gqa"])
def test_every_method_gives_the_same_tokens(tiny_model, never_evicted, family, method, costs):
    engine = poisoned_engine(tiny_model(family), max_batch_tokens=256)
    client = open_client(engine, method=method, keep="none", costs={"memory": COSTS[costs]})
    conversations = _talk(client)
    metrics = client.service.metrics()
    client.service.close()
    assert answers(conversations) == never_evicted(family)
    assert metrics.get("restore_errors_total", 0) == 0
    if METHODS[method].saves:
        assert metrics["restored_tokens_total"] > 0
    for conversation in conversations:
        for before, turn in zip(conversation.turns, conversation.turns[1:], strict=False):
            report = turn.report
            brought = report.restored_tokens + report.recomputed_tokens
            assert brought + report.prefill_tokens == turn.prompt_tokens
            if METHODS[method].saves and report.miss_reason != "slower":
                assert brought == restorable(before)


@pytest.fixture
def nothing_learnt(monkeypatch):
    """Plans are those of the given costs, however fast this machine is just now."""
    for name in ("learn", "learn_prefill"):
        monkeypatch.setattr(RestorePolicy, name, lambda self, *args: None)


def test_the_default_plans_mix_ways(tiny_model, nothing_learnt):
    """Or the test above would compare one way with itself."""
    ways = {}
    for name, cost in COSTS.items():
        engine = poisoned_engine(tiny_model("llama"), max_batch_tokens=256)
        client = open_client(engine, method="auto", keep="none", costs={"memory": cost})
        reports = [turn.report for conversation in _talk(client) for turn in conversation.turns]
        ways[name] = {report.method for report in reports}
        client.service.close()
    assert "hidden+recompute" in ways["dear"]
    assert "hidden+kv" in ways["cheap"]


class RandomPolicy(RestorePolicy):
    """Any storage, any restore that it allows."""

    def __init__(self, num_layers: int, seed: int, **settings) -> None:
        self.chance = random.Random(seed)
        self.num_layers = num_layers
        super().__init__(storage=self._storage(), estimate=None, **settings)

    def _storage(self) -> StoragePlan:
        def kinds() -> tuple[ChunkKind | None, ...]:
            first = self.chance.choice([0, 0, 1, 1, 2, self.num_layers - 1])
            stored = [self.chance.choice([*ChunkKind]) for _ in range(self.num_layers - first)]
            return (None,) * first + tuple(stored)

        return StoragePlan(method="random", kinds=kinds(), other_kinds=kinds(), other_share=self.chance.random())

    def choose(self, records, tiers, *, compute_share=1.0, num_others=0) -> RestoreChoice:
        return RestoreChoice(
            recompute_tokens=SPAN_TOKENS * self.chance.randint(0, len(records)),
            recompute_layers=self.chance.choice([0, 0, 1, 2, self.num_layers]),
            tiers=tuple(tiers),
            plan=None,
        )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("family", ["llama", "llama-gqa", "opt", "qwen3"])
def test_random_plans_give_the_same_tokens(tiny_model, never_evicted, monkeypatch, family, seed):
    engine = poisoned_engine(tiny_model(family), max_batch_tokens=256, num_blocks=400 if seed % 2 else 70)
    policies = []

    def make_policy(*, costs, max_context_tokens, max_fill_tokens, pieces, **settings):
        policies.append(RandomPolicy(engine.geometry.num_layers, seed, tile_tokens=512, chunk_tokens=256, **settings))
        return policies[0]

    monkeypatch.setattr("mii_hcache.engine.service.make_policy", make_policy)
    client = open_client(engine, keep="none")
    conversations = _talk(client)
    metrics = client.service.metrics()
    client.service.close()
    assert answers(conversations) == never_evicted(family), policies[0].storage
    assert metrics.get("restore_errors_total", 0) == 0
    assert metrics["restored_tokens_total"] + metrics["recomputed_tokens_total"] > 0
    assert client.service.metrics()["blocks_free"] == engine.num_blocks


def test_a_restore_that_should_not_have_been_is_not_done_again(tiny_model, never_evicted):
    """The profile says that reads are nearly free; in truth they crawl."""
    wrong = LayerCost(io_hidden_s=1e-9, io_kv_s=2e-9, c_hidden_s=1e-7, c_token_s=2e-6)
    engine = poisoned_engine(tiny_model("llama"), max_batch_tokens=256)
    store = ThrottledStore(MemoryStore(1 << 30), 2e6)
    client = open_client(engine, store=store, method="auto", keep="none", costs={"memory": wrong})
    history = random.Random(1).choices(range(3, VOCAB), k=600)
    tokens = []
    reports = []
    for turn in range(4):
        result = client.ask([*history, 5, 6, 7, turn], 4)
        client.service.drain_saves()
        tokens.append(result.token_ids)
        reports.append(result.report)
        store._throttle._bytes_per_s = 2e6 * min(1.0, 0.1 / (1e-3 * reports[0].ttft_ms))  # also on a slow machine
    metrics = client.service.metrics()
    client.service.close()
    assert reports[1].restored_tokens > 0 and reports[1].restore_ms > reports[0].ttft_ms
    assert metrics["regretted_restores_total"] >= 1
    assert [report.restored_tokens for report in reports[2:]] == [0, 0]
    assert reports[2].miss_reason == "slower"
    plain = open_client(poisoned_engine(tiny_model("llama"), max_batch_tokens=256), method="recompute", keep="none")
    assert tokens == [plain.ask([*history, 5, 6, 7, turn], 4).token_ids for turn in range(4)]
    plain.service.close()


def test_every_restore_leaves_its_timeline_in_the_trace(tiny_model, tmp_path, nothing_learnt):
    engine = poisoned_engine(tiny_model("llama"), max_batch_tokens=256)
    trace = tmp_path / "trace.json"
    client = open_client(engine, method="auto", keep="none", costs={"memory": READS_DEAR}, trace=str(trace))
    history = random.Random(2).choices(range(3, VOCAB), k=700)
    for turn in range(3):
        client.ask([*history, turn + 5], 2)
        client.service.drain_saves()
    metrics = client.service.metrics()
    client.service.close()
    entries = json.loads(trace.read_text())
    restores = [entry for entry in entries if entry["name"] == "restore"]
    assert len(restores) == 2
    for entry in restores:
        assert entry["args"]["tokens"] == 640 and entry["args"]["predicted_makespan_s"] > 0
        assert entry["args"]["makespan_s"] >= max(entry["args"]["io_s"], entry["args"]["compute_s"]) - 1e-6
    assert sum(entry["args"]["bytes"] for entry in entries if entry["name"].startswith("read ") and "args" in entry)
    assert metrics["restore_io_seconds_total"] == pytest.approx(sum(entry["args"]["io_s"] for entry in restores))


@pytest.mark.parametrize("what", ["choose", "learn", "start", "read_ahead"])
def test_a_plan_that_fails_costs_only_time(tiny_model, monkeypatch, what):
    engine = poisoned_engine(tiny_model("llama"), max_batch_tokens=256)
    client = open_client(engine, method="auto", keep="none", costs={"memory": READS_DEAR})
    history = random.Random(3).choices(range(3, VOCAB), k=400)
    first = client.ask([*history, 5], 4)
    client.service.drain_saves()
    owner = {"start": Restorer, "read_ahead": Restore}.get(what, RestorePolicy)

    def fail(*args, **kwargs):
        raise MemoryError("none left")

    monkeypatch.setattr(owner, what, fail)
    second = client.ask([*history, 5], 4)
    metrics = client.service.metrics()
    client.service.close()
    assert second.token_ids == first.token_ids
    assert metrics["plan_errors_total" if what == "learn" else "restore_errors_total"] == 1
    assert (second.report.miss_reason == "restore_failed") == (what != "learn")
    assert client.service.metrics()["blocks_free"] == engine.num_blocks
