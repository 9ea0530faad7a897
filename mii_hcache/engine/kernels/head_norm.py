"""The norm over each query and key head of a step (Qwen3), in place: one launch in the place of a dozen."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from mii_hcache.engine.kernels.launch import Launcher

TOKENS = 16
"""Tokens of one program."""
NUM_WARPS = 4


@triton.jit
def rms_factor(wide, eps, HEAD: tl.constexpr):
    """`[rows]`: what each row of `wide` (`[rows, elements]` float32, HEAD of them no padding) is multiplied by."""
    return tl.rsqrt(tl.sum(wide * wide, axis=1) / HEAD + eps)


@triton.jit
def scaled(wide, factor, weight, dtype: tl.constexpr):
    """`wide * factor * weight` in `dtype`, rounded after each product as torch does."""
    return ((wide * factor[:, None]).to(dtype).to(tl.float32) * weight[None, :]).to(dtype)


@triton.jit(do_not_specialize=["num_tokens"])
def head_norm_kernel(
    rows,  # [num_tokens, row_stride]: heads of q, of k, and more
    row_stride,
    num_tokens,
    q_gamma,  # [HEAD]
    k_gamma,
    eps,
    QUERY_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    TOKENS: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1)
    at = tl.arange(0, HEAD_PAD)
    is_head = at < HEAD
    is_element = (token < num_tokens)[:, None] & is_head[None, :]
    element = rows + (token.to(tl.int64) * row_stride + head * HEAD)[:, None] + at[None, :]
    wide = tl.load(element, mask=is_element, other=0.0).to(tl.float32)
    if head < QUERY_HEADS:
        weight = tl.load(q_gamma + at, mask=is_head, other=0.0).to(tl.float32)
    else:
        weight = tl.load(k_gamma + at, mask=is_head, other=0.0).to(tl.float32)
    tl.store(element, scaled(wide, rms_factor(wide, eps, HEAD), weight, rows.dtype.element_ty), mask=is_element)


@cache
def constants(*, query_heads: int, head_size: int) -> dict[str, int]:
    """What the kernel is compiled for; shared, not to be changed."""
    return {
        "QUERY_HEADS": query_heads,
        "HEAD": head_size,
        "HEAD_PAD": triton.next_power_of_2(head_size),
        "TOKENS": TOKENS,
    }


def norm_heads(rows: torch.Tensor, q_gamma: torch.Tensor, k_gamma: torch.Tensor, *, kv_heads: int, eps: float) -> None:
    """RMSNorm over each of the query heads and `kv_heads` key heads of `rows`, in place; values stay.

    rows: `[num_tokens, (num_heads + 2 * kv_heads) * head_size]`, heads of q, then k, then v; q_gamma, k_gamma:
    `[head_size]`, the dtype of rows. Launched on the current stream.
    """
    num_tokens, num_elements = rows.shape
    (head_size,) = q_gamma.shape
    query_heads = num_elements // head_size - 2 * kv_heads
    if k_gamma.shape != q_gamma.shape or num_elements % head_size or query_heads < 1 or rows.stride(-1) != 1:
        raise ValueError(f"rows {tuple(rows.shape)} are not of whole heads of {head_size}, {kv_heads} of them keys")
    if num_tokens:
        grid = (-(-num_tokens // TOKENS), query_heads + kv_heads, 1)
        launcher(query_heads, head_size)(grid, rows, rows.stride(0), num_tokens, q_gamma, k_gamma, eps)


@cache
def launcher(query_heads: int, head_size: int) -> Launcher:
    """For rows with so many query heads."""
    return Launcher(head_norm_kernel, constants(query_heads=query_heads, head_size=head_size), num_warps=NUM_WARPS)
