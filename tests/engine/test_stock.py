"""DeepSpeed's kernels behind our modules, by stand-ins for its extensions: tiny models through the real engine.

No GPU has run this. The stand-ins (tests/stock_kernels.py) check what the C++ checks, and more.
"""

from __future__ import annotations

import random
from importlib.util import find_spec

import pytest
import torch

from mii_hcache.core.cost import LayerCost
from mii_hcache.engine.modules import stock_limits
from mii_hcache.engine.ragged_engine import HCacheEngine, build_engine, token_tensors
from mii_hcache.errors import ConfigError, HCacheError, UnsupportedModelError
from tests import stock_kernels
from tests.engine_kit import (
    VOCAB,
    ToldTap,
    answers,
    greedy,
    interleave,
    open_client,
    poisoned_engine,
    save_tiny_model,
)

_WIDE = {"hidden_size": 256, "num_attention_heads": 4}
_SIX_HEADS = {"hidden_size": 192, "num_attention_heads": 6}
COST = LayerCost(io_hidden_s=2e-5, io_kv_s=4e-5, c_hidden_s=5e-6, c_kv_s=1e-7, c_token_s=3e-5)
"""Reads are dear: the first tokens are computed while the others are read."""
MODELS = {
    "llama": {"num_key_value_heads": 4},
    "llama-gqa": {"num_key_value_heads": 2, "head_dim": 128},
    "llama-tied": {"num_key_value_heads": 1, "head_dim": 80},
    "llama3-rope": {"num_key_value_heads": 2, "head_dim": 96},
    "mixtral": {"num_key_value_heads": 2, "head_dim": 64},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 64},
    "gemma": {"num_key_value_heads": 4, "head_dim": 64},
    "opt": {"word_embed_proj_dim": 256},
}
"""The tiny models in shapes that the kernels take."""


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory):
    root = tmp_path_factory.mktemp("wide")

    def path_of(name: str):
        path = root / name
        if not path.exists():
            save_tiny_model(name, path, **_WIDE, **MODELS[name])
        return path

    return path_of


@pytest.fixture
def calls(monkeypatch):
    return stock_kernels.install(monkeypatch)


def _engine(path, dtype: str = "float16", kernels: str = "stock", **kwargs) -> HCacheEngine:
    return poisoned_engine(path, dtype=dtype, kernels=kernels, num_blocks=40, max_batch_tokens=300, **kwargs)


def _prompt(num_tokens: int, seed: int = 1) -> list[int]:
    return random.Random(seed).choices(range(3, VOCAB), k=num_tokens)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_portable_modules(wide_model, calls, name):
    """Two prompts in pieces and steps of both, over several blocks, against our modules and against float32."""
    prompts, steps = [_prompt(270, 1), _prompt(141, 2)], _prompt(6, 3)
    rows = {}
    for kernels, dtype in (("stock", "float16"), ("portable", "float16"), ("portable", "float32")):
        engine = _engine(wide_model(name), dtype=dtype, kernels=kernels)
        out = [engine.put([1], token_tensors([prompts[0][:130]]))]
        out.append(engine.put([1, 2], token_tensors([prompts[0][130:], prompts[1]])))
        out += [engine.put([1, 2], token_tensors([[token], [token + 1]])) for token in steps]
        rows[kernels, dtype] = torch.cat(out).float()
    scale = rows["portable", "float32"].abs().max()
    own_noise = (rows["portable", "float16"] - rows["portable", "float32"]).abs().max()
    difference = (rows["stock", "float16"] - rows["portable", "float32"]).abs().max()
    assert difference <= max(3 * own_noise, 0.004 * scale), (difference, own_noise, scale)
    if name != "mixtral":
        assert calls["gated_activation"] + calls["bias_activation"] > 0
    assert calls["flash_attn_by_atoms"] == 4 * (2 + len(steps))


