"""Saved state over several ranks where plans mix ways, lengths lie at borders, chunks are damaged and ranks die."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from mii_hcache.config import HCacheConfig
from mii_hcache.engine.demo_model import ensure_demo_model
from mii_hcache.engine.open import open_service
from mii_hcache.errors import RankLostError
from mii_hcache.storage.open import open_state
from tests.engine.parallel.ranks_kit import parallel_engine
from tests.engine.test_plans import READS_CHEAP, READS_DEAR
from tests.engine_kit import Client, Conversation, answers, interleave, open_client, poisoned_engine

SETTINGS = {"num_blocks": 260, "max_batch_tokens": 192}
BORDERS = (63, 64, 65, 64 * 8 - 1, 64 * 8, 64 * 8 + 1)
"""Of a span, and of a tile."""


def talk(client: Client) -> list[Conversation]:
    return interleave(client, 3, 3, num_tokens=40)


def ask_at_borders(client: Client) -> list[Conversation]:
    """Two turns each; the first one's prompt and answer leave a history that ends at a border."""
    conversations = []
    for seed, num_tokens in enumerate(BORDERS):
        conversation = Conversation(seed)
        for num_new, num_answer in ((num_tokens - 8, 9), (5, 6)):
            prompt = conversation.next_prompt(num_new)
            conversation.take(prompt, client.ask(prompt, num_answer))
        conversations.append(conversation)
    return conversations


@pytest.fixture(scope="module")
def never_evicted(tiny_model):
    """What an engine of one rank says that saves nothing and forgets nothing."""
    known = {}

    def of(family, what):
        if (family, what) not in known:
            client = open_client(poisoned_engine(tiny_model(family), **SETTINGS), method="recompute", keep="none")
            known[family, what] = answers(what(client))
            client.service.close()
        return known[family, what]

    return of


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("family", "size", "method", "cost"),
    [
        ("llama", 2, "auto", READS_DEAR),
        ("llama", 2, "hcache", READS_CHEAP),
        ("llama-gqa", 4, "auto", READS_CHEAP),
        ("llama", 4, "hcache", READS_DEAR),
    ],
)
def test_plans_that_mix_ways_give_the_same_tokens(tiny_model, tmp_path, never_evicted, family, size, method, cost):
    state = open_state(str(tmp_path), 1 << 30, 0)
    with parallel_engine(tiny_model(family), size, **SETTINGS) as engine:
        client = open_client(engine, store=state.store, method=method, keep="none", costs={"file": cost})
        conversations = talk(client)
        metrics = client.service.metrics()
        client.service.close()
        assert engine.lost is None
    state.close()
    assert answers(conversations) == never_evicted(family, talk)
    assert metrics["restored_tokens_total"] > 0 and metrics.get("restore_errors_total", 0) == 0


def damage(path: Path, span_idx: int) -> int:
    """Change a byte in the last chunk of every span at this position; how many there were."""
    from mii_hcache.storage.catalog import Catalog
    from mii_hcache.storage.format import BLOCK_BYTES, SegmentHeader
    from mii_hcache.storage.state_dir import StateDir

    state_dir = StateDir(path)
    catalog = Catalog(state_dir.catalog, state_dir.read_store_uuid())
    rows = [row for row in catalog.rows if row.record.span_idx == span_idx]
    catalog.close()
    for row in rows:
        place = row.places[len(row.places) - 1]
        with (path / "segments" / f"{place.segment:08d}.seg").open("r+b") as file:
            slot_bytes = SegmentHeader.parse(file.read(BLOCK_BYTES)).slot_bytes
            file.seek(2 * BLOCK_BYTES + place.slot * slot_bytes + 100)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))
    state_dir.close()
    return len(rows)


