"""A restored context gives the tokens of one that never left: over methods, policies, pools, drops and tenants.

Freed blocks hold NaN in every test here, and the norm reuses its output buffer.
"""

from __future__ import annotations

import random
import threading
import time
from contextlib import closing

import pytest

from mii_hcache.runtime.generation import FinishReason
from mii_hcache.storage.file import FileStore
from mii_hcache.storage.memory import MemoryStore
from mii_hcache.storage.state_dir import StateDir
from tests.engine_kit import (
    ALL_MODELS,
    VOCAB,
    Client,
    Conversation,
    answers,
    interleave,
    open_client,
    poisoned_engine,
    restorable,
)
from tests.runtime.kit import wait_until

FAMILIES = ["llama", "llama-gqa", "opt"]


@pytest.fixture(scope="module")
def never_evicted(tiny_model):
    """Answers of a server that saves nothing and evicts nothing: every history is prefilled."""
    known: dict[str, list] = {}

    def of(family: str) -> list:
        if family not in known:
            engine = poisoned_engine(tiny_model(family), num_blocks=600, max_batch_tokens=256)
            client = open_client(engine, method="recompute", keep="none")
            known[family] = answers(interleave(client, 4, 3))
            client.service.close()
        return known[family]

    return of


@pytest.mark.parametrize("method", ["hidden", "kv"])
@pytest.mark.parametrize("family", ALL_MODELS)
def test_every_turn_restores_every_whole_span(tiny_model, never_evicted, family, method):
    client = open_client(poisoned_engine(tiny_model(family), max_batch_tokens=256), method=method, keep="none")
    conversations = interleave(client, 4, 3)
    client.service.close()
    assert answers(conversations) == never_evicted(family)
    for conversation in conversations:
        assert conversation.turns[0].report.restored_tokens == 0
        for before, turn in zip(conversation.turns, conversation.turns[1:], strict=False):
            report = turn.report
            assert report.restored_tokens == restorable(before)
            assert report.resident_tokens == 0
            assert report.prefill_tokens == turn.prompt_tokens - report.restored_tokens
            if report.restored_tokens:
                assert (report.method, report.restored_from) == (method, "memory")
            assert report.miss_reason in (None, "not_saved", "too_short")


@pytest.mark.parametrize("family", FAMILIES)
def test_residents_are_continued_in_place(tiny_model, never_evicted, family):
    client = open_client(poisoned_engine(tiny_model(family), max_batch_tokens=256), keep="lru")
    conversations = interleave(client, 4, 3)
    client.service.close()
    assert answers(conversations) == never_evicted(family)
    for conversation in conversations:
        for before, turn in zip(conversation.turns, conversation.turns[1:], strict=False):
            assert turn.report.resident_tokens == before.prompt_tokens + len(before.token_ids) - 1


def _crowd(engine, **settings) -> tuple[list, Client]:
    client = open_client(engine, **settings)
    return answers(interleave(client, 8, 2, num_tokens=50)), client


@pytest.fixture(scope="module")
def crowd_in_a_large_pool(tiny_model):
    engine = poisoned_engine(tiny_model("llama"), num_blocks=900, max_batch_tokens=64)
    told, client = _crowd(engine, method="recompute", keep="none")
    client.service.close()
    return told


@pytest.mark.parametrize("method", ["hidden", "kv"])
@pytest.mark.parametrize(("keep", "num_blocks"), [("none", 32), ("lru", 42), ("lru", 60)])
def test_a_small_pool_gives_the_same_answers(tiny_model, crowd_in_a_large_pool, method, keep, num_blocks):
    """Requests preempt each other; preempted ones come back by restoring, and no generated token is lost."""
    engine = poisoned_engine(tiny_model("llama"), num_blocks=num_blocks, max_batch_tokens=64)
    told, client = _crowd(engine, method=method, keep=keep)
    assert told == crowd_in_a_large_pool
    metrics = client.service.metrics()
    if num_blocks <= 42:
        assert metrics["preemptions_total"] > 0
    client.service.close()
    assert client.service.metrics()["blocks_free"] == num_blocks


