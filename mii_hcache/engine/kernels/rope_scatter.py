"""Rotary embedding and the way into the blocks, in one kernel: of a step's Q, K and V, or of restored K and V.

Cosine and sine come from float32 tables, made once per model on the CPU by `modules.rope.rotary_tables`: a kernel that
computes them must reduce angles of up to 10^5 radians by pi with care, which costs registers and local memory in every
layer, and Triton's own `cos` is another one in its interpreter and on each GPU. A table gives every device, and serving
and restoring, the same bits; a token's row of it is as large as a head.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from mii_hcache.engine.kernels.head_norm import rms_factor, scaled
from mii_hcache.engine.kernels.launch import Launcher
from mii_hcache.engine.modules.rope import rotary_tables

TOKENS = 16
"""Tokens of one program."""
NUM_WARPS = 4


def make_tables(inv_freq: torch.Tensor, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of positions `[0, num_positions)`: float32, each `[num_positions, rotary_dim / 2]`, on the device
    of `inv_freq` (`[rotary_dim / 2]`, float32)."""
    cos, sin = rotary_tables(torch.arange(num_positions), inv_freq.cpu())
    half = inv_freq.numel()
    return tuple(table[:, 0, :half].contiguous().to(inv_freq.device) for table in (cos, sin))  # type: ignore[return-value]


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["positions", "slots"])
def rope_scatter_kernel(
    rows,  # [num_tokens, row_stride]: heads of q, of k, of v
    row_stride,
    num_tokens,
    positions,  # [num_tokens] int64
    slots,  # [num_tokens] int64
    cos,  # [num_positions, ROTARY / 2] float32
    sin,
    gamma,  # [HEAD]: of the norm over each key head
    eps,
    cache,  # [num_slots, 2, KV_HEADS, HEAD]
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    ROTARY: tl.constexpr,
    HALF_PAD: tl.constexpr,
    HAS_NORM: tl.constexpr,
    TOKENS: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1)
    is_token = token < num_tokens
    is_query = head < QUERY_HEADS
    row = rows + token.to(tl.int64) * row_stride + head * HEAD
    slot = tl.load(slots + token, mask=is_token, other=0)
    target = cache + slot * (2 * KV_HEADS * HEAD) + (head - QUERY_HEADS) * HEAD
    dtype: tl.constexpr = rows.dtype.element_ty

    whole = tl.arange(0, HEAD_PAD)
    is_whole = is_token[:, None] & (whole < HEAD)[None, :]
    if HAS_NORM:  # restored keys only: a step's heads are normed before (`head_norm`)
        wide = tl.load(row[:, None] + whole[None, :], mask=is_whole, other=0.0).to(tl.float32)
        factor = rms_factor(wide, eps, HEAD)

    if ROTARY > 0:
        half: tl.constexpr = ROTARY // 2
        at = tl.arange(0, HALF_PAD)
        is_half = is_token[:, None] & (at < half)[None, :]
        first = tl.load(row[:, None] + at[None, :], mask=is_half, other=0.0).to(tl.float32)
        second = tl.load(row[:, None] + half + at[None, :], mask=is_half, other=0.0).to(tl.float32)
        if HAS_NORM:
            first_gamma = tl.load(gamma + at, mask=at < half, other=0.0).to(tl.float32)
            second_gamma = tl.load(gamma + half + at, mask=at < half, other=0.0).to(tl.float32)
            first = scaled(first, factor, first_gamma, dtype).to(tl.float32)
            second = scaled(second, factor, second_gamma, dtype).to(tl.float32)
        position = tl.load(positions + token, mask=is_token, other=0)
        angle = position[:, None] * half + at[None, :]
        c = tl.load(cos + angle, mask=is_half, other=0.0)
        s = tl.load(sin + angle, mask=is_half, other=0.0)
        turned_first = (first * c - second * s).to(dtype)
        turned_second = (second * c + first * s).to(dtype)
        if is_query:
            tl.store(row[:, None] + at[None, :], turned_first, mask=is_half)
            tl.store(row[:, None] + half + at[None, :], turned_second, mask=is_half)
        else:
            tl.store(target[:, None] + at[None, :], turned_first, mask=is_half)
            tl.store(target[:, None] + half + at[None, :], turned_second, mask=is_half)

    if not is_query:
        if ROTARY < HEAD:
            is_rest = is_whole & (whole >= ROTARY)[None, :]
            rest = tl.load(row[:, None] + whole[None, :], mask=is_rest, other=0.0)
            if HAS_NORM:
                rest_gamma = tl.load(gamma + whole, mask=whole < HEAD, other=0.0).to(tl.float32)
                rest = scaled(rest.to(tl.float32), factor, rest_gamma, dtype)
            tl.store(target[:, None] + whole[None, :], rest, mask=is_rest)
        value = tl.load(row[:, None] + KV_HEADS * HEAD + whole[None, :], mask=is_whole, other=0.0)
        tl.store(target[:, None] + KV_HEADS * HEAD + whole[None, :], value, mask=is_whole)


