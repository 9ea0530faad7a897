"""The CUDA kernel's front against the torch modules. The fake driver runs the kernel's arithmetic on the CPU, over
tensors of the CPU, as a GPU that reaches the host's memory would."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from contextlib import closing

import pytest
import torch

from mii_hcache.engine.kernels.cuda_rope_scatter import CudaRopeScatter
from mii_hcache.engine.modules.norm import rms_norm
from mii_hcache.engine.modules.rope import rotary_tables, rotate

CPU = torch.device("cpu")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
POSITIONS = torch.tensor([0, 1, 63, 4_095, 32_767, 5, 39_999])
SLOTS = torch.tensor([3, 64, 1, 0, 127, 40, 41])
NUM_POSITIONS = 40_000


@pytest.fixture
def place(fakes, gpu, monkeypatch):
    fakes.cuda["sees_host"] = 1
    with closing(CudaRopeScatter(CPU)) as place:
        monkeypatch.setattr(place, "_stream", lambda: gpu.stream)
        yield place


def frequencies(rotary_dim: int) -> torch.Tensor:
    return 1.0 / (1e4 ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim))


def tables_of(inv_freq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = rotary_tables(torch.arange(NUM_POSITIONS), inv_freq)
    return cos[:, 0, : inv_freq.numel()].contiguous(), sin[:, 0, : inv_freq.numel()].contiguous()


def inputs(num_heads: int, kv_heads: int, head_size: int, dtype: torch.dtype, padding: int = 0):
    """Rows, some elements apart, and a cache of 2 blocks of 64."""
    generator = torch.Generator().manual_seed(head_size)
    row_elements = (num_heads + 2 * kv_heads) * head_size
    rows = torch.randn(len(SLOTS), row_elements + padding, generator=generator).to(dtype)[:, :row_elements]
    cache = torch.randn(2, 64, 2, kv_heads, head_size, generator=generator).to(dtype)
    return rows, cache


def expected(rows, cache, cos, sin, num_heads, q_gamma=None, k_gamma=None, eps=0.0):
    """Rows and cache as the torch modules would leave them."""
    kv_heads, head_size = cache.shape[-2:]
    q, k, v = rows.unflatten(-1, (-1, head_size)).split([num_heads, kv_heads, kv_heads], dim=1)
    if q_gamma is not None:
        q = rms_norm(q, q_gamma, eps)
    if k_gamma is not None:
        k = rms_norm(k, k_gamma, eps)
    after = cache.clone()
    after.view(-1, 2, kv_heads, head_size)[SLOTS] = torch.stack([rotate(k, cos, sin), v], dim=1)
    return torch.cat([rotate(q, cos, sin).flatten(1), rows[:, num_heads * head_size :]], dim=1), after


SHAPES = [(2, 2, 64, 64), (4, 1, 80, 80), (2, 1, 80, 32), (6, 2, 96, 96), (2, 1, 128, 128), (1, 1, 256, 256)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_heads", "kv_heads", "head_size", "rotary_dim"), [*SHAPES, (3, 1, 64, 20), (0, 2, 64, 64)]
)
@pytest.mark.parametrize("padding", [0, 16, 3])
def test_by_tables_it_is_torch_to_the_bit(place, num_heads, kv_heads, head_size, rotary_dim, dtype, padding):
    rows, cache = inputs(num_heads, kv_heads, head_size, dtype, padding)
    inv_freq = frequencies(rotary_dim)
    want_rows, want_cache = expected(rows, cache, *rotary_tables(POSITIONS, inv_freq), num_heads)
    place(rows, cache, POSITIONS, SLOTS, tables_of(inv_freq), query_heads=num_heads)
    assert torch.equal(rows, want_rows) and torch.equal(cache, want_cache)


@pytest.mark.parametrize("dtype", DTYPES)
def test_by_frequencies_too_where_sine_and_cosine_are_libms(place, dtype):
    rows, cache = inputs(2, 1, 128, dtype)
    inv_freq = frequencies(128)
    positions = torch.tensor([0, 1, 63, 4_095, 131_071, 5, 1_048_575])
    angles = positions.to(torch.float32)[:, None] * inv_freq[None]
    libm = ctypes.CDLL("libm.so.6")
    by_libm = []
    for name in ("cosf", "sinf"):
        function = getattr(libm, name)
        function.restype, function.argtypes = ctypes.c_float, [ctypes.c_float]
        half = torch.tensor([function(angle) for angle in angles.flatten().tolist()]).view_as(angles)
        by_libm.append(torch.cat([half, half], dim=-1)[:, None])
    want_rows, want_cache = expected(rows, cache, *by_libm, 2)
    by_torch = expected(rows, cache, *rotary_tables(positions, inv_freq), 2)
    place(rows, cache, positions, SLOTS, inv_freq, query_heads=2)
    assert torch.equal(rows, want_rows) and torch.equal(cache, want_cache)
    largest = max(rows.abs().max().item(), 1.0)
    for got, want in zip((rows, cache), by_torch, strict=True):  # whose sine and cosine may be one last place away
        assert (got - want).abs().max().item() <= 2 * torch.finfo(dtype).eps * largest


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "kv_heads", "head_size", "rotary_dim"), [(0, 2, 128, 128), *SHAPES])
def test_heads_are_normed_as_torch_norms_them(place, num_heads, kv_heads, head_size, rotary_dim, dtype):
    rows, cache = inputs(num_heads, kv_heads, head_size, dtype)
    q_gamma, k_gamma = (1 + 0.2 * torch.randn(2, head_size)).to(dtype)
    q_gamma = q_gamma if num_heads else None
    inv_freq = frequencies(rotary_dim)
    wanted = expected(rows, cache, *rotary_tables(POSITIONS, inv_freq), num_heads, q_gamma, k_gamma, 1e-6)
    place(
        *(rows, cache, POSITIONS, SLOTS, tables_of(inv_freq)),
        query_heads=num_heads,
        q_gamma=q_gamma,
        k_gamma=k_gamma,
        eps=1e-6,
    )
    for got, want in zip((rows, cache), wanted, strict=True):  # a sum in another order moves what is rounded after it
        error, largest = (got.double() - want.double()).abs(), want.abs().max().item()
        assert error.max().item() <= 4 * torch.finfo(dtype).eps * largest
        if dtype != torch.float32:
            assert (error > 0).double().mean().item() < 0.02
    kv_rows = slice((num_heads + kv_heads) * head_size, None)
    values = rows[:, kv_rows].unflatten(1, (kv_heads, head_size))
    assert torch.equal(cache.view(-1, 2, kv_heads, head_size)[SLOTS, 1], values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_angles_nothing_turns(place, dtype):
    rows, cache = inputs(2, 2, 40, dtype)
    want = cache.clone()
    want.view(-1, 2, 2, 40)[SLOTS] = rows.unflatten(1, (-1, 40))[:, 2:].unflatten(1, (2, 2))
    before = rows.clone()
    place(rows, cache, POSITIONS, SLOTS, None, query_heads=2)
    assert torch.equal(rows, before) and torch.equal(cache, want)


def test_it_is_launched_on_the_callers_stream_and_waits_for_nothing(fakes, gpu, place):
    fakes.cuda["delayed"] = 1
    rows, cache = inputs(0, 2, 64, torch.float16)
    before, launches = cache.clone(), fakes.cuda["launches"]
    place(rows, cache, POSITIONS, SLOTS, frequencies(64), query_heads=0)
    place(rows[:0], cache, POSITIONS[:0], SLOTS[:0], frequencies(64), query_heads=0)
    assert fakes.cuda["launches"] == launches + 1 and torch.equal(cache, before)
    assert gpu.run() == 1
    assert not torch.equal(cache, before)


def test_what_does_not_fit_is_refused(fakes, place):
    rows, cache = inputs(2, 2, 64, torch.float16)
    inv_freq, gamma, launches = frequencies(64), torch.ones(64, dtype=torch.float16), fakes.cuda["launches"]
    sound = {"rows": rows, "kv_cache": cache, "positions": POSITIONS, "slots": SLOTS, "tables": inv_freq}

    def refused(match: str, query_heads: int = 2, **changes) -> None:
        with pytest.raises(ValueError, match=match):
            place(**{**sound, **changes}, query_heads=query_heads)

    refused("do not fit", rows=rows[:, 1:])
    refused("do not fit", query_heads=1)
    refused("do not fit", kv_cache=cache.float())
    refused("do not fit", rows=rows.t().contiguous().t())
    refused("no cache", rows=rows.double(), kv_cache=cache.double())
    refused("no cache", kv_cache=cache.transpose(0, 1))
    refused("no cache", kv_cache=cache.flatten(0, 1))
    refused("positions", positions=POSITIONS.int())
    refused("slots", slots=SLOTS[1:])
    refused("or in neither", k_gamma=gamma)
    refused("or in neither", q_gamma=gamma)
    refused("gamma", q_gamma=gamma, k_gamma=gamma.float())
    refused("gamma", q_gamma=gamma, k_gamma=gamma[1:])
    refused("angles are float32", tables=inv_freq.half())
    refused("angles are float32", tables=inv_freq[None])
    refused("cosines", tables=(torch.ones(9, 32), torch.ones(8, 32)))
    refused("beyond the head", tables=frequencies(128))
    refused("not everything is on cpu", slots=torch.empty(7, dtype=torch.int64, device="meta"))
    assert fakes.cuda["launches"] == launches


def test_an_engine_computes_and_restores_with_it(fakes, gpu, monkeypatch, tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed (pip install 'mii-hcache[test]')")
    from mii_hcache.engine.modules import cuda_modules
    from mii_hcache.engine.ragged_engine import token_tensors
    from tests.engine_kit import poisoned_engine, save_tiny_model

    fakes.cuda["sees_host"] = 1
    monkeypatch.setattr(CudaRopeScatter, "_stream", lambda self: gpu.stream)
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    save_tiny_model("qwen3", tmp_path, **sizes, head_dim=24)
    prompt, rows = list(range(3, 43)), {}
    launches = fakes.cuda["launches"]
    for kernels in ("torch", "cuda"):
        engine = poisoned_engine(tmp_path, kernels=kernels, max_batch_tokens=96, num_blocks=20)
        assert engine.kernels == kernels
        logits = engine.put([1], token_tensors([prompt]))
        engine.reserve(2, len(prompt))
        engine.target(2).fill(0, torch.tensor(prompt), 2)  # ends in the way that restored rows take
        geometry = engine.geometry
        kv = torch.empty(2, 2, len(prompt), 2, geometry.num_kv_heads, geometry.head_size)
        for uid in (1, 2):
            for layer_idx in range(2):
                engine.target(uid).read_kv(layer_idx, 0, kv[uid - 1, layer_idx])
        rows[kernels] = logits, kv
    assert fakes.cuda["launches"] >= launches + 4
    for got, want in zip(rows["cuda"], rows["torch"], strict=True):
        torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(rows["cuda"][1][0], rows["cuda"][1][1], atol=1e-5, rtol=1e-5)
    cuda_modules.scatter_on.cache_clear()


def test_an_engine_without_the_kernels_is_refused(loaded):
    pytest.importorskip("triton", reason="Triton is not installed (pip install 'mii-hcache[test]')")
    from mii_hcache.engine import modules
    from mii_hcache.errors import ConfigError

    with pytest.raises(ConfigError, match="kernels is 'cuda': there is no GPU"):
        modules.register("cuda", "cpu", block_size=16)


MISUSE = """
import sys, torch
from pathlib import Path
from tests.native.gpu_kit import FakeGpu, load_fakes
from mii_hcache.storage import native
native._KERNELS = Path(sys.argv[1])
fakes = load_fakes(native._KERNELS)
fakes.cuda["gpus"] = fakes.cuda["sees_host"] = 1
from mii_hcache.engine.kernels.cuda_rope_scatter import CudaRopeScatter
place = CudaRopeScatter(torch.device("cpu"))
place._stream = lambda: 0
place(
    torch.ones(2, 128), torch.ones(1, 4, 2, 1, 64), torch.tensor([0, {position}]), torch.tensor([1, {slot}]),
    (torch.ones(8, 32), torch.ones(8, 32)), query_heads=0,
)
print("survived")
"""


@pytest.mark.parametrize(("position", "slot"), [(7, 3), (7, 4), (7, -1), (8, 3), (-1, 3)])
def test_what_would_overwrite_anothers_tokens_ends_the_program(loaded, tmp_path, position, slot):
    program = MISUSE.format(position=position, slot=slot)
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "_gpu.fatbin")], capture_output=True, text=True, timeout=100
    )
    if (position, slot) == (7, 3):
        assert done.stdout == "survived\n", done.stderr
    else:
        assert done.returncode < 0 and "a slot outside the cache, or a position outside the tables" in done.stderr