@pytest.mark.parametrize("name", ["llama-gqa", "qwen3", "opt"])
def test_conversations_that_are_evicted_say_what_those_that_stay_say(wide_model, calls, name):
    """Three at a time; by hidden states, by K and V, and by a plan that computes the first tokens again."""
    said = {}
    for method, keep in (("recompute", "lru"), ("hidden", "none"), ("kv", "none"), ("cake", "none")):
        engine = _engine(wide_model(name), dtype="bfloat16")
        client = open_client(engine, method=method, keep=keep, kernels="stock", costs={"memory": COST})
        try:
            conversations = interleave(client, 3, 3)
        finally:
            client.service.close()
        said[method] = answers(conversations)
        reports = [turn.report for one in conversations for turn in one.turns]
        assert (sum(report.restored_tokens for report in reports) > 0) == (method != "recompute")
        assert (sum(report.recomputed_tokens for report in reports) > 0) == (method == "cake")
    assert said["hidden"] == said["kv"] == said["cake"] == said["recompute"]


@pytest.mark.parametrize("name", ["llama-gqa", "llama-tied", "llama3-rope", "qwen3"])
def test_restored_k_has_the_bits_of_served_k(wide_model, calls, name):
    """The same projected rows, once through a forward's kernel and once through a restore's, at any positions."""
    engine = _engine(wide_model(name))
    model, attn = engine.model(), engine.model().attn
    config = attn._config
    num_q, num_kv, size = config.n_heads_q, config.n_heads_kv, config.head_size
    tokens = _prompt(200)
    engine.put([1], token_tensors([tokens[:70]]))
    seen: list[torch.Tensor] = []
    project = model.project_qkv
    model.project_qkv = lambda layer, hidden: seen.append(project(layer, hidden)) or seen[-1].clone()
    engine.put([1], token_tensors([tokens[70:]]))
    kv = seen[0][:, num_q * size :].reshape(130, 2, num_kv, size)
    served = torch.empty(130, 2, num_kv, size, dtype=engine.dtype)
    engine.target(1).read_kv(0, 70, served)
    assert not torch.equal(served[:, 0], kv[:, 0])

    engine.reserve(2, 200)
    order = torch.randperm(130, generator=torch.Generator().manual_seed(0))
    target = engine.target(2)
    positions, slots = target._slots(70, 130)
    attn.place(kv[order].contiguous(), engine.kv_cache(0), positions[order], slots[order], model.inv_freq)
    restored = torch.empty_like(served)
    target.read_kv(0, 70, restored)
    assert torch.equal(restored, served)


def test_a_restore_between_two_layers_leaves_a_forward_alone(wide_model, calls):
    """No buffer is shared: what a restore computes while a forward runs changes nothing in it."""
    prompt = _prompt(150)
    engine = _engine(wide_model("llama"))
    alone = engine.put([1], token_tensors([prompt])).clone()
    engine.evict(1)
    engine.reserve(9, 64)
    target = engine.target(9)
    hidden = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).to(engine.dtype)

    def restore(layer_idx: int, _: torch.Tensor) -> None:
        target.project_hidden(layer_idx, 0, hidden)
        engine.model().first_hidden(torch.tensor(prompt[:64]), torch.arange(64))

    engine.model().qkv_input_tap = ToldTap(restore)
    assert torch.equal(engine.put([1], token_tensors([prompt])), alone)


def test_long_prompts_have_more_atoms_than_sequences(wide_model, calls):
    """The host's own module has room for one atom a sequence."""
    engine = build_engine(
        str(wide_model("llama")), dtype="float16", kernels="stock", num_blocks=20, max_batch_tokens=700, max_sequences=1
    )
    logits = engine.put([1], token_tensors([_prompt(700)]))
    assert engine.model().attn.plan.extra[0].shape == (6, 8)
    assert bool(logits.isfinite().all())


def test_the_models_epsilon_is_that_of_every_norm(wide_model, calls):
    """Rows so small that the epsilon decides."""
    engine = _engine(wide_model("llama"))
    model = engine.model()
    rows = 2e-3 * torch.randn(3, 256, generator=torch.Generator().manual_seed(0)).to(engine.dtype)
    gamma = model.layers[0].attn_norm_gamma
    expected = torch.nn.functional.rms_norm(rows.float(), (256,), gamma.float(), 1e-6)
    added, normed = model.norm(rows.clone(), torch.zeros_like(rows), gamma)
    for found in (normed, model.norm.normalize(rows, gamma, None), model.norm(rows, None, gamma)[1]):
        assert torch.allclose(found.float(), expected, rtol=0.01, atol=0.01)
    logits = torch.nn.functional.linear(
        torch.nn.functional.rms_norm(rows.float(), (256,), model.final_norm_gamma.float(), 1e-6),
        model.word_unembed.float(),
    )
    assert torch.equal(added, rows)
    assert torch.allclose(model.logits_of(rows, torch.arange(3)).float(), logits, rtol=0.01, atol=0.05)