@pytest.mark.parametrize("method", ["hidden", "kv"])
def test_saving_within_the_step_gives_the_same_answers_and_bytes(tiny_model, never_evicted, tmp_path, method):
    """`--save direct` and `two-stage`, in files."""
    saved = {}
    for save in ("direct", "two-stage"):
        with closing(StateDir(tmp_path / save)) as state_dir, closing(FileStore(state_dir, 256 << 20)) as store:
            engine = poisoned_engine(tiny_model("llama"), max_batch_tokens=256)
            client = open_client(engine, method=method, keep="none", store=store, save=save)
            conversations = interleave(client, 4, 3)
            client.service.close()
            assert answers(conversations) == never_evicted("llama")
            for conversation in conversations:
                for before, turn in zip(conversation.turns, conversation.turns[1:], strict=False):
                    assert turn.report.restored_tokens == restorable(before)
            stats, metrics = store.stats(), client.service.metrics()
            saved[save] = stats.num_spans, stats.num_bytes, stats.put_bytes, metrics["saved_bytes_total"]
            assert stats.corrupt_chunks == stats.dropped_spans == 0 and stats.num_spans > 0
    assert saved["direct"] == saved["two-stage"]


class SlowStore(MemoryStore):
    """Takes its time to put: much longer than any engine takes for the rows."""

    client: Client

    def put(self, record, chunks):
        def at() -> tuple[float, float]:
            metrics = self.client.service.metrics()
            return metrics.get("steps_total", 0), metrics["requests_running"]

        began, _ = at()
        wait_until(lambda: at()[0] >= began + 50 or not at()[1])  # or all wait for what is put here
        return super().put(record, chunks)


@pytest.mark.parametrize("method", ["hidden", "kv"])
def test_what_found_no_room_is_healed_from_the_blocks(tiny_model, never_evicted, method):
    engine = poisoned_engine(tiny_model("llama"), max_batch_tokens=64)
    store = SlowStore(1 << 30)
    store.client = client = open_client(engine, method=method, keep="none", store=store, save_wait=0.0, save_threads=1)
    conversations = interleave(client, 4, 3)
    metrics = client.service.metrics()
    client.service.close()
    assert answers(conversations) == never_evicted("llama")
    if method == "hidden":
        assert metrics["dropped_rows_total"] > 0
        assert metrics["healed_spans_total"] > 0
    for conversation in conversations:
        for before, turn in zip(conversation.turns, conversation.turns[1:], strict=False):
            assert turn.report.restored_tokens == restorable(before)


def test_a_store_too_small_for_one_context_is_only_slower(tiny_model, never_evicted):
    client = open_client(poisoned_engine(tiny_model("llama")), keep="none", store=MemoryStore(1 << 20))
    conversations = interleave(client, 4, 3)
    assert client.service.drain_saves(60)
    assert (
        client.service.metrics()["store_evicted_spans_total"] + client.service.metrics()["store_dropped_spans_total"]
        > 0
    )
    client.service.close()
    assert answers(conversations) == never_evicted("llama")


def test_a_fork_and_an_edit_restore_what_they_share(tiny_model):
    engine = poisoned_engine(tiny_model("llama"))
    reference = open_client(poisoned_engine(tiny_model("llama")), method="recompute", keep="none")
    for keep in ("none", "lru"):
        client = open_client(poisoned_engine(tiny_model("llama")), keep=keep)
        base = random.Random(1).choices(range(3, VOCAB), k=400)
        forks = [base, base + [5] * 90, base[:200] + [7] * 90, base[:199] + [9] * 300, base + [5] * 90, base[:70]]
        for prompt in forks:
            assert client.ask(prompt, 12).token_ids == reference.ask(prompt, 12).token_ids, (keep, len(prompt))
        assert client.ask(base + [11] * 10, 4).report.cached_tokens >= 384
        client.service.close()
    reference.service.close()
    assert engine.num_free_blocks == engine.num_blocks


def test_tenants_share_nothing(tiny_model):
    for keep in ("none", "lru"):
        client = open_client(poisoned_engine(tiny_model("llama")), keep=keep)
        prompt = random.Random(2).choices(range(3, VOCAB), k=300)
        first = client.ask(prompt, 8, tenant_salt=b"a")
        other = client.ask(prompt, 8, tenant_salt=b"b")
        again = client.ask(prompt, 8, tenant_salt=b"a")
        client.service.close()
        assert first.token_ids == other.token_ids == again.token_ids
        assert other.report.cached_tokens == 0
        assert other.report.miss_reason == "not_saved"
        assert again.report.cached_tokens >= 256


