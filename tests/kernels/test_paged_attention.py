"""Attention over blocks, and the merge of its parts, against attention written out."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (pip install 'mii-hcache[test]')")

from mii_hcache.engine.kernels.paged_attention import attend_tiles
from mii_hcache.engine.kernels.split_merge import merge_splits
from mii_hcache.engine.kernels.work import TileShape, plan_work, tile_shapes
from tests.kernels.kernel_kit import DEVICE, TOLERANCE, Batch, make_batch, written_out

MANY_PROGRAMS, FEW_PROGRAMS = 10_000, 1
"""The first splits as far as is allowed, the second not at all."""


def _attend(
    batch: Batch,
    q: torch.Tensor,
    shapes: tuple[TileShape, TileShape],
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    num_programs: int = FEW_PROGRAMS,
) -> tuple[torch.Tensor, int]:
    """`[num_tokens, num_heads, head_size]`, and how many tiles were split."""
    num_tokens, num_heads, head_size = q.shape
    kv_heads = batch.cache.shape[3]
    group = num_heads // kv_heads
    works = plan_work(
        batch.descriptors,
        narrow=shapes[0],
        wide=shapes[1],
        group=group,
        num_kv_heads=kv_heads,
        num_programs=num_programs,
        window=window,
    )
    # K and V behind the queries, as in a projection's output: the stride is not the width.
    rows = torch.full((num_tokens, (num_heads + 2 * kv_heads) * head_size), float("nan"), dtype=q.dtype)
    rows[:, : num_heads * head_size] = q.flatten(1)
    rows = rows.to(DEVICE)
    out = torch.full((num_tokens, num_heads * head_size), float("nan"), dtype=q.dtype, device=DEVICE)
    for work, shape in zip(works, shapes, strict=True):
        partials = torch.full((work.num_partials, kv_heads, shape.rows, head_size), float("nan"), device=DEVICE)
        log_sums = torch.full(partials.shape[:3], float("nan"), device=DEVICE)
        attend_tiles(
            rows,
            batch.cache,
            batch.tables,
            work.items.to(DEVICE),
            out,
            partials,
            log_sums,
            shape=shape,
            group=group,
            scale=scale,
            softcap=softcap,
            window=window,
        )
        merge_splits(work.merges.to(DEVICE), partials, log_sums, out, group=group)
    return out.cpu().view(q.shape), sum(work.merges.shape[0] for work in works)


def _check(
    lengths: list[tuple[int, int]],
    *,
    heads: tuple[int, int],
    head_size: int,
    block_size: int,
    dtype: torch.dtype = torch.float32,
    softcap: float | None = None,
    window: int | None = None,
    num_programs: int = FEW_PROGRAMS,
    shapes: tuple[TileShape, TileShape] | None = None,
) -> int:
    num_heads, kv_heads = heads
    batch = make_batch(lengths, num_kv_heads=kv_heads, head_size=head_size, block_size=block_size, dtype=dtype)
    q = torch.randn(batch.num_tokens, num_heads, head_size, generator=torch.Generator().manual_seed(1)).to(dtype)
    scale = head_size**-0.5
    shapes = shapes or tile_shapes(group=num_heads // kv_heads, head_size=head_size, element_bytes=dtype.itemsize)
    got, num_merges = _attend(batch, q, shapes, scale=scale, softcap=softcap, window=window, num_programs=num_programs)
    for (start, count, seen), kv in zip(batch.descriptors, batch.kv, strict=True):
        expected = written_out(q[start : start + count], kv, seen, scale, softcap, window)
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(got[start : start + count].double(), expected, atol=tolerance, rtol=tolerance)
    return num_merges


RAGGED = [(0, 1), (0, 63), (62, 1), (63, 1), (64, 1), (0, 65), (1, 64), (17, 20)]
"""Seen and new tokens, at and beside the edges of blocks of 16 and 64 and of tiles."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("heads", [(2, 2), (4, 1), (6, 2)])
def test_a_ragged_batch(heads, block_size, dtype):
    _check(RAGGED, heads=heads, head_size=64, block_size=block_size, dtype=dtype)


