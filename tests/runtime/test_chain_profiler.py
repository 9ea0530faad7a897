"""A device's costs are those of whole restores: what overlaps counts once, and what slows the other is told."""

from __future__ import annotations

import random

import pytest

from mii_hcache.core.cost import LayerCost
from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind
from mii_hcache.runtime.chain_profiler import ChainReads, with_chain_reads
from mii_hcache.runtime.profiled_tier import ProfiledTier
from mii_hcache.runtime.profiler import TILE_TOKENS, profile_layer
from mii_hcache.runtime.timeline import Event, RestoreTimeline
from mii_hcache.storage.memory import MemoryStore
from tests.fake_device import FakeStreams
from tests.runtime.device_kit import BLOCK_TOKENS, Device, Pool, PoolBlocks
from tests.runtime.kit import FakeEngine, FakeStore, geometry_of, path

BASE = LayerCost(io_hidden_s=0.0, io_kv_s=0.0, c_hidden_s=1e-6, c_token_s=1e-5, c_kv_s=7e-7)


def _timeline(*events: Event) -> RestoreTimeline:
    timeline = RestoreTimeline()
    timeline.events += events
    return timeline


def test_costs_of_what_overlaps():
    """Reads of 1,000 bytes a token at 1 ns a byte, whose copies end 0.1 us later; with projections beside, half as
    fast, and these a quarter slower than alone."""
    kv = _timeline(
        Event("read", 0.0, 1e-4, num_tokens=100, num_bytes=100_000),
        Event("load", 0.5e-4, 1e-4 + 1e-7, num_tokens=100, num_bytes=100_000),
    )
    hidden = _timeline(
        Event("read", 0.0, 1e-4, num_tokens=100, num_bytes=50_000),
        Event("load", 0.9e-4, 1e-4 + 1e-7, num_tokens=100, num_bytes=50_000),
        Event("project", 1e-4, 2.25e-4, num_tokens=100, num_bytes=50_000),
    )
    cost = with_chain_reads(BASE, 1e-6, [hidden], [kv], max_slowdown=3.0)
    assert cost.io_kv_s == pytest.approx(1.001e-6)
    assert cost.io_hidden_s == pytest.approx(0.5005e-6)
    assert cost.io_slowdown == pytest.approx(2.0)
    assert cost.compute_slowdown == pytest.approx(1.25)
    assert (cost.c_kv_s, cost.c_hidden_s) == (0.0, BASE.c_hidden_s)


@pytest.mark.parametrize("kind", ChunkKind)
def test_restores_are_measured_on_the_devices_clock(kind):
    """Whole restores, again and again into the same blocks, until the device is done."""
    device, store = Device(3), FakeStore()
    tokens = path(1, 0, 4 * SPAN_TOKENS)
    records = store.add(tokens, [kind] * 4, device.engine.geometry)
    with device.streams.watching():
        blocks = PoolBlocks(device.pool, len(tokens))
        reads = ChainReads(device.engine, blocks, store, device.streams)
        for _ in range(3):
            timeline = reads.restore(records)
            done = [event.activity for event in timeline.events]
            assert done.count("load") == done.count("read") == len(device.engine.geometry.saved_layers(kind))
            assert done.count("project") == (done.count("load") if kind is ChunkKind.HIDDEN else 0)
            assert timeline.stopped_s >= max(event.stop_s for event in timeline.events)
            assert 0 < timeline.io_s <= timeline.makespan_s
        assert blocks.committed is None, "the sequence stays as it is"
        blocks.committed = 0 if kind is ChunkKind.HIDDEN else len(tokens)
        blocks.check(tokens, lambda layer_idx, position: kind.value)
        reads.close()


def test_a_profile_of_an_engine_with_a_device():
    streams = FakeStreams(1, haste=0.5)
    engine = FakeEngine(geometry_of(hidden_size=8))
    pool = Pool(streams, engine.geometry, TILE_TOKENS // BLOCK_TOKENS, random.Random(1))
    store = MemoryStore(64 << 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mii_hcache.runtime.stopwatch.ENOUGH_S", 0.001)
        costs, _ = profile_layer(
            adapter=engine,
            target=_Wide(pool, TILE_TOKENS),
            num_target_tokens=TILE_TOKENS,
            tiers={"memory": ProfiledTier(store=store, forget=lambda: None)},
            io_bytes=1 << 20,
            repeats=1,
            streams=streams,
        )
    cost = costs["memory"]
    assert cost.io_hidden_s > 0 and cost.io_kv_s > 0 and cost.c_hidden_s > 0 and cost.c_token_s > 0
    assert cost.c_kv_s == 0
    assert cost.io_kv_s / cost.io_hidden_s == pytest.approx(4 / 8), "a byte costs what a byte costs"
    assert store.stats().num_spans == 0


class _Wide(PoolBlocks):
    """Rows of K and V of a geometry whose hidden states are longer."""

    def project_hidden(self, layer_idx, start, hidden):
        width = self.pool.rows[0, 0].numel()
        super().project_hidden(layer_idx, start, hidden[:, :width])

    def fill(self, start, token_ids, num_layers):
        for layer_idx in range(num_layers):
            self.pool.rows[layer_idx][self.slots[start : start + token_ids.numel()]] = 1.0

    def write_kv(self, layer_idx, start, kv, stream):
        self.is_prepared = True
        super().write_kv(layer_idx, start, kv, stream)