def test_a_resident_goes_to_one_request_and_the_other_restores_its_own_copy(tiny_model):
    client = open_client(poisoned_engine(tiny_model("llama")), keep="lru")
    conversation = Conversation(seed=3)
    prompt = conversation.next_prompt(300)
    conversation.take(prompt, client.ask(prompt, 30))
    follow_ups = [conversation.token_ids + [idx] * 20 for idx in (4, 5, 6)]
    with client.at_once():
        sent = [client.send(prompt, 10) for prompt in follow_ups]
    results = [results.get(timeout=60) for results in sent]
    client.service.close()
    assert sorted(result.report.resident_tokens for result in results) == [0, 0, 329]
    assert sorted(result.report.restored_tokens for result in results) == [0, 320, 320]
    reference = open_client(poisoned_engine(tiny_model("llama")), method="recompute", keep="none")
    for prompt, result in zip(follow_ups, results, strict=True):
        assert reference.ask(prompt, 10).token_ids == result.token_ids
    reference.service.close()


def test_others_keep_decoding_while_a_long_context_is_restored(tiny_model):
    client = open_client(poisoned_engine(tiny_model("llama")), keep="none", restore_slice_s=0.0005)
    prompt = random.Random(4).choices(range(3, VOCAB), k=1500)
    client.ask(prompt, 2)
    order: list[str] = []
    both_sent = threading.Event()

    def note(name: str):
        def on_token(token_id: int) -> bool:
            assert both_sent.wait(60)
            order.append(name)
            return False

        return on_token

    running = client.send([3, 4, 5], 400, on_token=note("running"))
    restored = client.send([*prompt, 6], 2, on_token=note("restored"))
    both_sent.set()
    assert restored.get(timeout=60).report.restored_tokens == 1472
    assert running.get(timeout=60).finish_reason is FinishReason.LENGTH
    client.service.close()
    # With slices of half a millisecond, the running stream gets tokens in between; without slices it would get one.
    first = order.index("restored")
    assert order[:first].count("running") > 3


def test_cancelled_requests_leave_nothing_behind(tiny_model):
    engine = poisoned_engine(tiny_model("llama"))
    client = open_client(engine, keep="none")
    prompt = random.Random(5).choices(range(3, VOCAB), k=600)
    sent = []
    are_cancelled = threading.Event()
    for idx in range(12):
        # the last one comes no further than to its first token
        on_token = (lambda token_id: False) if idx < 11 else (lambda token_id: not are_cancelled.wait(60))
        sent.append(client.send([*prompt, idx], 400, on_token=on_token))
        time.sleep(0.004 * (idx % 3))
    with client.at_once():
        for name in client.service._jobs:
            client.service.cancel(name)
    are_cancelled.set()
    reasons = {results.get(timeout=60).finish_reason for results in sent}
    assert FinishReason.CANCELLED in reasons
    assert client.ask([3, 4, 5], 3).finish_reason is FinishReason.LENGTH
    client.service.close()
    assert engine.num_free_blocks == engine.num_blocks
    assert engine.num_tracked == 0


def test_logits_that_are_not_finite_are_an_error_and_their_state_is_thrown_away(tiny_model, monkeypatch):
    engine = poisoned_engine(tiny_model("llama"))
    client = open_client(engine, keep="lru")
    prompt = random.Random(6).choices(range(3, VOCAB), k=200)
    forward = engine.model().forward
    monkeypatch.setattr(engine.model(), "forward", lambda batch: forward(batch) * float("nan"))
    result = client.send(prompt, 5).get(timeout=60)
    assert result.finish_reason is FinishReason.ERROR
    assert "not finite" in str(result.error)
    monkeypatch.undo()
    sound = client.ask(prompt, 5)
    assert sound.report.cached_tokens == 0
    client.service.close()


class LateStore(MemoryStore):
    """Takes as many spans as it is let."""

    def __init__(self) -> None:
        super().__init__(1 << 30)
        self.entered, self.let = threading.Event(), threading.Semaphore(0)

    def put(self, record, chunks):
        self.entered.set()
        assert self.let.acquire(timeout=60)
        return super().put(record, chunks)