@pytest.mark.parametrize("head_size", [24, 80, 96, 128, 256])
def test_head_sizes(head_size):
    _check([(0, 33), (64, 1), (30, 40)], heads=(2, 1), head_size=head_size, block_size=16, dtype=torch.float16)


@pytest.mark.parametrize("num_programs", [FEW_PROGRAMS, MANY_PROGRAMS])
def test_long_histories_whole_and_split(num_programs):
    lengths = [(2046, 1), (1500, 40), (10, 1)]
    num_merges = _check(lengths, heads=(2, 1), head_size=16, block_size=64, num_programs=num_programs)
    assert num_merges == (0 if num_programs == FEW_PROGRAMS else 2)


def test_parts_of_which_some_queries_see_nothing():
    """Splits at every turn of the loop: the first queries of a tile see no key of its last parts."""
    shape = TileShape(rows=64, keys=16, num_warps=4, num_stages=2)
    assert _check([(1030, 61)], heads=(1, 1), head_size=16, block_size=16, num_programs=MANY_PROGRAMS) == 1
    assert (
        _check(
            [(1030, 61)], heads=(1, 1), head_size=16, block_size=16, num_programs=MANY_PROGRAMS, shapes=(shape, shape)
        )
        == 1
    )


@pytest.mark.parametrize("window", [1, 3, 40])
def test_windows(window):
    _check(RAGGED, heads=(4, 2), head_size=32, block_size=16, window=window)


def test_a_window_behind_a_long_history_is_split_too():
    lengths = [(1200, 1), (700, 37)]
    _check(lengths, heads=(2, 1), head_size=16, block_size=64, window=600, num_programs=MANY_PROGRAMS)


@pytest.mark.parametrize("window", [None, 20])
def test_softcaps(window):
    _check([(0, 30), (40, 1)], heads=(2, 1), head_size=32, block_size=16, softcap=0.7, window=window)


def test_groups_that_are_no_power_of_two_and_larger_than_a_tile():
    _check([(5, 9), (20, 1)], heads=(14, 2), head_size=32, block_size=16)
    _check([(5, 3), (20, 1)], heads=(20, 1), head_size=32, block_size=16)


def test_rows_that_do_not_fit_are_refused():
    batch = make_batch([(0, 3)], num_kv_heads=1, head_size=16, block_size=16, dtype=torch.float32)
    shapes = tile_shapes(group=1, head_size=16, element_bytes=4)
    with pytest.raises(ValueError, match="must be alike"):
        _attend(batch, torch.zeros(3, 1, 16, dtype=torch.float16), shapes, scale=1.0)


def test_blocks_beyond_the_reach_of_32_bits():
    """A layer's part of a large pool has more than 2^31 elements. Only the pages that are touched take memory."""
    block_size, kv_heads, head_size = 64, 8, 128
    num_blocks = 2**31 // (block_size * 2 * kv_heads * head_size) + 3
    cache = torch.empty(num_blocks, block_size, 2, kv_heads, head_size, dtype=torch.float16, device=DEVICE)
    batch = make_batch([(70, 1), (0, 3)], num_kv_heads=kv_heads, head_size=head_size, block_size=64, dtype=cache.dtype)
    for block in batch.tables.unique().tolist():
        cache[num_blocks - 1 - block] = batch.cache[block]
    batch.tables, batch.cache = num_blocks - 1 - batch.tables, cache
    q = torch.randn(batch.num_tokens, kv_heads, head_size).half()
    got, _ = _attend(batch, q, tile_shapes(group=1, head_size=head_size, element_bytes=2), scale=0.1)
    for (start, count, seen), kv in zip(batch.descriptors, batch.kv, strict=True):
        expected = written_out(q[start : start + count], kv, seen, 0.1)
        torch.testing.assert_close(got[start : start + count].double(), expected, atol=2e-3, rtol=2e-3)
