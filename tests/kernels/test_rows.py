"""Norms and the gated activation against the torch modules, rounding included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed (pip install 'mii-hcache[test]')")

from mii_hcache.engine.kernels.gate import silu_mul
from mii_hcache.engine.kernels.norm import add_norm
from mii_hcache.engine.modules.norm import rms_norm
from tests.kernels.kernel_kit import DEVICE


def _rows(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * scale).to(dtype).to(DEVICE)


def _assert_nearly(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for float32 noise; in float16 that flips the last bit of a few elements at most."""
    if got.dtype == torch.float32:
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        return
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=2e-3)
    assert (got != expected).float().mean() < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("num_columns", [128, 100, 1536])
@pytest.mark.parametrize("is_rms", [True, False])
@pytest.mark.parametrize("adds", [True, False])
def test_add_norm(adds, is_rms, num_columns, dtype):
    residual = _rows(5, num_columns, dtype=dtype, scale=4.0) + 1.0
    hidden = _rows(5, num_columns, dtype=dtype) if adds else None
    gamma, beta = 1 + 0.1 * _rows(num_columns, dtype=dtype), _rows(num_columns, dtype=dtype)
    expected_residual = residual.clone() if hidden is None else residual + hidden
    if is_rms:
        expected = rms_norm(expected_residual, gamma, 1e-5)
    else:
        expected = F.layer_norm(expected_residual, (num_columns,), gamma, beta, 1e-5)
    out = torch.full_like(residual, float("nan"))
    add_norm(residual, hidden, gamma, None if is_rms else beta, out, eps=1e-5, is_rms=is_rms)
    assert torch.equal(residual, expected_residual)
    _assert_nearly(out, expected)


def test_rows_that_do_not_fit_are_refused():
    x = torch.zeros(2, 8, device=DEVICE)
    gamma = torch.ones(8, device=DEVICE)
    for hidden, weight, out, is_rms in (
        (x[:1], gamma, x.clone(), True),
        (None, gamma[:4], x.clone(), True),
        (None, gamma, x.half(), True),
        (torch.zeros(8, 2, device=DEVICE).t(), gamma, x.clone(), True),
        (None, gamma, x.clone(), False),
    ):
        with pytest.raises(ValueError):
            add_norm(x, hidden, weight, None, out, eps=1e-5, is_rms=is_rms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("num_columns", [96, 1024, 1500])
def test_silu_mul(num_columns, dtype):
    product = _rows(3, 2 * num_columns, dtype=dtype, scale=6.0)
    gate, up = product.chunk(2, dim=-1)
    _assert_nearly(silu_mul(product), F.silu(gate) * up)
