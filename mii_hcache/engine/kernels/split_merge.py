"""Merging what several programs computed of one tile, each over a part of its keys."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from mii_hcache.engine.kernels.launch import Launcher

NUM_WARPS = 4


@triton.jit
def split_merge_kernel(
    merges,  # [num_merges, 4] int32
    partials,  # [num_partials, KV_HEADS, ROWS, HEAD] float32
    log_sums,  # [num_partials, KV_HEADS, ROWS] float32, base 2
    out,  # [num_tokens, KV_HEADS * GROUP * HEAD]
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    PART: tl.constexpr,
):
    merge = merges + tl.program_id(0) * 4
    kv_head = tl.program_id(1)
    first_row = tl.load(merge)
    num_queries = tl.load(merge + 1)
    first_partial = tl.load(merge + 2).to(tl.int64)
    num_partials = tl.load(merge + 3)
    tile_row = tl.program_id(2) * PART + tl.arange(0, PART)
    query = tile_row // GROUP
    head = kv_head * GROUP + tile_row % GROUP
    is_row = query < num_queries
    at = tl.arange(0, HEAD_PAD)
    is_element = is_row[:, None] & (at < HEAD)[None, :]

    total = tl.zeros([PART, HEAD_PAD], dtype=tl.float32)
    best = tl.full([PART], float("-inf"), dtype=tl.float32)
    weight_sum = tl.zeros([PART], dtype=tl.float32)
    for idx in range(num_partials):
        row = ((first_partial + idx) * KV_HEADS + kv_head) * ROWS + tile_row
        log_sum = tl.load(log_sums + row, mask=is_row, other=float("-inf"))
        part = tl.load(partials + (row * HEAD)[:, None] + at[None, :], mask=is_element, other=0.0)
        new_best = tl.maximum(best, log_sum)
        base = tl.where(new_best == float("-inf"), 0.0, new_best)
        weight = tl.exp2(log_sum - base)  # 0 for a part of which the query sees no key
        shrink = tl.exp2(best - base)
        total = total * shrink[:, None] + part * weight[:, None]
        weight_sum = weight_sum * shrink + weight
        best = new_best
    total = total / tl.where(weight_sum == 0.0, 1.0, weight_sum)[:, None]
    target = out + (((first_row + query).to(tl.int64) * (KV_HEADS * GROUP) + head) * HEAD)[:, None] + at[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=is_element)


@cache
def constants(*, kv_heads: int, group: int, head_size: int, rows: int) -> dict[str, int]:
    """What the kernel is compiled for; shared, not to be changed."""
    return {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "HEAD": head_size,
        "HEAD_PAD": triton.next_power_of_2(head_size),
        "ROWS": rows,
        "PART": min(16, rows),
    }


def merge_splits(
    merges: torch.Tensor, partials: torch.Tensor, log_sums: torch.Tensor, out: torch.Tensor, *, group: int
) -> None:
    """Merge the tiles of `merges` (`Work.merges`, on the device) into `out`.

    partials: float32, `[num_partials, num_kv_heads, rows, head_size]`; log_sums: without the last axis; out:
    `[num_tokens, num_heads * head_size]`, contiguous. Launched on the current stream, behind `attend_tiles`.
    """
    _, kv_heads, rows, head_size = partials.shape
    if log_sums.shape != partials.shape[:3] or merges.shape[1:] != (4,) or merges.dtype != torch.int32:
        raise ValueError(f"log_sums {tuple(log_sums.shape)}, merges {tuple(merges.shape)} do not fit")
    if out.shape[1] != kv_heads * group * head_size or not out.is_contiguous() or not partials.is_contiguous():
        raise ValueError(f"out {tuple(out.shape)} of {kv_heads * group} heads of {head_size}, contiguous, is wanted")
    if merges.shape[0] == 0:
        return
    launch, num_parts = launcher(kv_heads, group, head_size, rows)
    launch((merges.shape[0], kv_heads, num_parts), merges, partials, log_sums, out)


@cache
def launcher(kv_heads: int, group: int, head_size: int, rows: int) -> tuple[Launcher, int]:
    """For one kind of tile, and the programs that share one."""
    sizes = constants(kv_heads=kv_heads, group=group, head_size=head_size, rows=rows)
    return Launcher(split_merge_kernel, sizes, num_warps=NUM_WARPS), rows // sizes["PART"]