def test_greedy_tokens_of_opt_are_those_of_the_portable_modules(wide_model, calls):
    """No rotary embedding, so nothing but rounding differs; the prompt is one where no two tokens are nearly equal."""
    tokens = {}
    for kernels in ("stock", "portable"):
        tokens[kernels], rows = greedy(_engine(wide_model("opt"), kernels=kernels), 1, _prompt(90, 5), 24, 64)
    best = rows.topk(2, dim=-1).values
    assert float((best[:, 0] - best[:, 1]).min()) > 0.01
    assert tokens["stock"] == tokens["portable"]


def test_attention_refuses_what_the_kernel_has_not(wide_model, calls):
    engine = _engine(wide_model("llama"))
    engine.put([1], token_tensors([_prompt(20)]))
    attn, model = engine.model().attn, engine.model()
    qkv = torch.zeros(20, 3 * 256, dtype=engine.dtype)
    arguments = (qkv, engine.kv_cache(0), engine._batch, model.inv_freq, 0.125)
    with pytest.raises(HCacheError, match="softcap"):
        attn(*arguments, softcap=30.0)
    with pytest.raises(HCacheError, match="end of their sequence"):
        attn(*arguments, query_positions=torch.arange(20))
    with pytest.raises(HCacheError, match="window"):
        attn(*arguments, window=19)
    attn(*arguments, window=20)


@pytest.mark.parametrize(
    ("name", "changes", "dtype", "words"),
    [
        ("llama", {}, "float32", "float16 and bfloat16, not in float32"),
        ("llama", {"head_dim": 32}, "float16", "this model's have 32"),
        ("gemma", {"head_dim": 256}, "float16", "this model's have 256"),
        ("llama", {**_SIX_HEADS, "num_key_value_heads": 2, "head_dim": 64}, "float16", "6 to 2"),
        ("llama", {"num_key_value_heads": 4, "hidden_size": 128, "head_dim": 64}, "float16", "not 128"),
        ("llama", {"num_key_value_heads": 4, "intermediate_size": 258}, "float16", "this model has 258"),
        ("mistral-window", {"head_dim": 64}, "float16", "this model's is 40 tokens"),
    ],
)
def test_a_model_that_the_kernels_cannot_compute_is_refused_with_the_reason(
    tmp_path, calls, name, changes, dtype, words
):
    save_tiny_model(name, tmp_path, **{**_WIDE, "num_hidden_layers": 1, "vocab_size": 64, **changes})
    with pytest.raises(UnsupportedModelError, match=words) as refused:
        build_engine(str(tmp_path), dtype=dtype, kernels="stock", num_blocks=4)
    assert "kernels='portable'" in str(refused.value)


def test_a_window_that_no_context_reaches_is_no_window(tmp_path, calls):
    save_tiny_model("mistral-window", tmp_path, **_WIDE, head_dim=64)
    engine = build_engine(str(tmp_path), dtype="float16", kernels="stock", num_blocks=4, max_context_tokens=40)
    portable = build_engine(str(tmp_path), dtype="float32", num_blocks=9, max_context_tokens=40)
    rows = [one.put([1], token_tensors([_prompt(40)])).float() for one in (engine, portable)]
    assert (rows[0] - rows[1]).abs().max() < 0.02 * rows[1].abs().max()


def test_a_pool_beyond_32_bits_is_refused(wide_model, calls):
    with pytest.raises(ConfigError, match="at most 32767 are found"):
        build_engine(str(wide_model("llama")), dtype="float16", kernels="stock", num_blocks=32768)


