"""Rotation and the way into the blocks against the torch modules, for steps and for restored rows."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (pip install 'mii-hcache[test]')")

from mii_hcache.engine.kernels.rope_scatter import make_tables, rope_scatter
from mii_hcache.engine.modules.norm import rms_norm
from mii_hcache.engine.modules.rope import rotary_tables, rotate
from tests.kernels.kernel_kit import DEVICE, Batch, make_batch

LENGTHS = [(0, 1), (63, 2), (64, 17), (0, 33), (5, 1)]
MAX_POSITIONS = 40_000


def _inv_freq(rotary_dim: int) -> torch.Tensor:
    return 1.0 / (1e4 ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)).to(DEVICE)


def _check_blocks(batch: Batch, expected: torch.Tensor, before: torch.Tensor) -> None:
    """The slots hold `expected` `[num_tokens, 2, num_kv_heads, head_size]`, V to the bit; no other row moved."""
    rows, old = (cache.view(-1, *cache.shape[2:]).cpu() for cache in (batch.cache, before))
    slots = batch.slots.cpu()
    tolerance = 1e-6 if expected.dtype == torch.float32 else 2e-3
    torch.testing.assert_close(rows[slots, 0], expected[:, 0], atol=tolerance, rtol=tolerance)
    assert torch.equal(rows[slots, 1], expected[:, 1])
    others = torch.ones(rows.shape[0], dtype=torch.bool)
    others[slots] = False
    assert torch.equal(rows[others].nan_to_num(7.0), old[others].nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("heads", "head_size", "rotary_dim"),
    [((2, 2), 64, 64), ((4, 1), 80, 80), ((6, 2), 96, 96), ((2, 1), 128, 128), ((2, 1), 80, 32), ((2, 2), 40, 0)],
)
@pytest.mark.parametrize("block_size", [16, 64])
def test_a_step(heads, head_size, rotary_dim, block_size, dtype):
    num_heads, kv_heads = heads
    batch = make_batch(
        LENGTHS, num_kv_heads=kv_heads, head_size=head_size, block_size=block_size, dtype=dtype, holds_own=False
    )
    batch.positions[-3:] = torch.tensor([32_767, 39_998, MAX_POSITIONS - 1])  # angles of thousands of turns
    rows = torch.randn(batch.num_tokens, num_heads + 2 * kv_heads, head_size).to(dtype).to(DEVICE)
    q, k, v = (part.clone() for part in rows.split([num_heads, kv_heads, kv_heads], dim=1))
    tables = None
    if rotary_dim:
        inv_freq = _inv_freq(rotary_dim)
        tables = make_tables(inv_freq, MAX_POSITIONS)
        cos, sin = rotary_tables(batch.positions, inv_freq)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    before = batch.cache.clone()
    rope_scatter(rows.flatten(1), batch.cache, batch.positions, batch.slots, tables, query_heads=num_heads)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(rows[:, :num_heads], q, atol=tolerance, rtol=tolerance)
    _check_blocks(batch, torch.stack([k, v], dim=1).cpu(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("head_size", "rotary_dim"), [(64, 64), (80, 80), (80, 32), (128, 128)])
@pytest.mark.parametrize("has_norm", [False, True])
def test_restored_rows(head_size, rotary_dim, has_norm, dtype):
    batch = make_batch(LENGTHS, num_kv_heads=2, head_size=head_size, block_size=16, dtype=dtype, holds_own=False)
    rows = torch.randn(batch.num_tokens, 2, 2, head_size).to(dtype).to(DEVICE)
    gamma = torch.randn(head_size).to(dtype).to(DEVICE) if has_norm else None
    inv_freq = _inv_freq(rotary_dim)
    k = rows[:, 0] if gamma is None else rms_norm(rows[:, 0], gamma, 1e-5)
    expected = torch.stack([rotate(k, *rotary_tables(batch.positions, inv_freq)), rows[:, 1]], dim=1).cpu()
    before = batch.cache.clone()
    tables = make_tables(inv_freq, 200)
    rope_scatter(
        rows.flatten(1), batch.cache, batch.positions, batch.slots, tables, query_heads=0, k_gamma=gamma, eps=1e-5
    )
    _check_blocks(batch, expected, before)


def test_a_step_and_a_restore_give_the_same_bits():
    heads, head_size = 2, 64
    batch = make_batch(
        LENGTHS, num_kv_heads=heads, head_size=head_size, block_size=16, dtype=torch.float16, holds_own=False
    )
    rows = torch.randn(batch.num_tokens, 3 * heads * head_size).half().to(DEVICE)
    kv = rows[:, heads * head_size :].clone()
    tables = make_tables(_inv_freq(head_size), 200)
    restored = batch.cache.clone()
    rope_scatter(rows, batch.cache, batch.positions, batch.slots, tables, query_heads=heads)
    rope_scatter(kv, restored, batch.positions, batch.slots, tables, query_heads=0)
    assert torch.equal(restored.nan_to_num(7.0), batch.cache.nan_to_num(7.0))


def test_tables_are_those_of_the_torch_modules_to_the_bit():
    inv_freq = _inv_freq(32)
    cos, sin = make_tables(inv_freq, 5000)
    wanted = rotary_tables(torch.arange(5000), inv_freq.cpu())
    assert torch.equal(cos.cpu(), wanted[0][:, 0, :16]) and torch.equal(sin.cpu(), wanted[1][:, 0, :16])


def test_rows_that_do_not_fit_are_refused():
    batch = make_batch([(0, 3)], num_kv_heads=2, head_size=16, block_size=16, dtype=torch.float16)
    rows = torch.zeros(3, 64, dtype=torch.float16, device=DEVICE)
    for changed, queries in ((rows[:, :48], 0), (rows.float(), 0), (rows, 1), (rows[:2], 0)):
        with pytest.raises(ValueError, match=r"do not fit|of 2 tokens"):
            rope_scatter(changed, batch.cache, batch.positions, batch.slots, None, query_heads=queries)


def test_slots_beyond_the_reach_of_32_bits():
    kv_heads, head_size = 8, 128
    num_blocks = 2**31 // (64 * 2 * kv_heads * head_size) + 3
    cache = torch.empty(num_blocks, 64, 2, kv_heads, head_size, dtype=torch.float16, device=DEVICE)
    rows = torch.randn(3, 2, kv_heads, head_size).half().to(DEVICE)
    slots = torch.tensor([num_blocks * 64 - 1, num_blocks * 64 - 70, 5], device=DEVICE)
    rope_scatter(rows.flatten(1), cache, slots, slots, None, query_heads=0)
    assert torch.equal(cache.view(-1, 2, kv_heads, head_size)[slots], rows)
