"""Causal attention of a ragged batch over K and V in blocks: prompts with a past, and decode.

A program computes one tile (`work`): queries of one sequence times the query heads of one KV head, so that grouped
queries share what is read. It goes over its keys with an online softmax in base 2, sums in float32.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from mii_hcache.engine.kernels.launch import Launcher
from mii_hcache.engine.kernels.work import TileShape

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _attend(
    total,
    best,
    weight_sum,
    q,
    cache,
    table,
    position,
    first_key,
    last_key,
    end_key,
    kv_head,
    scale,
    softcap,
    window,
    KV_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    IS_MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Keys `[first_key, last_key)`, of which those from `end_key` on do not exist; IS_MASKED False: all queries see
    all of them."""
    at = tl.arange(0, HEAD_PAD)
    is_head = at < HEAD
    offset = tl.arange(0, KEYS)
    for start in range(first_key, last_key, KEYS):
        key = start + offset
        is_key = key < end_key
        if BLOCK % KEYS == 0:  # a turn lies in one block
            block = tl.load(table + start // BLOCK).to(tl.int64)
            slot = block * BLOCK + (start % BLOCK + offset)
        else:
            block = tl.load(table + key // BLOCK, mask=is_key, other=0).to(tl.int64)
            slot = block * BLOCK + key % BLOCK
        row = cache + slot * (2 * KV_HEADS * HEAD) + kv_head * HEAD
        if IS_MASKED:  # rows behind the end may hold anything: they are not read
            k = tl.load(row[None, :] + at[:, None], mask=is_key[None, :] & is_head[:, None], other=0.0)
        elif HEAD == HEAD_PAD:
            k = tl.load(row[None, :] + at[:, None])
        else:
            k = tl.load(row[None, :] + at[:, None], mask=is_head[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision=PRECISION)
        if HAS_SOFTCAP:
            scores = softcap * (1.0 - 2.0 / (tl.exp(scores * (2.0 * scale / softcap)) + 1.0)) * LOG2_E
        else:
            scores = scores * (scale * LOG2_E)
        if IS_MASKED:
            is_seen = is_key[None, :] & (key[None, :] <= position[:, None])
            if HAS_WINDOW:
                is_seen = is_seen & (key[None, :] > position[:, None] - window)
            scores = tl.where(is_seen, scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        base = tl.where(new_best == float("-inf"), 0.0, new_best)  # a row that has seen no key yet
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(best - base)
        weight_sum = weight_sum * shrink + tl.sum(weights, 1)
        value = row + KV_HEADS * HEAD
        if IS_MASKED:
            v = tl.load(value[:, None] + at[None, :], mask=is_key[:, None] & is_head[None, :], other=0.0)
        elif HEAD == HEAD_PAD:
            v = tl.load(value[:, None] + at[None, :])
        else:
            v = tl.load(value[:, None] + at[None, :], mask=is_head[None, :], other=0.0)
        total = total * shrink[:, None]
        total = tl.dot(weights.to(v.dtype), v, total, input_precision=PRECISION)
        best = new_best
    return total, best, weight_sum


@triton.jit(do_not_specialize=["table_width", "window"])
def paged_attention_kernel(
    rows,  # [num_tokens, row_stride]: each begins with its query heads
    row_stride,
    cache,  # [num_slots, 2, KV_HEADS, HEAD]
    tables,  # [num_sequences, table_width] int32
    table_width,
    items,  # [num_items, 8] int32
    out,  # [num_tokens, KV_HEADS * GROUP * HEAD]
    partials,  # [num_partials, KV_HEADS, ROWS, HEAD] float32
    log_sums,  # [num_partials, KV_HEADS, ROWS] float32, base 2
    scale,
    softcap,
    window,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    item = items + tl.program_id(0) * 8
    kv_head = tl.program_id(1)
    first_row = tl.load(item)
    first_position = tl.load(item + 1)
    num_queries = tl.load(item + 2)
    first_key = tl.load(item + 3)
    last_key = tl.load(item + 4)
    table = tables + tl.load(item + 5).to(tl.int64) * table_width
    place = tl.load(item + 6)

    tile_row = tl.arange(0, ROWS)
    query = tile_row // GROUP
    head = kv_head * GROUP + tile_row % GROUP
    is_row = query < num_queries
    at = tl.arange(0, HEAD_PAD)
    is_element = is_row[:, None] & (at < HEAD)[None, :]
    batch_row = (first_row + query).to(tl.int64)
    q = tl.load(rows + (batch_row * row_stride + head * HEAD)[:, None] + at[None, :], mask=is_element, other=0.0)
    position = first_position + query

    total = tl.zeros([ROWS, HEAD_PAD], dtype=tl.float32)
    best = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    weight_sum = tl.zeros([ROWS], dtype=tl.float32)
    # Keys before the first query's own turn are seen by every query; with a window, none is for sure.
    seen_by_all = first_key
    if not HAS_WINDOW:
        seen_by_all = tl.maximum(first_key, tl.minimum(last_key, first_position + 1) // KEYS * KEYS)
        total, best, weight_sum = _attend(
            total, best, weight_sum, q, cache, table, position, first_key, seen_by_all, seen_by_all, kv_head,
            scale, softcap, window, KV_HEADS, HEAD, HEAD_PAD, BLOCK, KEYS, False, False, HAS_SOFTCAP, PRECISION,
        )  # fmt: skip
    total, best, weight_sum = _attend(
        total, best, weight_sum, q, cache, table, position, seen_by_all, last_key, last_key, kv_head,
        scale, softcap, window, KV_HEADS, HEAD, HEAD_PAD, BLOCK, KEYS, True, HAS_WINDOW, HAS_SOFTCAP, PRECISION,
    )  # fmt: skip

    weight_sum = tl.where(weight_sum == 0.0, 1.0, weight_sum)  # a row that sees no key of this part: best is -inf
    total = total / weight_sum[:, None]
    if place < 0:
        target = out + ((batch_row * (KV_HEADS * GROUP) + head) * HEAD)[:, None] + at[None, :]
        tl.store(target, total.to(out.dtype.element_ty), mask=is_element)
    else:
        partial_row = (place.to(tl.int64) * KV_HEADS + kv_head) * ROWS + tile_row
        tl.store(partials + (partial_row * HEAD)[:, None] + at[None, :], total, mask=is_element)
        tl.store(log_sums + partial_row, best + tl.log2(weight_sum), mask=is_row)


@cache
def constants(
    shape: TileShape,
    *,
    kv_heads: int,
    group: int,
    head_size: int,
    block_size: int,
    dtype: torch.dtype,
    has_window: bool = False,
    has_softcap: bool = False,
) -> dict[str, object]:
    """What the kernel is compiled for; shared, not to be changed. float32 is multiplied as such: TF32 has ten bits."""
    return {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "HEAD": head_size,
        "HEAD_PAD": max(16, triton.next_power_of_2(head_size)),
        "BLOCK": block_size,
        "ROWS": shape.rows,
        "KEYS": shape.keys,
        "HAS_WINDOW": has_window,
        "HAS_SOFTCAP": has_softcap,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }


def attend_tiles(
    rows: torch.Tensor,
    kv_cache: torch.Tensor,
    tables: torch.Tensor,
    items: torch.Tensor,
    out: torch.Tensor,
    partials: torch.Tensor,
    log_sums: torch.Tensor,
    *,
    shape: TileShape,
    group: int,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> None:
    """Compute the tiles of `items` (`Work.items`, on the device, cut for `shape`).

    rows: `[num_tokens, >= num_heads * head_size]`, each beginning with its rotated query heads; kv_cache: `[num_blocks,
    block_size, 2, num_kv_heads, head_size]`, which holds the batch's own K and V already; tables: `[num_sequences,
    width]`, int32; out: `[num_tokens, num_heads * head_size]`, contiguous. partials: float32, `[num_partials,
    num_kv_heads, shape.rows, head_size]`, log_sums: without the last axis: for items that are parts, to be merged by
    `split_merge`. Launched on the current stream.
    """
    _, block_size, _, kv_heads, head_size = kv_cache.shape
    if not (rows.dtype == kv_cache.dtype == out.dtype) or rows.stride(-1) != 1 or not kv_cache.is_contiguous():
        raise ValueError(f"rows {rows.dtype}, cache {kv_cache.dtype} and out {out.dtype} must be alike and contiguous")
    if rows.shape[1] < kv_heads * group * head_size or out.shape != (rows.shape[0], kv_heads * group * head_size):
        raise ValueError(f"rows {tuple(rows.shape)}, out {tuple(out.shape)} of {kv_heads * group} heads of {head_size}")
    if items.dtype != torch.int32 or tables.dtype != torch.int32 or items.shape[1:] != (8,):
        raise ValueError("items are [num_items, 8], tables [num_sequences, width], both int32")
    if items.shape[0] == 0:
        return
    launch = launcher(
        shape, kv_heads, group, head_size, block_size, rows.dtype, window is not None, softcap is not None
    )
    launch(
        (items.shape[0], kv_heads, 1),
        rows,
        rows.stride(0),
        kv_cache,
        tables,
        tables.shape[1],
        items,
        out,
        partials,
        log_sums,
        scale,
        softcap or 1.0,
        window or 0,
    )


@cache
def launcher(
    shape: TileShape,
    kv_heads: int,
    group: int,
    head_size: int,
    block_size: int,
    dtype: torch.dtype,
    has_window: bool,
    has_softcap: bool,
) -> Launcher:
    """For one kind of tile of one kind of layer."""
    chosen = constants(
        shape,
        kv_heads=kv_heads,
        group=group,
        head_size=head_size,
        block_size=block_size,
        dtype=dtype,
        has_window=has_window,
        has_softcap=has_softcap,
    )
    return Launcher(paged_attention_kernel, chosen, num_warps=shape.num_warps, num_stages=shape.num_stages)
