"""What a real engine's steps leave is saved by way of a device's stage as it is on a CPU, bit by bit, however late its
copies run: from steps, from blocks, and before blocks are freed and taken by others."""

from __future__ import annotations

import random

import pytest

from mii_hcache.core.geometry import ChunkKind
from mii_hcache.core.plans import StoragePlan
from mii_hcache.engine.ragged_engine import token_tensors
from mii_hcache.runtime.saver import Saver, StepSegment
from mii_hcache.runtime.stats import Counters
from mii_hcache.runtime.tap import SharedTap
from tests.engine_kit import VOCAB, poisoned_engine
from tests.fake_device import FakeStreams
from tests.runtime.kit import GIVE_UP_S, FakeStore

H, KV = ChunkKind.HIDDEN, ChunkKind.KV
PLANS = {"hidden": (None, H, H, H), "kv": (KV,) * 4, "mixed": (KV, H, H, KV)}
MAX_BATCH = 160


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("family", "dtype"), [("llama-gqa", "bfloat16"), ("opt", "float32")])
@pytest.mark.parametrize(("seed", "is_staged"), [(0, True), (1, False)])
def test_the_way_over_a_device_changes_no_bit(tiny_model, family, dtype, plan, seed, is_staged):
    """The norm writes into the stage, from where the host's rows are copied, or the other way round."""
    engine = poisoned_engine(tiny_model(family), dtype=dtype, num_blocks=40, max_batch_tokens=MAX_BATCH)
    streams = FakeStreams(seed, haste=0.02, granule_bytes=32)
    stores = [FakeStore(), FakeStore()]
    savers = [
        Saver(
            adapter=engine,
            store=store,
            plan=StoragePlan(method="test", kinds=PLANS[plan]),
            max_batch_tokens=MAX_BATCH,
            counters=Counters(),
            ring_batches=4,
            save_wait=1000.0,
            streams=way,
        )
        for store, way in zip(stores, (None, streams), strict=True)
    ]
    stage = savers[1]._healer._blocks._stage
    assert stage is not None and savers[0]._healer._blocks._stage is None
    streams.checker.watch(stage._memory, "the stage", streams.main.actor)

    def step(batch):
        segments = [StepSegment(uid=uid, token_ids=tokens) for uid, tokens in batch.items()]
        for saver in savers:
            saver.begin_step(segments)
        engine.put(list(batch), token_tensors(list(batch.values())))
        for saver in savers:
            saver.end_step()

    chooser = random.Random(seed)
    engine.model().qkv_input_tap = SharedTap(savers[::-1] if is_staged else savers)
    try:
        with streams.watching():
            for turn in range(3):  # each turn's sequences take the blocks of the one before
                uids = [10 * turn, 10 * turn + 1]
                for uid in uids:
                    for saver in savers:
                        saver.open(uid, seed=b"turn %d" % turn, token_ids=[])
                    step({uid: chooser.choices(range(3, VOCAB), k=chooser.choice((64, 100, 150)))})
                for _ in range(30):
                    step({uid: [chooser.randrange(3, VOCAB)] for uid in uids})
                for saver, store in zip(savers, stores, strict=True):
                    assert saver.drain(GIVE_UP_S)
                    store.delete(sorted(store.spans)[:1])  # healed from the blocks, right before these are freed
                for uid in uids:
                    for saver in savers:
                        assert saver.heal(uid, GIVE_UP_S)
                        saver.close(uid)
                    engine.evict(uid)
    finally:
        engine.model().qkv_input_tap = None
        for saver in savers:
            saver.stop()
    assert not streams.checker.races and streams.checker.num_accesses
    host, device = (store.spans for store in stores)
    assert host.keys() == device.keys() and len(host) >= 6
    assert all(host[span_id] == device[span_id] for span_id in host)
    assert not any(saver._healer._blocks.num_in_use for saver in savers)
