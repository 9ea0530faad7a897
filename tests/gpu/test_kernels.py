"""Our kernels at the shapes that are served, against plain torch on the same device.

Engines with few layers and the same weights: one with our kernels, one with torch's modules, and one in float32 that
says what is right. Ours may be as far from it as torch's are, give or take.
"""

from __future__ import annotations

import random

import pytest
import torch

from experiments.common.random_weights import random_engine
from mii_hcache.engine.ragged_engine import token_tensors

SHAPES = {
    "llama2-7b": {},
    "llama3-8b": {"rope_theta": 500000.0},
    "1b": {},  # heads of 64
    "250m": {"head_dim": 256, "num_attention_heads": 4, "num_key_value_heads": 2},
}
LAYERS = 2
ALLOWED = 2.0
"""Times the error of torch's own modules in the same dtype."""
BATCHES = (
    [(1, 2047)],
    [(1, 1), (2, 63), (3, 64), (4, 65), (5, 700)],
    [(1, 1), (2, 1), (3, 300), (4, 1), (5, 1)],
    [(1, 1), (2, 1), (3, 1), (4, 1), (5, 1)],
)
"""Sequences and their new tokens, of one ragged step after the other: prompts, mixed steps, decoding."""


def logits_of(shape: str, dtype: str, kernels: str, drawn_in: str) -> torch.Tensor:
    """Of every sequence of every step, `[num, vocab]`, float32 on the host. `drawn_in`: dtype that the weights are
    rounded to, whatever computes with them. Free blocks hold NaN."""
    engine = random_engine(
        shape,
        dtype=dtype,
        num_blocks=128,
        changes={**SHAPES[shape], "num_hidden_layers": LAYERS, "vocab_size": 4096},
        drawn_in=drawn_in,
        kernels=kernels,
        block_size=64,
        max_batch_tokens=2304,
    )
    engine.poison_free_blocks()
    chance, found = random.Random(1), []
    for batch in BATCHES:
        tokens = [chance.choices(range(3, 4000), k=count) for _, count in batch]
        found.append(engine.put([uid for uid, _ in batch], token_tensors(tokens)).float().cpu())
    del engine
    torch.cuda.empty_cache()
    return torch.cat(found)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_ours_are_as_near_to_the_truth_as_torchs(shape, dtype):
    pytest.importorskip("triton", reason="Triton is not installed")
    truth, torchs, ours = (
        logits_of(shape, kind, kernels, dtype)
        for kind, kernels in (("float32", "torch"), (dtype, "torch"), (dtype, "portable"))
    )
    assert torch.isfinite(ours).all()
    theirs_off, ours_off = (torchs - truth).abs().max(), (ours - truth).abs().max()
    apart = (ours - torchs).abs().max()
    print(f"torch's {theirs_off:.4g} off, ours {ours_off:.4g}, apart {apart:.4g}")
    assert ours_off <= ALLOWED * theirs_off and apart <= ALLOWED * theirs_off


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(32, 32, 128), (32, 8, 128), (16, 16, 256), (0, 32, 128), (0, 8, 128)])
def test_rotating_and_scattering(device, heads, dtype):
    """Triton's and the CUDA one against torch, to the last bit but one of K; V to the bit; nothing else is touched."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from mii_hcache.engine.kernels.rope_scatter import make_tables, rope_scatter
    from mii_hcache.engine.modules.rope import rotary_tables, rotate

    num_heads, kv_heads, head_size = heads
    num_tokens, num_slots = 2048, 8192
    inv_freq = (1.0 / 1e4 ** (torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)).to(device)
    positions = torch.randint(0, 32768, (num_tokens,), device=device)
    slots = torch.randperm(num_slots, device=device)[:num_tokens]
    rows = torch.randn(num_tokens, num_heads + 2 * kv_heads, head_size, device=device).to(dtype)
    q, k, v = rows.split([num_heads, kv_heads, kv_heads], dim=1)
    cos, sin = rotary_tables(positions, inv_freq)
    wanted_q, wanted_k = rotate(q, cos, sin), rotate(k, cos, sin)
    tables = make_tables(inv_freq, 32768)
    for name, kernel in _kernels(device, rope_scatter).items():
        cache = torch.full((num_slots // 64, 64, 2, kv_heads, head_size), float("nan"), dtype=dtype, device=device)
        given = rows.clone()
        kernel(given.flatten(1), cache, positions, slots, tables, query_heads=num_heads)
        written = cache.view(num_slots, 2, kv_heads, head_size)
        tolerance = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(written[slots, 0], wanted_k, atol=tolerance, rtol=tolerance, msg=name)
        torch.testing.assert_close(given[:, :num_heads], wanted_q, atol=tolerance, rtol=tolerance, msg=name)
        assert torch.equal(written[slots, 1], v), name
        untouched = torch.ones(num_slots, dtype=torch.bool, device=device)
        untouched[slots] = False
        assert torch.isnan(written[untouched]).all(), name


def _kernels(device, triton_one):
    """By name; the CUDA one where it was built, else the reason is printed."""
    from mii_hcache.storage import native

    found = {"triton": triton_one}
    why_not = native.why_no_kernels()
    if why_not is None:
        from mii_hcache.engine.kernels.cuda_rope_scatter import CudaRopeScatter

        found["cuda"] = CudaRopeScatter(device)
    else:
        print(f"the CUDA kernel is left out: {why_not}")
    return found
