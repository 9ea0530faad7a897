"""The canary: names of the host that mii_hcache leans on, and what happens when one moves."""

from __future__ import annotations

import pytest
import torch

from mii_hcache.engine import compat
from mii_hcache.engine.blocks import BlockAllocator
from mii_hcache.errors import HCacheError


def test_every_upstream_name_is_there():
    assert compat.missing_names() == []


def test_a_name_that_moved_is_named(monkeypatch):
    moved = "mii.batching.ragged_batching:RaggedBatchBase.not_there"
    monkeypatch.setattr(compat, "NEEDED_NAMES", (*compat.NEEDED_NAMES, moved))
    assert compat.missing_names(compat.NEEDED_NAMES) == [moved]
    monkeypatch.setattr(compat, "missing_names", lambda: [moved])
    monkeypatch.setattr(compat, "_installed", False)
    with pytest.raises(HCacheError, match=r"not_there.*deepspeed 0\.19\.8"):
        compat.install()


def test_the_host_opens_no_port():
    compat.install()
    store = torch.distributed.distributed_c10d._get_default_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    assert isinstance(store, torch.distributed.HashStore)


class TestBlockAllocator:
    def test_gives_each_block_once_and_takes_it_back(self):
        allocator = BlockAllocator(5)
        first = allocator.allocate(3)
        second = allocator.allocate(2)
        assert sorted([*first.tolist(), *second.tolist()]) == [0, 1, 2, 3, 4]
        assert allocator.free_blocks == 0
        allocator.free(first)
        assert sorted(allocator.allocate(3).tolist()) == sorted(first.tolist())

    def test_too_many_takes_none(self):
        allocator = BlockAllocator(3)
        with pytest.raises(ValueError, match="4 blocks wanted, 3 of 3"):
            allocator.allocate(4)
        assert allocator.free_blocks == 3

    @pytest.mark.parametrize("blocks", [[0], [1, 1], [7], [-1]])
    def test_wrong_frees_change_nothing(self, blocks):
        allocator = BlockAllocator(3)
        taken = allocator.allocate(3).tolist()
        allocator.free([0])
        with pytest.raises(ValueError, match="block"):
            allocator.free(blocks)
        assert allocator.free_blocks == 1
        allocator.free([block for block in taken if block != 0])
        assert allocator.free_blocks == 3
