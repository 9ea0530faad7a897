"""The block pool gets what the weights leave: what they weigh is known before they are loaded."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mii_hcache.engine import pool_size
from mii_hcache.engine.pool_size import GPU_POOL_SHARE, default_num_blocks
from mii_hcache.errors import ConfigError
from tests.engine_kit import ALL_MODELS

GIB = 1 << 30


@pytest.mark.parametrize("name", ALL_MODELS)
def test_weights_are_weighed_right(tiny_model, name):
    path = str(tiny_model(name))
    config = AutoConfig.from_pretrained(path)
    config.dtype = torch.float32
    # an untied head, as the engine may hold one
    counted = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(path).parameters())
    if config.tie_word_embeddings:
        counted += config.vocab_size * config.hidden_size
    assert counted == pytest.approx(pool_size._weights_bytes(config) / 4, rel=0.1)


def _mixtral() -> SimpleNamespace:
    """8x7B."""
    return SimpleNamespace(
        model_type="mixtral",
        num_hidden_layers=32,
        hidden_size=4096,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=14336,
        num_local_experts=8,
        vocab_size=32000,
        dtype=torch.bfloat16,
    )


def test_a_gpu_has_room_for_weights_and_pool_together(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (139 * GIB, 140 * GIB))
    num_blocks = default_num_blocks(_mixtral(), 64, 32768, "triton", None)
    pool_bytes = num_blocks * 64 * 32 * 2 * 8 * 128 * 2
    weights_bytes = 46.7e9 * 2  # as its authors say
    assert weights_bytes + pool_bytes < 139 * GIB
    assert pool_bytes == pytest.approx(GPU_POOL_SHARE * (139 * GIB - weights_bytes), rel=0.02)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80 * GIB, 80 * GIB))
    with pytest.raises(ConfigError, match="no memory for KV blocks"):
        default_num_blocks(_mixtral(), 64, 32768, "triton", None)
