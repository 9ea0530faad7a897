"""Ranks are measured as they restore: all of them read, gather and place."""

from __future__ import annotations

import pytest

from mii_hcache.runtime.profiled_tier import ProfiledTier
from mii_hcache.runtime.profiler import TILE_TOKENS, profile_layer
from mii_hcache.runtime.ranks_profile import RanksStore, RanksTarget
from mii_hcache.storage.file import FileStore
from mii_hcache.storage.state_dir import StateDir
from tests.runtime.kit import wait_until
from tests.runtime.ranks_kit import LeadBlocks, Ranks
from tests.runtime.sharded_kit import MHA


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_all_ranks_take_part_and_gathering_is_told_apart(tmp_path, num_ranks):
    ranks = Ranks(MHA, num_ranks)
    state_dir = StateDir(tmp_path / "state")
    store = FileStore(state_dir, 64 << 20)
    try:
        uid = ranks.engines[0].open()
        for engine in ranks.engines:
            engine.max_fill_tokens = 256
        target = RanksTarget(
            adapter=ranks.engines[0], target=LeadBlocks(ranks, uid), uid=uid, peers=ranks, gather=ranks.gather
        )
        target.fill = lambda start, token_ids, num_layers: None
        costs, _ = profile_layer(
            adapter=ranks.engines[0],
            target=target,
            num_target_tokens=TILE_TOKENS,
            tiers={"file": ProfiledTier(store=RanksStore(store, ranks), forget=lambda: None)},
            io_bytes=1 << 20,
            repeats=2,
        )
        cost = target.with_gather(costs)["file"]
        ranks.settle()
        assert cost.io_hidden_s > 0 and cost.io_kv_s > 0
        assert 0 < cost.c_gather_s <= cost.c_hidden_s
        read = [state.counters.get("shard_read_bytes_total") for state in ranks.states[1:]]
        assert min(read) > 0 and max(read) == min(read), "each its part"
        writes = [engine.target(uid).writes for engine in ranks.engines]
        assert writes[0] and all(own == writes[0] for own in writes), "all ranks place the same"
        wait_until(lambda: all(state.tiles.num_held == 0 for state in ranks.states[1:]))
        assert store.stats().num_spans == 0
    finally:
        ranks.close()
        store.close()
        state_dir.close()
