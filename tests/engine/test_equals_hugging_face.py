"""Greedy tokens in float32 equal Hugging Face transformers': the engine itself is right."""

from __future__ import annotations

import random

import pytest
import torch

from mii_hcache.engine.modules.norm import PreRMSNorm
from tests.engine_kit import ALL_MODELS, VOCAB, greedy, poisoned_engine, tiny_hf_model

MAX_BATCH = 96


def _reference(model, prompt: list[int], num_tokens: int) -> tuple[list[int], torch.Tensor]:
    tokens, rows = list(prompt), []
    with torch.no_grad():
        for _ in range(num_tokens):
            rows.append(model(torch.tensor([tokens])).logits[0, -1])
            tokens.append(int(rows[-1].argmax()))
    return tokens[len(prompt) :], torch.stack(rows)


@pytest.mark.parametrize("family", ALL_MODELS)
def test_greedy_tokens_and_logits(tiny_model, family):
    engine = poisoned_engine(tiny_model(family), num_blocks=64, max_batch_tokens=MAX_BATCH)
    reference = tiny_hf_model(family)
    # Shorter and longer than a block (16), a span (64) and a ragged batch (96), and right at their edges.
    for uid, num_prompt in enumerate((1, 15, 16, 17, 63, 64, 65, 96, 97, 300)):
        prompt = random.Random(num_prompt).choices(range(3, VOCAB), k=num_prompt)
        tokens, logits = greedy(engine, uid, prompt, 8, chunk=MAX_BATCH)
        expected, expected_logits = _reference(reference, prompt, 8)
        assert tokens == expected, f"prompt of {num_prompt}"
        torch.testing.assert_close(logits, expected_logits, atol=2e-3, rtol=1e-4)
        engine.evict(uid)
    assert engine.num_free_blocks == 64


@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
def test_a_ragged_batch_is_each_sequence_alone(tiny_model, family):
    engine = poisoned_engine(tiny_model(family), num_blocks=128, max_batch_tokens=256)
    prompts = [random.Random(seed).choices(range(3, VOCAB), k=length) for seed, length in enumerate((5, 64, 100))]
    from mii_hcache.engine.ragged_engine import token_tensors

    together = engine.put([1, 2, 3], token_tensors(prompts))
    for uid, prompt in enumerate(prompts, start=11):
        alone = engine.put([uid], token_tensors([prompt]))
        torch.testing.assert_close(together[uid - 11], alone[0], atol=2e-4, rtol=1e-4)


def test_norm_with_fresh_buffers_gives_the_same(tiny_model, monkeypatch):
    prompt = random.Random(5).choices(range(3, VOCAB), k=100)
    reused = greedy(poisoned_engine(tiny_model("llama"), num_blocks=16), 1, prompt, 6, chunk=256)
    monkeypatch.setattr(PreRMSNorm, "reuse_output", False)
    fresh = greedy(poisoned_engine(tiny_model("llama"), num_blocks=16), 1, prompt, 6, chunk=256)
    assert reused[0] == fresh[0]
    assert torch.equal(reused[1], fresh[1])
