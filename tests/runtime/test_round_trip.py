"""Conversations that leave and come back, through a real store: what is restored is what was computed."""

from __future__ import annotations

import random

import pytest

from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind
from mii_hcache.core.identity import spans_of
from mii_hcache.runtime.lookup import look_up
from mii_hcache.storage.memory import MemoryStore
from tests.runtime.kit import (
    GIVE_UP_S,
    SEED,
    FakeBlocks,
    FakeEngine,
    geometry_of,
    history_hashes,
    kind_of,
    open_restorer,
    open_saver,
    path,
    rows_of,
)

GEOMETRY = geometry_of(num_layers=4, dtype="bfloat16")
SPAN_BYTES = max(GEOMETRY.span_bytes(kind) for kind in ChunkKind)

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


def _check_blocks(target: FakeBlocks, tokens: list[int], kinds: list[ChunkKind]) -> None:
    hashes = history_hashes(tokens)
    for layer in range(GEOMETRY.num_layers):
        rows = {kind: rows_of(hashes, kind, layer, GEOMETRY).tolist() for kind in ChunkKind}
        for position, token in enumerate(tokens):
            kind = kinds[position // SPAN_TOKENS]
            is_first = kind is ChunkKind.HIDDEN and layer == 0
            expected = ("tokens", [token]) if is_first else (kind.value, rows[kind][position])
            assert target.written[layer, position] == expected


@pytest.mark.parametrize("kind", ChunkKind)
@pytest.mark.parametrize("capacity_spans", [12, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_conversations_come_back(kind, capacity_spans, seed):
    """A small store evicts, a small ring drops: then less comes back, or comes back as kv, and none of it is wrong."""
    chooser = random.Random(seed)
    engine = FakeEngine(GEOMETRY, max_batch_tokens=200)
    store = MemoryStore(capacity_spans * SPAN_BYTES)
    saver = open_saver(engine, store, kind, ring_batches=1, save_wait=0.0)
    restorer = open_restorer(engine, store, tile_spans=2)
    histories: dict[int, list[int]] = {branch: [] for branch in (1, 2, 3)}
    num_restored = 0
    for _ in range(18):
        branch = chooser.choice(list(histories))
        history = histories[branch][: chooser.choice([None, None, None, 100])]  # sometimes the user edits a message
        prompt = history + path(branch, len(history), chooser.randint(1, 150))
        lookup = look_up(store, list(spans_of(SEED, prompt)), max_tokens=len(prompt) - 1)
        target = FakeBlocks(engine)
        outcome = restorer.start(target, lookup.records, prompt).step(GIVE_UP_S, wait=True)
        assert outcome is not None and outcome.num_tokens == lookup.num_tokens
        if capacity_spans == 1000:
            assert lookup.num_tokens >= len(history) // SPAN_TOKENS * SPAN_TOKENS
        _check_blocks(target, prompt[: outcome.num_tokens], [kind_of(record) for record in lookup.records])
        num_restored += outcome.num_tokens

        uid = engine.open(prompt[: outcome.num_tokens])
        saver.open(uid, seed=SEED, token_ids=prompt[: outcome.num_tokens])
        for start in range(outcome.num_tokens, len(prompt), 200):
            engine.step(saver, {uid: prompt[start : start + 200]})
        for _ in range(chooser.randint(0, 80)):
            engine.step(saver, {uid: path(branch, len(engine.tokens[uid]), 1)})
        histories[branch] = list(engine.tokens[uid])
        assert saver.heal(uid, GIVE_UP_S)
        saver.close(uid)
        engine.evict(uid)
        assert saver.drain(GIVE_UP_S)
    assert num_restored > 0
    assert restorer.buffers.num_in_use == 0
    saver.stop()
    restorer.stop()
    store.close()
