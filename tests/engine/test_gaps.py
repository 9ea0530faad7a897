"""A history whose head was given up: the head is computed, the tail is read, the tokens are the same."""

from __future__ import annotations

import random

import pytest

from mii_hcache.core.cost import LayerCost
from mii_hcache.runtime.policy import RestorePolicy
from mii_hcache.storage.memory import MemoryStore
from tests.engine_kit import VOCAB, open_client, poisoned_engine

COST = LayerCost(io_hidden_s=2e-5, io_kv_s=4e-5, c_hidden_s=5e-6, c_kv_s=1e-7, c_token_s=3e-5)
COMPUTING_FREE = LayerCost(io_hidden_s=2e-2, io_kv_s=4e-2, c_hidden_s=5e-6, c_kv_s=1e-7, c_token_s=1e-9)
HISTORY = random.Random(7).choices(range(3, VOCAB), k=690)


@pytest.fixture(scope="module")
def never_evicted(tiny_model):
    client = open_client(poisoned_engine(tiny_model("llama"), max_batch_tokens=256), method="recompute", keep="none")
    tokens = [client.ask([*HISTORY, turn + 5], 4).token_ids for turn in range(3)]
    client.service.close()
    return tokens


def lose(store, positions, reason="evicted"):
    gone = [i for i in store.span_ids() if store.find(i).span_idx in positions]
    with store._lock:
        for span_id in gone:
            store._remove(span_id)
        store._reasons.note(gone, reason)
    assert len(gone) == len(positions)


def positions_in(store):
    return {store.find(span_id).span_idx for span_id in store.span_ids()}


@pytest.mark.parametrize("gone", [{0, 1, 2}, {0}, {3, 4}, {0, 2, 5}, {8}, {9}])
def test_the_tokens_are_the_same(tiny_model, never_evicted, gone):
    store = MemoryStore(1 << 30)
    engine = poisoned_engine(tiny_model("llama"), max_batch_tokens=256)
    client = open_client(engine, store=store, method="auto", keep="none", costs={"memory": COST})
    tokens, reports = [], []
    for turn in range(3):
        result = client.ask([*HISTORY, turn + 5], 4)
        client.service.drain_saves()
        tokens.append(result.token_ids)
        reports.append(result.report)
        if turn == 0:
            lose(store, gone)
    metrics = client.service.metrics()
    client.service.close()
    assert tokens == never_evicted
    assert metrics.get("restore_errors_total", 0) == metrics.get("plan_errors_total", 0) == 0
    assert reports[1].restored_tokens > 0
    if max(gone) < 5:
        assert reports[1].restored_tokens + reports[1].recomputed_tokens == 640, "nothing was left to the prefill"
        assert positions_in(store).isdisjoint(gone), "what was given up is not saved again to be given up again"
    elif gone == {9}:
        assert reports[1].restored_tokens + reports[1].recomputed_tokens == 576
        assert positions_in(store) == set(range(10)), "the end was prefilled and saved"


def test_what_was_damaged_is_saved_again(tiny_model, never_evicted):
    store = MemoryStore(1 << 30)
    engine = poisoned_engine(tiny_model("llama"), max_batch_tokens=256)
    client = open_client(engine, store=store, method="auto", keep="none", costs={"memory": COST})
    for turn in range(2):
        assert client.ask([*HISTORY, turn + 5], 4).token_ids == never_evicted[turn]
        client.service.drain_saves()
        if turn == 0:
            lose(store, {0, 1}, "corrupt")
    client.service.close()
    assert positions_in(store) == set(range(10))


def test_a_gap_that_is_dear_is_not_filled(tiny_model, never_evicted):
    """Where computing is all but free and reading is not, everything is prefilled."""
    store = MemoryStore(1 << 30)
    engine = poisoned_engine(tiny_model("llama"), max_batch_tokens=256)
    client = open_client(engine, store=store, method="auto", keep="none", costs={"memory": COST})
    client.ask([*HISTORY, 5], 4)
    client.service.drain_saves()
    lose(store, {4})
    client.service.close()
    engine = poisoned_engine(tiny_model("llama"), max_batch_tokens=256)
    again = open_client(engine, store=store, method="auto", keep="none", costs={"memory": COMPUTING_FREE})
    result = again.ask([*HISTORY, 6], 4)
    again.service.close()
    assert result.token_ids == never_evicted[1] and result.report.restored_tokens == 0


@pytest.mark.parametrize("method", ["hidden", "kv"])
def test_methods_that_know_no_costs_stop_at_the_gap(tiny_model, never_evicted, method):
    store = MemoryStore(1 << 30)
    engine = poisoned_engine(tiny_model("llama"), max_batch_tokens=256)
    client = open_client(engine, store=store, method=method, keep="none")
    client.ask([*HISTORY, 5], 4)
    client.service.drain_saves()
    lose(store, {4})
    result = client.ask([*HISTORY, 6], 4)
    client.service.close()
    assert result.token_ids == never_evicted[1]
    assert result.report.restored_tokens == 256


def test_a_plan_that_fails_costs_only_time(tiny_model, never_evicted, monkeypatch):
    store = MemoryStore(1 << 30)
    engine = poisoned_engine(tiny_model("llama"), max_batch_tokens=256)
    client = open_client(engine, store=store, method="auto", keep="none", costs={"memory": COST})
    client.ask([*HISTORY, 5], 4)
    client.service.drain_saves()
    lose(store, {4})

    def fail(*args, **kwargs):
        raise MemoryError("none left")

    monkeypatch.setattr(RestorePolicy, "_is_worth_filling", fail)
    result = client.ask([*HISTORY, 6], 4)
    metrics = client.service.metrics()
    client.service.close()
    assert result.token_ids == never_evicted[1]
    assert result.report.restored_tokens + result.report.recomputed_tokens == 256
    assert metrics["plan_errors_total"] == 1


def test_a_store_that_evicts_by_cost_is_told_what_things_cost(tiny_model):
    store = MemoryStore(1 << 30, evict="cost")
    engine = poisoned_engine(tiny_model("llama"), max_batch_tokens=256)
    dear = LayerCost(io_hidden_s=2e-5, io_kv_s=4e-5, c_hidden_s=5e-6, c_kv_s=1e-7, c_token_s=3e-5, c_attention_s=1e-6)
    client = open_client(engine, store=store, method="auto", keep="none", costs={"memory": dear})
    client.ask([*HISTORY, 5], 4)
    client.service.drain_saves()
    client.service.close()
    went = [store.find(span_id).span_idx for span_id in store._order.victims()]
    assert went == sorted(went) == list(range(10)), "the tail last"
