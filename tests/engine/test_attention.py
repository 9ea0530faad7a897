"""Both ways of attending against attention written out in full."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mii_hcache.engine.blocks import BlockAllocator
from mii_hcache.engine.modules.attend import attend_gathered, attend_in_place, can_attend_in_place
from mii_hcache.engine.modules.batch_plan import BatchSequence, runs_of

BLOCK, HEAD = 4, 8


def _case(num_seen: int, num_tokens: int, num_heads: int, num_kv_heads: int, seed: int):
    """A sequence in scattered blocks of a poisoned pool; its keys and values as they should be read."""
    generator = torch.Generator().manual_seed(seed)
    num_total = num_seen + num_tokens
    num_blocks = -(-num_total // BLOCK)
    chance = random.Random(seed)
    pool = list(range(40))
    if chance.random() < 0.5:
        chance.shuffle(pool)
    block_ids = torch.tensor(pool[:num_blocks])
    cache = torch.full((40, BLOCK, 2, num_kv_heads, HEAD), float("nan"))
    kv = torch.randn(num_total, 2, num_kv_heads, HEAD, generator=generator)
    slots = block_ids[torch.arange(num_total) // BLOCK] * BLOCK + torch.arange(num_total) % BLOCK
    cache.view(-1, 2, num_kv_heads, HEAD)[slots] = kv
    sequence = BatchSequence(
        start=0, num_tokens=num_tokens, num_seen=num_seen, block_ids=block_ids, runs=runs_of(block_ids)
    )
    q = torch.randn(num_tokens, num_heads, HEAD, generator=generator)
    return q, kv, cache, sequence


def _written_out(q, kv, positions, scale, softcap=None, window=None):
    group = q.shape[1] // kv.shape[2]
    keys, values = (kv[:, idx].repeat_interleave(group, 1) for idx in (0, 1))
    scores = torch.einsum("qhd,khd->hqk", q, keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    for row, position in enumerate(positions):
        for key in range(kv.shape[0]):
            if key > position or (window is not None and key <= position - window):
                scores[:, row, key] = float("-inf")
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)


shapes = st.tuples(
    st.integers(0, 90),
    st.one_of(st.just(1), st.integers(1, 40)),
    st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    st.integers(0, 10**6),
)


@settings(max_examples=60, deadline=None)
@given(shapes)
def test_in_place_and_gathered_agree_with_attention_written_out(shape):
    num_seen, num_tokens, (num_heads, num_kv_heads), seed = shape
    q, kv, cache, sequence = _case(num_seen, num_tokens, num_heads, num_kv_heads, seed)
    expected = _written_out(q, kv, range(num_seen, num_seen + num_tokens), 0.3)
    gathered = attend_gathered(q, cache, sequence, None, 0.3, None, None)
    torch.testing.assert_close(gathered, expected, atol=1e-5, rtol=1e-5)
    own = kv[num_seen:]
    in_place = attend_in_place(q, own[:, 0], own[:, 1], cache, sequence, 0.3)
    torch.testing.assert_close(in_place, expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(shapes, st.sampled_from([None, 1, 3, 20]), st.sampled_from([None, 5.0]))
def test_windows_and_softcaps(shape, window, softcap):
    num_seen, num_tokens, (num_heads, num_kv_heads), seed = shape
    q, kv, cache, sequence = _case(num_seen, num_tokens, num_heads, num_kv_heads, seed)
    expected = _written_out(q, kv, range(num_seen, num_seen + num_tokens), 0.3, softcap, window)
    told = attend_gathered(q, cache, sequence, None, 0.3, softcap, window)
    torch.testing.assert_close(told, expected, atol=1e-5, rtol=1e-5)
    if softcap is None and can_attend_in_place(cache, sequence, window):
        own = kv[num_seen:]
        in_place = attend_in_place(q, own[:, 0], own[:, 1], cache, sequence, 0.3, window)
        torch.testing.assert_close(in_place, expected, atol=1e-5, rtol=1e-5)


def test_query_positions_other_than_the_last():
    q, kv, cache, sequence = _case(20, 3, 4, 2, 1)
    positions = torch.tensor([5, 22, 11])
    expected = _written_out(q, kv, positions.tolist(), 0.3)
    told = attend_gathered(q, cache, sequence, positions, 0.3, None, None)
    torch.testing.assert_close(told, expected, atol=1e-5, rtol=1e-5)


def test_this_torch_can_attend_in_place():
    """Without the operator every decode step copies the history: correct, and several times slower."""
    _, _, cache, sequence = _case(20, 3, 4, 2, 1)
    assert can_attend_in_place(cache, sequence, None)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=30, unique=True))
def test_runs_cover_the_blocks_in_order(ids):
    runs = runs_of(torch.tensor(ids))
    assert [block for first, length in runs for block in range(first, first + length)] == ids
    assert all(first + length != following for (first, length), (following, _) in pairwise(runs))


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), max_size=60))
def test_allocator_never_gives_a_block_twice(steps):
    allocator = BlockAllocator(32)
    held: dict[int, list[int]] = {}
    for owner, count in steps:
        if count > allocator.free_blocks:
            with pytest.raises(ValueError, match="blocks wanted"):
                allocator.allocate(count)
            allocator.free(held.pop(owner, []))
            continue
        blocks = held.setdefault(owner, [])
        blocks += allocator.allocate(count, after=blocks[-1] if blocks else None).tolist()
        everything = [block for owned in held.values() for block in owned]
        assert len(set(everything)) == len(everything)
        assert allocator.free_blocks == 32 - len(everything)


def test_sequences_that_grow_by_turns_stay_in_few_runs():
    allocator = BlockAllocator(1024)
    sequences = [allocator.allocate(20).tolist() for _ in range(4)]
    for _ in range(60):
        for blocks in sequences:
            blocks += allocator.allocate(1, after=blocks[-1]).tolist()
    for blocks in sequences:
        assert len(runs_of(torch.tensor(blocks))) <= 6
