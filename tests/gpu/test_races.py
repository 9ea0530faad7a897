"""Saving and restoring while streams sleep at random: what comes out is what comes out when nothing does.

The same runs on a fake device, where every order can be had, are in `tests/runtime`; here the device is real.
"""

from __future__ import annotations

import math
import random

import pytest
import torch

from experiments.common.random_weights import random_engine
from mii_hcache.core.geometry import ChunkKind
from mii_hcache.core.identity import spans_of
from mii_hcache.core.plans import StoragePlan
from mii_hcache.runtime.lookup import look_up
from mii_hcache.runtime.restorer import Restorer
from mii_hcache.runtime.saver import Saver
from mii_hcache.runtime.stats import Counters
from mii_hcache.runtime.streams import Streams, streams_of
from mii_hcache.storage.memory import MemoryStore
from tests.gpu.gpu_kit import SleepyStreams, kv_of, prefill, saved_bytes, whole_spans

NUM_SEEDS = 12
CHUNK = 200
"""No multiple of a span: steps end within spans."""
SHAPE = "250m"


@pytest.fixture(scope="module")
def engine():
    """Free blocks hold NaN."""
    engine = random_engine(SHAPE, dtype="float16", num_blocks=256, max_batch_tokens=512)
    engine.poison_free_blocks()
    yield engine
    engine.model().qkv_input_tap = None


def storage_of(num_layers: int) -> StoragePlan:
    """Half the layers as hidden states, half as K and V."""
    half = num_layers // 2
    kinds = (None, *(ChunkKind.HIDDEN,) * (half - 1), *(ChunkKind.KV,) * (num_layers - half))
    return StoragePlan(method="test", kinds=kinds)


def streams(device: torch.device, seed: int | None) -> Streams:
    """None: real ones as they are."""
    return streams_of(device) if seed is None else SleepyStreams(streams_of(device), seed)


def save(engine, store, token_ids, seed):
    """Prefill and save, with a decoding tail of single tokens; the blocks are freed and poisoned right behind it."""
    chosen = streams(engine.device, seed)
    saver = Saver(
        adapter=engine,
        store=store,
        plan=storage_of(engine.geometry.num_layers),
        max_batch_tokens=512,
        counters=Counters(),
        save_wait=1e6,
        ring_batches=3,
        streams=chosen,
    )
    sleep = chosen.main.sleep if isinstance(chosen, SleepyStreams) else lambda: None
    try:
        saver.open(1, seed=b"s", token_ids=[])
        prefill(engine, 1, token_ids[:-40], CHUNK, saver=saver, between=sleep)
        for token in token_ids[-40:]:
            prefill(engine, 1, [token], 1, saver=saver, between=sleep)
        saver.close(1)
        engine.evict(1)  # behind what was launched, but before it has run
        assert saver.drain(60)
    finally:
        saver.stop()
    records = look_up(store, list(spans_of(b"s", token_ids)), max_tokens=len(token_ids)).records
    assert len(records) == len(token_ids) // 64, "rows were dropped"
    return records


def restore(engine, store, records, token_ids, seed):
    """K and V of the restored sequence and the logits behind it; another sequence decodes meanwhile."""
    chosen = streams(engine.device, seed)
    restorer = Restorer(adapter=engine, store=store, counters=Counters(), streams=chosen, read_deadline_s=math.inf)
    num_tokens = whole_spans(len(token_ids))
    sleep = chosen.main.sleep if isinstance(chosen, SleepyStreams) else lambda: None
    try:
        prefill(engine, 3, token_ids[:70], 70)
        engine.reserve(2, num_tokens)
        restore = restorer.start(engine.target(2), records, token_ids)
        outcome = None
        while outcome is None:
            outcome = restore.step(0.001, wait=False)
            sleep()
            prefill(engine, 3, token_ids[70:71], 1)
            engine.truncate(3, 70)
        assert outcome.num_tokens == num_tokens
        logits = prefill(engine, 2, token_ids[num_tokens:] or token_ids[-1:], 512).float().cpu()
        return kv_of(engine, 2, num_tokens), logits
    finally:
        engine.evict(2)
        engine.evict(3)
        restorer.stop()


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_what_is_saved_and_restored_is_the_same_however_streams_sleep(engine, seed):
    token_ids = random.Random(seed).choices(range(3, 2000), k=random.Random(seed).randrange(600, 1000))
    plain, sleepy = MemoryStore(1 << 30), MemoryStore(1 << 30)
    try:
        records = save(engine, plain, token_ids, None)
        others = save(engine, sleepy, token_ids, seed)
        assert saved_bytes(sleepy, others) == saved_bytes(plain, records)
        kv, logits = restore(engine, plain, records, token_ids, None)
        assert torch.isfinite(kv).all() and torch.isfinite(logits).all()
        for again in range(2):
            other_kv, other_logits = restore(engine, plain, records, token_ids, 100 * seed + again)
            assert torch.equal(other_kv, kv) and torch.equal(other_logits, logits)
    finally:
        plain.close()
        sleepy.close()


def test_a_restore_that_is_cancelled_leaves_its_blocks_to_others(engine):
    token_ids = random.Random(99).choices(range(3, 2000), k=960)
    store = MemoryStore(1 << 30)
    restorer = Restorer(
        adapter=engine,
        store=store,
        counters=Counters(),
        streams=streams(engine.device, 5),
        read_deadline_s=math.inf,
    )
    try:
        records = save(engine, store, token_ids, None)
        alone = prefill(engine, 7, token_ids[::-1], 512).float().cpu()
        engine.evict(7)
        for steps in range(1, 6):
            engine.reserve(2, 960)
            restore = restorer.start(engine.target(2), records, token_ids)
            for _ in range(steps):
                restore.step(0.001, wait=False)
            restore.cancel()
            engine.evict(2)
            logits = prefill(engine, 7, token_ids[::-1], 512).float().cpu()  # in the very blocks
            engine.evict(7)
            assert torch.equal(logits, alone)
    finally:
        restorer.stop()
        store.close()