@cache
def constants(*, query_heads: int, kv_heads: int, head_size: int, rotary_dim: int, has_norm: bool) -> dict[str, int]:
    """What the kernel is compiled for; shared, not to be changed."""
    return {
        "QUERY_HEADS": query_heads,
        "KV_HEADS": kv_heads,
        "HEAD": head_size,
        "HEAD_PAD": triton.next_power_of_2(head_size),
        "ROTARY": rotary_dim,
        "HALF_PAD": triton.next_power_of_2(max(1, rotary_dim // 2)),
        "HAS_NORM": has_norm,
        "TOKENS": TOKENS,
    }


def rope_scatter(
    rows: torch.Tensor,
    kv_cache: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor] | None,
    *,
    query_heads: int,
    k_gamma: torch.Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Rotate q in place; norm (`k_gamma` `[head_size]`, only without queries) and rotate k and write it, and v, to
    their blocks.

    rows: `[num_tokens, (query_heads + 2 * num_kv_heads) * head_size]`, heads of q, then k, then v; restoring has no
    queries. kv_cache: `[num_blocks, block_size, 2, num_kv_heads, head_size]`, the dtype of `rows`. positions, slots:
    `[num_tokens]`, int64; slots are rows of the cache seen as `[num_blocks * block_size, ...]`. tables: `make_tables`,
    longer than every position; None for models without rotary embedding. Launched on the current stream.
    """
    num_tokens = rows.shape[0]
    kv_heads, head_size = kv_cache.shape[-2:]
    expected = (num_tokens, (query_heads + 2 * kv_heads) * head_size)
    if rows.shape != expected or rows.stride(-1) != 1 or rows.dtype != kv_cache.dtype or not kv_cache.is_contiguous():
        raise ValueError(f"rows {tuple(rows.shape)} {rows.dtype} do not fit {expected} of a {kv_cache.dtype} cache")
    if positions.shape != (num_tokens,) or slots.shape != (num_tokens,) or slots.dtype != torch.int64:
        raise ValueError(f"positions {tuple(positions.shape)}, slots {tuple(slots.shape)} of {num_tokens} tokens")
    if k_gamma is not None and query_heads:
        raise ValueError("the norm over heads is for restored keys: a step's are normed before, by `norm_heads`")
    if num_tokens == 0:
        return
    cos, sin = tables if tables is not None else (rows, rows)
    rotary_dim = 0 if tables is None else 2 * cos.shape[1]
    launcher(query_heads, kv_heads, head_size, rotary_dim, has_norm=k_gamma is not None)(
        (-(-num_tokens // TOKENS), query_heads + kv_heads, 1),
        rows,
        rows.stride(0),
        num_tokens,
        positions,
        slots,
        cos,
        sin,
        rows if k_gamma is None else k_gamma,
        eps,
        kv_cache,
    )


@cache
def launcher(query_heads: int, kv_heads: int, head_size: int, rotary_dim: int, *, has_norm: bool) -> Launcher:
    """For a model's steps, or its restores."""
    sizes = {"query_heads": query_heads, "kv_heads": kv_heads, "head_size": head_size, "rotary_dim": rotary_dim}
    return Launcher(rope_scatter_kernel, constants(**sizes, has_norm=has_norm), num_warps=NUM_WARPS)
