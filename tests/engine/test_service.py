"""The service around the engine: what is saved after how many sights, and what becomes of requests when it dies."""

from __future__ import annotations

import random
import threading

import pytest

from mii_hcache.errors import HCacheError, RankLostError, RequestError
from mii_hcache.runtime.generation import FinishReason
from mii_hcache.storage.memory import MemoryStore
from tests.engine.conftest import PATIENCE_S
from tests.engine_kit import VOCAB, open_client, poisoned_engine


@pytest.mark.parametrize("method", ["hidden", "kv"])
@pytest.mark.parametrize("keep", ["none", "lru"])
def test_prompts_are_saved_after_so_many_sights(tiny_model, method, keep):
    client = open_client(poisoned_engine(tiny_model("llama")), method=method, keep=keep, save_after=2)
    prompt = random.Random(1).choices(range(3, VOCAB), k=300)
    others = [random.Random(seed).choices(range(3, VOCAB), k=200) for seed in range(5, 9)]
    saved, told = [], set()
    for _ in range(4):
        told.add(client.ask(prompt, 6).token_ids)
        assert client.service.drain_saves(60)
        saved.append(client.service.metrics()["store_spans"])
        if others:
            client.ask(others.pop(), 8)  # seen once: never saved
    assert saved[:2] == [0, 0]
    assert saved[2:] == [4, 4]
    assert len(told) == 1
    metrics = client.service.metrics()
    if keep == "none":
        assert metrics["restored_tokens_total"] == 256
        assert metrics["saved_bytes_per_restored_token"] == metrics["saved_bytes_total"] / 256
    client.service.close()


def test_requests_that_can_never_be_served_are_refused_at_once(tiny_model):
    client = open_client(poisoned_engine(tiny_model("llama"), num_blocks=10))
    assert client.service.max_context_tokens == 160
    for prompt, num_tokens, reason in (
        ([], 1, "no tokens"),
        ([VOCAB], 1, "token ids must be in"),
        ([-1], 1, "token ids must be in"),
        ([5] * 150, 11, "the context holds 160 tokens; 150 in the prompt and 11 to generate are 161"),
    ):
        with pytest.raises(RequestError, match=reason):
            client.send(prompt, num_tokens)
    assert len(client.ask([5] * 150, 10).token_ids) == 10
    client.service.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_an_engine_that_died(tiny_model, monkeypatch):
    client = open_client(poisoned_engine(tiny_model("llama")), max_sequences=1)
    assert client.service.is_alive

    def die() -> None:
        raise SystemExit("out of memory")

    all_sent = threading.Event()

    def on_token(token_id: int) -> bool:
        assert all_sent.wait(60)
        monkeypatch.setattr(client.service._scheduler, "iterate", die)
        return False

    running = client.send([5, 6, 7], 20, on_token=on_token)
    waiting = client.send([5, 6, 7, 8], 20)
    all_sent.set()
    reasons = [results.get(timeout=30).finish_reason for results in (running, waiting)]
    assert set(reasons) <= {FinishReason.CANCELLED, FinishReason.ERROR}
    client.service._thread.join(30)
    assert not client.service.is_alive
    with pytest.raises(HCacheError, match="shutting down"):
        client.send([5], 1)
    client.service.close()


def test_who_was_answered_hears_of_it_though_a_rank_is_lost_as_his_context_leaves(tiny_model):
    engine = poisoned_engine(tiny_model("llama"))
    client = open_client(engine, keep="none")

    def evict(uid: int) -> None:
        raise RankLostError("rank 1 of 2 was killed")

    engine.evict = evict
    results = client.send([5, 6, 7], 3)
    result = results.get(timeout=30)
    assert result.error is None and result.finish_reason is FinishReason.LENGTH and len(result.token_ids) == 3
    client.service._thread.join(30)
    assert not client.service.is_alive and results.empty()
    with pytest.raises(HCacheError, match="rank 1 of 2 was killed"):
        client.send([5], 1)
    client.service.close()


def test_who_submits_while_the_engine_looks_through_its_requests_ends_nothing(tiny_model):
    client = open_client(poisoned_engine(tiny_model("llama")), method="recompute", keep="none")
    sent, senders = [], []

    class Overtaken(dict):
        """Whoever looks through it is overtaken by one who submits, if he does not keep him out."""

        def values(self):
            for job in super().values():
                yield job
                if not senders:
                    senders.append(threading.Thread(target=lambda: sent.append(client.send([8, 9], 2))))
                    senders[0].start()
                    senders[0].join(0.2)

    with client.service._changed:
        client.service._jobs = Overtaken(client.service._jobs)
    assert len(client.ask([5, 6, 7], 3).token_ids) == 3
    senders[0].join(30)
    assert len(sent[0].get(timeout=60).token_ids) == 2 and client.service.is_alive
    client.service.close()


def test_seeded_sampling_does_not_depend_on_the_neighbours(tiny_model):
    client = open_client(poisoned_engine(tiny_model("llama")), keep="none")
    sampling = {"temperature": 0.8, "top_p": 0.9, "top_k": 50}
    alone = client.ask([5, 6, 7], 30, seed=11, **sampling).token_ids
    crowd = [client.send([9, 8, idx], 30, seed=idx, **sampling) for idx in range(3, 9)]
    again = client.ask([5, 6, 7], 30, seed=11, **sampling).token_ids
    other = client.ask([5, 6, 7], 30, seed=12, **sampling).token_ids
    for results in crowd:
        results.get(timeout=60)
    client.service.close()
    assert alone == again != other


def test_no_temperature_is_too_small(tiny_model):
    client = open_client(poisoned_engine(tiny_model("llama")))
    greedy = client.ask([5, 6, 7], 10).token_ids
    for temperature in (1e-3, 1e-30, 1e-45):
        assert client.ask([5, 6, 7], 10, temperature=temperature, seed=1).token_ids == greedy
    client.service.close()


def test_running_streams_do_not_wait_while_another_context_is_healed(tiny_model):
    """A store that hangs: what was dropped cannot be healed, and nobody's decoding may wait for it."""
    store = HangingStore(1 << 30)
    engine = poisoned_engine(tiny_model("llama"), max_batch_tokens=128)
    client = open_client(engine, method="kv", keep="none", store=store, save_wait=0.0)
    order: list[str] = []
    both_sent = threading.Event()

    def note_running(token_id: int) -> bool:
        assert both_sent.wait(60)
        order.append("running")
        return order.count("other") == 2 and order[-50:] == ["running"] * 50

    def note_other(token_id: int) -> bool:
        order.append("other")
        return False

    running = client.send([3, 4, 5], 2000, on_token=note_running)
    other = client.send(random.Random(2).choices(range(3, VOCAB), k=1800), 2, on_token=note_other)
    both_sent.set()
    assert other.get(timeout=PATIENCE_S / 2).finish_reason is FinishReason.LENGTH
    # fifty tokens after the other context left, of which more spans were dropped than there are buffers to heal by
    assert running.get(timeout=PATIENCE_S / 2).finish_reason is FinishReason.STOP, "healing waits for longer than this"
    metrics = client.service.metrics()
    assert metrics["dropped_rows_total"] > 0 and metrics["store_spans"] == 0
    store.let_go.set()
    client.service.close()
    assert client.service.metrics()["healed_spans_total"] > 0


class HangingStore(MemoryStore):
    """Puts wait until they are let go."""

    def __init__(self, capacity_bytes: int) -> None:
        super().__init__(capacity_bytes)
        self.let_go = threading.Event()

    def put(self, record, chunks):
        self.let_go.wait(60)
        return super().put(record, chunks)