@pytest.mark.parametrize("num_there", [3, 1])
def test_state_that_is_thrown_away_is_not_restored_though_it_comes_as_somebody_asks(tiny_model, monkeypatch, num_there):
    """Right before it is looked for; one span of three where somebody waited for the others for long enough."""
    monkeypatch.setattr("mii_hcache.engine.scheduler.POISONED_WAIT_S", 0.05)
    monkeypatch.setattr("mii_hcache.engine.admission.PENDING_WAIT_S", 60.0 if num_there == 3 else 0.0)
    store, prompt = LateStore(), random.Random(6).choices(range(3, VOCAB), k=200)
    engine = poisoned_engine(tiny_model("llama"))
    client = open_client(engine, keep="none", store=store, save_threads=1)
    saver, admission = client.service._saver, client.service._scheduler._admission
    step, is_let = admission.step, threading.Event()

    def step_late() -> None:
        if store.entered.is_set() and not is_let.is_set():
            is_let.set()
            store.let.release(num_there)
            wait_until(lambda: saver.num_pending == 3 - num_there)
        step()

    forward = engine.model().forward
    with monkeypatch.context() as patch:
        patch.setattr(engine.model(), "forward", lambda batch: forward(batch) * float("nan"))
        assert client.send(prompt, 5).get(timeout=60).finish_reason is FinishReason.ERROR
    assert store.entered.wait(60) and not store.span_ids()
    admission.step = step_late
    result = client.send(prompt, 5).get(timeout=60)
    assert is_let.is_set() and result.error is None and result.report.restored_tokens == 0
    store.let.release(100)
    client.service.close()
    reference = open_client(poisoned_engine(tiny_model("llama")), method="recompute", keep="none")
    assert result.token_ids == reference.ask(prompt, 5).token_ids
    reference.service.close()


@pytest.mark.parametrize("asks_again", [True, False])
def test_state_that_is_thrown_away_is_deleted_also_when_the_store_takes_it_late(tiny_model, monkeypatch, asks_again):
    """Longer than anybody waits for it."""
    monkeypatch.setattr("mii_hcache.engine.scheduler.POISONED_WAIT_S", 0.05)
    store = LateStore()
    engine = poisoned_engine(tiny_model("llama"))
    client = open_client(engine, keep="none", store=store)
    prompt = random.Random(6).choices(range(3, VOCAB), k=200)
    forward = engine.model().forward
    with monkeypatch.context() as patch:
        patch.setattr(engine.model(), "forward", lambda batch: forward(batch) * float("nan"))
        assert client.send(prompt, 5).get(timeout=60).finish_reason is FinishReason.ERROR
    assert store.entered.wait(60) and not store.span_ids()
    others = random.Random(8).choices(range(3, VOCAB), k=30)  # too few to be saved
    if asks_again:
        assert client.ask(others, 3).finish_reason is FinishReason.LENGTH
    store.let.release(100)
    if asks_again:
        assert client.service.drain_saves(60) and len(store.span_ids()) == 3
        assert client.ask(prompt, 5).report.restored_tokens == 0
    monkeypatch.setattr("mii_hcache.engine.scheduler.POISONED_WAIT_S", 60.0)
    client.service.close()
    assert len(store.span_ids()) == (3 if asks_again else 0), "of the sound answer"


def test_a_failing_step_fails_its_requests_and_no_other(tiny_model, monkeypatch):
    engine = poisoned_engine(tiny_model("llama"))
    client = open_client(engine, keep="none")
    prompt = random.Random(7).choices(range(3, VOCAB), k=200)
    expected = client.ask(prompt, 5).token_ids

    def broken(batch):
        raise RuntimeError("device lost")

    monkeypatch.setattr(engine.model(), "forward", broken)
    result = client.send([*prompt, 1], 5).get(timeout=60)
    assert result.finish_reason is FinishReason.ERROR
    assert "device lost" in str(result.error)
    monkeypatch.undo()
    assert client.ask(prompt, 5).token_ids == expected
    client.service.close()
    assert engine.num_free_blocks == engine.num_blocks
