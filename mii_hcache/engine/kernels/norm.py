"""Add into the residual stream and norm it, in one pass over the row."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from mii_hcache.engine.kernels.launch import Launcher


@triton.jit
def add_norm_kernel(
    residual,  # [num_rows, num_columns]
    hidden,  # the same shape: added first
    gamma,  # [num_columns]
    beta,
    out,  # [num_rows, num_columns]
    num_columns,
    eps,
    COLUMNS: tl.constexpr,
    HAS_HIDDEN: tl.constexpr,
    IS_RMS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * num_columns
    column = tl.arange(0, COLUMNS)
    is_column = column < num_columns
    dtype = residual.dtype.element_ty
    x = tl.load(residual + row + column, mask=is_column, other=0.0).to(tl.float32)
    if HAS_HIDDEN:
        added = (x + tl.load(hidden + row + column, mask=is_column, other=0.0).to(tl.float32)).to(dtype)
        tl.store(residual + row + column, added, mask=is_column)
        x = added.to(tl.float32)
    weight = tl.load(gamma + column, mask=is_column, other=0.0).to(tl.float32)
    if IS_RMS:
        factor = tl.rsqrt(tl.sum(x * x, axis=0) / num_columns + eps)
        normed = (x * factor).to(dtype).to(tl.float32) * weight
    else:
        mean = tl.sum(x, axis=0) / num_columns
        centred = tl.where(is_column, x - mean, 0.0)
        factor = tl.rsqrt(tl.sum(centred * centred, axis=0) / num_columns + eps)
        shift = tl.load(beta + column, mask=is_column, other=0.0).to(tl.float32)
        normed = centred * factor * weight + shift
    tl.store(out + row + column, normed.to(dtype), mask=is_column)


def num_warps_for(num_columns: int) -> int:
    """A row is one program: 16 elements a thread at most."""
    return min(16, max(4, triton.next_power_of_2(num_columns) // 512))


def add_norm(
    residual: torch.Tensor,
    hidden: torch.Tensor | None,
    gamma: torch.Tensor,
    beta: torch.Tensor | None,
    out: torch.Tensor,
    *,
    eps: float,
    is_rms: bool,
) -> None:
    """`residual += hidden` (unless None); `out = norm(residual)`: RMSNorm, or LayerNorm with its `beta`.

    residual, hidden, out: `[num_rows, num_columns]`, contiguous, one dtype; gamma, beta: `[num_columns]`. Statistics in
    float32 of the residual as it is stored. RMSNorm rounds before it scales, LayerNorm once at the end, as
    `modules.norm` does. Launched on the current stream.
    """
    num_rows, num_columns = shape = residual.shape
    for name, tensor in (("hidden", hidden), ("out", out)):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != residual.dtype):
            raise ValueError(f"{name} {tuple(tensor.shape)} {tensor.dtype} beside a residual {tuple(shape)}")
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"residual and {name} must be contiguous")
    if not residual.is_contiguous():
        raise ValueError("residual must be contiguous")
    if gamma.shape != (num_columns,) or (not is_rms and (beta is None or beta.shape != (num_columns,))):
        raise ValueError(f"gamma (and beta of a LayerNorm) must be [{num_columns}]")
    if num_rows == 0:
        return
    launcher(num_columns, has_hidden=hidden is not None, is_rms=is_rms)(
        (num_rows, 1, 1),
        residual,
        residual if hidden is None else hidden,
        gamma,
        gamma if beta is None else beta,
        out,
        num_columns,
        eps,
    )


@cache
def launcher(num_columns: int, *, has_hidden: bool, is_rms: bool) -> Launcher:
    """For rows of that length."""
    constants = {"COLUMNS": triton.next_power_of_2(num_columns), "HAS_HIDDEN": has_hidden, "IS_RMS": is_rms}
    return Launcher(add_norm_kernel, constants, num_warps=num_warps_for(num_columns))