def test_this_machine_says_why_it_cannot():
    if torch.version.cuda is not None:
        pytest.skip(f"torch {torch.__version__} is built for CUDA; what is missing there depends on the machine")
    with pytest.raises(ConfigError, match=r"stock.*built without CUDA; install a CUDA build.*portable"):
        build_engine("nowhere", kernels="stock")


def test_the_stand_ins_are_what_the_extensions_bind():
    types = stock_kernels.signatures()
    for function in (*stock_kernels.CORE, *stock_kernels.RAGGED):
        assert function.__name__ in types
    assert len(types["kv_trained_rotary_embeddings"]) == 9
    with pytest.raises(RuntimeError, match="4 arguments are bound, 3"):
        stock_kernels.check_arguments(types["rms_norm"], (torch.empty(1), torch.empty(1), torch.empty(1)))
    with pytest.raises(RuntimeError, match="float was expected"):
        stock_kernels.check_arguments(types["rms_norm"], tuple(torch.empty(1) for _ in range(4)))


class _Machine:
    """A machine by what is there."""

    def __init__(self, monkeypatch, tmp_path) -> None:
        from deepspeed.ops.op_builder import builder

        self.patch, self.builder = monkeypatch, builder
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr("torch.utils.cpp_extension.is_ninja_available", lambda: True)
        self.gpu(8, 0)
        self.nvcc(12, 8)
        package = tmp_path / "dskernels"
        package.mkdir()
        (package / "__init__.py").touch()
        self.library = package / "libblockedflash.so"
        self.library.touch()
        monkeypatch.syspath_prepend(str(tmp_path))

    def gpu(self, major: int, minor: int) -> None:
        self.patch.setattr(torch.cuda, "get_device_capability", lambda *_: (major, minor))

    def nvcc(self, major: int, minor: int) -> None:
        self.patch.setattr(self.builder, "installed_cuda_version", lambda *_: (major, minor))

    def no_nvcc(self) -> None:
        def missing(*_):
            raise self.builder.MissingCUDAException("CUDA_HOME does not exist")

        self.patch.setattr(self.builder, "installed_cuda_version", missing)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    return _Machine(monkeypatch, tmp_path)


def test_a_machine_that_has_all_can(machine, monkeypatch):
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0)):
        machine.gpu(*capability)
        assert stock_limits.why_not_stock() is None
    machine.nvcc(12, 4)  # of the same major version
    assert stock_limits.why_not_stock() is None
    machine.nvcc(13, 0)
    monkeypatch.setenv("DS_SKIP_CUDA_CHECK", "1")
    assert stock_limits.why_not_stock() is None


@pytest.mark.parametrize("capability", [(7, 5), (10, 0), (12, 0)])
def test_gpus_without_the_attention_kernel_are_named(machine, capability):
    machine.gpu(*capability)
    assert f"{capability[0]}.{capability[1]}" in str(stock_limits.why_not_stock())


def test_what_is_missing_is_named_with_its_remedy(machine, monkeypatch):
    machine.nvcc(13, 0)
    assert "toolkit 12.8" in str(stock_limits.why_not_stock())
    machine.no_nvcc()
    assert "there is no nvcc" in str(stock_limits.why_not_stock())
    from deepspeed import git_version_info

    built = {"ragged_device_ops": True, "inference_core_ops": True}
    monkeypatch.setattr(git_version_info, "installed_ops", built)
    assert stock_limits.why_not_stock() is None, "kernels that are built already need no compiler"
    machine.library.unlink()
    assert "libblockedflash.so" in str(stock_limits.why_not_stock())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA GPU" in str(stock_limits.why_not_stock())


def test_ninja_is_asked_for(machine, monkeypatch):
    monkeypatch.setattr("torch.utils.cpp_extension.is_ninja_available", lambda: False)
    assert "pip install ninja" in str(stock_limits.why_not_stock())


@pytest.mark.skipif(find_spec("triton") is None, reason="without Triton the doctor speaks of that")
def test_the_doctor_says_whether_they_could_run(machine):
    from mii_hcache.tools.software_checks import software_checks

    check = dict(software_checks(None))["kernels"]
    assert "stock) could run here" in str(check())
    machine.gpu(10, 0)
    assert "stock) cannot run here" in str(check()) and "this one has 10.0" in str(check())