@pytest.mark.timeout(500)
@pytest.mark.parametrize(("size", "method"), [(2, "hidden"), (4, "kv")])
def test_borders_shares_and_damage(tiny_model, tmp_path, never_evicted, size, method):
    """Histories that end at borders come back, each rank reads its share; after damage on one rank's part all of them
    fall back together, and the tokens are right."""
    expected = never_evicted("llama", ask_at_borders)
    for is_damaged in (False, True):
        state = open_state(str(tmp_path), 1 << 30, 0)
        with parallel_engine(tiny_model("llama"), size, **SETTINGS) as engine:
            client = open_client(engine, store=state.store, method=method, keep="none")
            conversations = ask_at_borders(client)
            assert client.service.drain_saves(60)
            metrics = client.service.metrics()
            counted = [metrics, *client.service.shared.counted()]
            client.service.close()
            assert engine.lost is None
            num_layers, geometry = engine.geometry.num_layers, engine.geometry
        state.close()
        assert answers(conversations) == expected
        second = [conversation.turns[1].report for conversation in conversations]
        if not is_damaged:
            assert [report.restored_tokens for report in second] == [num_tokens // 64 * 64 for num_tokens in BORDERS]
            reads = [counts["shard_read_bytes_total"] for counts in counted]
            from mii_hcache.core.geometry import ChunkKind

            a_chunk_a_layer = len(BORDERS) * num_layers * geometry.chunk_bytes(ChunkKind(method))
            assert all(abs(num_bytes - sum(reads) / size) <= a_chunk_a_layer for num_bytes in reads), reads
            assert damage(tmp_path, 5) == 3
        else:
            # its own first turns were restored, too, as far as they were sound
            assert metrics["store_corrupt_chunks_total"] == 3
            assert metrics.get("restore_errors_total", 0) == 0
            assert metrics["restore_cuts_total"] >= 3


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("size", "rank", "method"), [(2, 1, "kv"), (4, 2, "hidden")])
def test_what_was_saved_before_a_rank_was_killed_in_a_restore_is_restored_at_the_next_start(
    tiny_model, tmp_path, size, rank, method
):
    prompt = [3 + at * at % 900 for at in range(64 * 6 + 10)]
    lost: list[RankLostError] = []
    state = open_state(str(tmp_path), 1 << 30, 0)
    engine_settings = {**SETTINGS, "on_lost": lost.append}
    with parallel_engine(tiny_model("llama"), size, **engine_settings) as engine:
        settings = {
            "method": method,
            "keep": "none",
            "emulated_read_bytes_per_s": 20e3,
        }  # there is time to be killed in
        client = open_client(engine, store=state.store, **settings)
        first = client.ask(prompt, 8)
        assert client.service.drain_saves(60)
        results = client.send([*prompt, 5], 100)
        stop_s = time.monotonic() + 60
        while not client.service.metrics()["requests_restoring"]:
            assert time.monotonic() < stop_s and results.empty(), "there was no restore to be killed in"
            time.sleep(0.005)
        os.kill(engine.followers.pids[rank - 1], signal.SIGKILL)
        client.service.lose(_lost_of(engine))
        assert f"rank {rank} of {size}" in str(results.get(timeout=60).error)
        client.service.close()
    state.close()
    state = open_state(str(tmp_path), 1 << 30, 0)
    with parallel_engine(tiny_model("llama"), size, **SETTINGS) as engine:
        client = open_client(engine, store=state.store, method=method, keep="none")
        again = client.ask(prompt, 8)
        client.service.close()
    state.close()
    assert again.token_ids == first.token_ids
    assert again.report.restored_tokens == 64 * 6
    assert state.notes == []


def test_a_rank_lost_as_a_restore_starts_is_the_engines_end_and_no_failed_restore(tiny_model, tmp_path, caplog):
    prompt = list(range(3, 3 + 64 * 2))
    state = open_state(str(tmp_path), 1 << 30, 0)
    with parallel_engine(tiny_model("llama"), 2, **SETTINGS) as engine:
        client = open_client(engine, store=state.store, method="hidden", keep="none")
        client.ask(prompt, 8)
        assert client.service.drain_saves(60)
        reserve = engine.reserve

        def reserve_late(uid: int, num_tokens: int) -> None:
            os.kill(engine.followers.pids[0], signal.SIGKILL)
            _lost_of(engine)
            reserve(uid, num_tokens)

        engine.reserve = reserve_late
        result = client.send([*prompt, 5], 8).get(timeout=60)
        assert "rank 1 of 2" in str(result.error) and not client.service.is_alive
        assert client.service.metrics().get("restore_errors_total", 0) == 0
        assert not [record for record in caplog.records if record.exc_info]
        client.service.close()
    state.close()


def _lost_of(engine) -> RankLostError:
    stop_s = time.monotonic() + 60
    while engine.lost is None:
        assert time.monotonic() < stop_s, "nobody noticed"
        time.sleep(0.01)
    return engine.lost


@pytest.mark.timeout(400)
def test_a_server_over_ranks_measures_plans_and_restores(tmp_path):
    """As a user starts it: no method is chosen, so costs are measured on all ranks."""
    model = ensure_demo_model(tmp_path / "demo-model")
    client = open_client(poisoned_engine(model, **SETTINGS), method="recompute", keep="none")
    expected = answers(talk(client))
    client.service.close()
    config = HCacheConfig(
        model=str(model),
        dtype="float32",
        state_dir=str(tmp_path / "state"),
        tensor_parallel=2,
        kv_blocks=SETTINGS["num_blocks"],
        max_batch_tokens=SETTINGS["max_batch_tokens"],
        keep="none",
        poison_blocks=True,
    )
    opened = open_service(config)
    try:
        assert opened.method.name == "auto"
        costs = opened.service.policy.estimate.cost(("file",), 0.0)
        assert 0 < costs.c_gather_s <= costs.c_hidden_s
        assert answers(talk(Client(opened.service))) == expected
        assert opened.service.metrics().get("restore_errors_total", 0) == 0
    finally:
        opened.close()
