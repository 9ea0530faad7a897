"""SiLU of the gate times the other half of the projection: three passes over memory instead of five."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mii_hcache.engine.kernels.launch import Launcher

COLUMNS = 1024
"""Columns of one program."""
NUM_WARPS = 4


@triton.jit
def silu_mul_kernel(product, out, num_columns, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < num_columns
    dtype = product.dtype.element_ty
    gate = tl.load(product + row * 2 * num_columns + column, mask=is_column, other=0.0).to(tl.float32)
    up = tl.load(product + row * 2 * num_columns + num_columns + column, mask=is_column, other=0.0).to(tl.float32)
    activated = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out + row * num_columns + column, (activated * up).to(dtype), mask=is_column)


_launch = Launcher(silu_mul_kernel, {"COLUMNS": COLUMNS}, num_warps=NUM_WARPS)


def silu_mul(product: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up`, rounded after each as torch does.

    product: `[num_rows, 2 * num_columns]`, contiguous, gate then up. Returns `[num_rows, num_columns]`, fresh. Launched
    on the current stream.
    """
    num_rows, doubled = product.shape
    if not product.is_contiguous() or doubled % 2:
        raise ValueError(f"a contiguous [num_rows, 2 * num_columns] is wanted, got {tuple(product.shape)}")
    out = product.new_empty(num_rows, doubled // 2)
    if num_rows:
        _launch((num_rows, -(-doubled // (2 * COLUMNS)), 1), product, out, doubled // 2)
    return out
