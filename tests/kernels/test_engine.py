"""Tiny models through the real engine on our Triton kernels: tokens are transformers', restored or not."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (pip install 'mii-hcache[test]')")

from mii_hcache.engine import modules
from mii_hcache.engine.kernels import work
from mii_hcache.engine.modules import triton_modules
from mii_hcache.engine.ragged_engine import HCacheEngine, token_tensors
from mii_hcache.errors import ConfigError
from tests.engine_kit import (
    VOCAB,
    Client,
    Conversation,
    greedy,
    open_client,
    poisoned_engine,
    restorable,
    save_tiny_model,
    tiny_hf_model,
)

SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24}
MODELS = {
    "llama-gqa": SMALL,
    "qwen3": SMALL | {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1},
    "opt": {"num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 128},
}
"""Grouped queries; norms on heads, and layers with and without a window; LayerNorm, biases, no rotary embedding."""


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("small")

    def path_of(name: str) -> Path:
        if not (root / name).exists():
            save_tiny_model(name, root / name, **MODELS[name])
        return root / name

    return path_of


@pytest.fixture(autouse=True)
def splits_everything(monkeypatch):
    """Histories of these tests are short: they are split all the same."""
    monkeypatch.setattr(work, "MIN_NARROW_KEYS", 32)
    monkeypatch.setattr(work, "MIN_WIDE_KEYS", 32)
    monkeypatch.setattr(triton_modules, "INTERPRETED_PROGRAMS", 1000)


def _engine(path: Path, **settings: object) -> HCacheEngine:
    engine = poisoned_engine(path, **{"kernels": "triton", "max_batch_tokens": 96, "num_blocks": 40, **settings})
    assert engine.kernels == "triton" or "kernels" in settings
    return engine


def _prompt(num_tokens: int) -> list[int]:
    return random.Random(num_tokens).choices(range(3, VOCAB), k=num_tokens)


@pytest.mark.parametrize("family", MODELS)
def test_greedy_tokens_are_those_of_transformers(small_model, family):
    engine, reference = _engine(small_model(family)), tiny_hf_model(family, **MODELS[family])
    for uid, num_prompt in enumerate((1, 130)):
        prompt = _prompt(num_prompt)
        tokens, logits = greedy(engine, uid, prompt, 3, chunk=96)
        with torch.no_grad():
            expected = reference(torch.tensor([prompt + tokens])).logits[0, num_prompt - 1 : -1]
        assert tokens == expected.argmax(-1).tolist()
        torch.testing.assert_close(logits, expected, atol=2e-3, rtol=1e-4)
        engine.evict(uid)


def test_a_ragged_batch_is_each_sequence_alone(small_model):
    engine = _engine(small_model("qwen3"), block_size=64)
    assert engine.block_size == 64
    prompts = [_prompt(60), _prompt(5), _prompt(1)]
    engine.put([1], token_tensors([prompts[0]]))
    together = engine.put([1, 2, 3], token_tensors([[7], *prompts[1:]]))
    plain = _engine(small_model("qwen3"), kernels="torch")
    for row, prompt in enumerate([[*prompts[0], 7], *prompts[1:]]):
        alone = plain.put([row], token_tensors([prompt]))
        torch.testing.assert_close(together[row], alone[0], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen3", "opt"])
def test_restored_contexts_go_on_as_if_they_had_stayed(small_model, family):
    stayed = _two_turns(open_client(_engine(small_model(family)), keep="lru"))
    assert stayed.turns[1].report.resident_tokens > 64
    for method in ("hidden", "kv"):
        evicted = _two_turns(open_client(_engine(small_model(family)), method=method, keep="none"))
        assert [turn.token_ids for turn in evicted.turns] == [turn.token_ids for turn in stayed.turns]
        assert evicted.turns[1].report.restored_tokens == restorable(evicted.turns[0]) == 64


def _two_turns(client: Client) -> Conversation:
    conversation = Conversation(seed=1)
    for num_new in (70, 9):
        prompt = conversation.next_prompt(num_new)
        conversation.take(prompt, client.ask(prompt, 3))
    client.service.close()
    return conversation


def test_computed_and_restored_rows_are_the_same(small_model):
    """`fill`, a prefill that stops early, ends in the kernel that restores."""
    engine = _engine(small_model("qwen3"))
    prompt = _prompt(40)
    engine.put([1], token_tensors([prompt]))
    engine.reserve(2, 40)
    engine.target(2).fill(0, torch.tensor(prompt), 2)
    geometry = engine.geometry
    for layer_idx in range(2):
        rows = torch.empty(2, 40, 2, geometry.num_kv_heads, geometry.head_size)
        for uid in (1, 2):
            engine.target(uid).read_kv(layer_idx, 0, rows[uid - 1])
        torch.testing.assert_close(rows[0], rows[1], atol=1e-5, rtol=1e-5)


def test_warming_up_leaves_nothing_behind(small_model):
    engine = _engine(small_model("llama-gqa"))
    asked = []
    attn = engine.model().attn
    attn.rope_scatter = lambda *arguments, query_heads, **more: asked.append(query_heads)
    engine.warm_up()
    assert 0 in asked and max(asked) > 0, "a step's rows and restored ones are compiled by themselves"
    assert (engine.num_free_blocks, engine.num_tracked) == (engine.num_blocks, 0)


def test_without_the_interpreter_a_cpu_is_refused(monkeypatch):
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ConfigError, match="TRITON_INTERPRET=1"):
        modules.register("triton", "cpu", block_size=16)
