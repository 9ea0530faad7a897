"""Saved state over several ranks, end to end: conversations that are evicted after every turn go on as ones that never
were, whatever the method, and each rank reads its share."""

from __future__ import annotations

from pathlib import Path

import pytest

from mii_hcache.errors import ConfigError
from mii_hcache.storage.memory import MemoryStore
from mii_hcache.storage.open import open_state
from tests.engine.parallel.ranks_kit import parallel_engine
from tests.engine_kit import Client, answers, interleave, open_client, poisoned_engine, restorable

SETTINGS = {"num_blocks": 200, "max_batch_tokens": 192}


def _talk(client: Client, *, num_turns: int = 3, first_seed: int = 0):
    conversations = interleave(client, 4, num_turns, num_tokens=40, first_seed=first_seed)
    assert client.service.drain_saves(60)
    return conversations


@pytest.fixture(scope="module")
def expected(tiny_model):
    """Of an engine that never forgets."""
    said = {}
    for name in ("llama", "llama-gqa"):
        client = open_client(poisoned_engine(tiny_model(name), **SETTINGS), method="recompute", keep="none")
        said[name] = answers(_talk(client))
        client.service.close()
    return said


def _expect_all_restored(conversations) -> None:
    for conversation in conversations:
        for before, turn in zip(conversation.turns, conversation.turns[1:], strict=False):
            assert turn.report.restored_tokens == restorable(before), turn.report


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("name", "size", "method"),
    [
        ("llama", 2, "hidden"),
        ("llama", 2, "kv"),
        ("llama-gqa", 2, "kv"),
        ("llama-gqa", 4, "hidden"),
        ("llama-gqa", 4, "kv"),
    ],
)
def test_conversations_that_come_back_go_on_as_if_they_had_stayed(tiny_model, tmp_path, expected, name, size, method):
    state = open_state(str(tmp_path), 1 << 30, 0)
    with parallel_engine(tiny_model(name), size, **SETTINGS) as engine:
        client = open_client(engine, store=state.store, method=method, keep="none")
        conversations = _talk(client)
        counted = [dict(client.service.metrics()), *client.service.shared.counted()]
        client.service.close()
        assert engine.lost is None
    state.close()
    assert answers(conversations) == expected[name]
    _expect_all_restored(conversations)
    reads = [counts.get("shard_read_bytes_total", 0) for counts in counted[1:]]
    assert all(reads), reads


def test_a_store_that_only_one_process_can_read_is_refused(tiny_model):
    with parallel_engine(tiny_model("llama"), 2, **SETTINGS) as engine:
        with pytest.raises(ConfigError, match="where only one process can read it"):
            open_client(engine, store=MemoryStore(1 << 26), method="kv")
        assert engine.lost is None


def test_hidden_states_saved_at_one_n_are_restored_at_another(tiny_model, tmp_path, expected):
    path: Path = tiny_model("llama-gqa")
    histories = []
    for size in (2, 1, 4):
        state = open_state(str(tmp_path), 1 << 30, 0)

        def talk(engine, state=state):
            client = open_client(engine, store=state.store, method="hidden", keep="none")
            turns = []
            for seed in range(3):
                prompt = [3 + (7 * seed + at * at) % 900 for at in range(200)] + [5] * 3 * len(histories)
                turns.append(client.ask(prompt, 8))
            assert client.service.drain_saves(60)
            client.service.close()
            return turns

        if size == 1:
            histories.append(talk(poisoned_engine(path, **SETTINGS)))
        else:
            with parallel_engine(path, size, **SETTINGS) as engine:
                histories.append(talk(engine))
        state.close()
    for turns in histories[1:]:
        assert [turn.report.restored_tokens for turn in turns] == [192] * 3
