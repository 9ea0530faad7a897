"""A tiny Llama with random weights whose queries and keys turn as the kernel turns them; all else in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from experiments.rope_drift.config import Rotary
from experiments.rope_drift.kernel import Floats, angles, given_frequencies, kernel_angles, other_head_angles

NUM_HEADS, NUM_LAYERS, VOCAB = 4, 4, 1000
LAST = 256
"""Positions at the end of a context whose logits are compared."""


@dataclass(frozen=True, kw_only=True)
class Turns:
    """Angles `[num_tokens, head_size / 2]` of keys, and of queries in the first head of a group and in the others."""

    keys: Floats
    first: Floats
    others: Floats

    @classmethod
    def of(cls, rotary: Rotary, num_tokens: int, dtype: str | None) -> Turns:
        """Of the kernel in a 16-bit type; None: float32 frequencies everywhere."""
        at = torch.arange(num_tokens).numpy().astype("float64")
        if dtype is None:
            same = angles(given_frequencies(rotary.theta, rotary.head_size), at)
            return cls(keys=same, first=same, others=same)
        made = kernel_angles(rotary.theta, rotary.head_size, dtype, at)
        return cls(keys=made, first=made, others=other_head_angles(rotary.theta, rotary.head_size, at))


def tiny_model(rotary: Rotary) -> Any:
    """Seeded; weights scaled up so that attention is sharp and next tokens vary."""
    import transformers as hf

    config = hf.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=NUM_HEADS * rotary.head_size,
        intermediate_size=1024,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_HEADS // rotary.query_group,
        head_dim=rotary.head_size,
        max_position_embeddings=1 << 17,
        rope_parameters={"rope_type": "default", "rope_theta": rotary.theta},
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(3.0)
    return model.eval()


@contextmanager
def turning(turns: Turns, query_group: int, keys_kept_in: str | None = None) -> Iterator[None]:
    """Within, the model turns so, and rounds turned keys to a 16-bit type if one is named. Its positions must be 0, 1,
    ... in one call."""
    from transformers.models.llama import modeling_llama

    original = modeling_llama.apply_rotary_pos_emb
    kept = torch.float32 if keys_kept_in is None else getattr(torch, keys_kept_in)

    def turn(x: torch.Tensor, angle: Floats) -> torch.Tensor:
        wide = torch.from_numpy(angle)
        cos, sin = wide.cos().float(), wide.sin().float()
        low, high = x.chunk(2, dim=-1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)

    def apply(q: torch.Tensor, k: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [turn(q[:, head], turns.others if head % query_group else turns.first) for head in range(q.shape[1])]
        return torch.stack(parts, dim=1), turn(k, turns.keys).to(kept).float()

    modeling_llama.apply_rotary_pos_emb = apply
    try:
        yield
    finally:
        modeling_llama.apply_rotary_pos_emb = original


@torch.inference_mode()
def last_logits(
    model: Any,
    rotary: Rotary,
    token_ids: torch.Tensor,
    dtype: str | None,
    *,
    num_last: int = LAST,
    keys_kept_in: str | None = None,
) -> torch.Tensor:
    """Logits of the last positions of a context, `[num_last, VOCAB]`. token_ids: `[num_tokens]`; dtype: of frequencies
    that the kernel makes, None for float32."""
    with turning(Turns.of(rotary, token_ids.numel(), dtype), rotary.query_group, keys_kept_in):
        return model(token_ids[None], logits_to_keep=num_last, use_cache=False).logits[0]  # type: ignore[no-any-return]


def greedy(model: Any, rotary: Rotary, token_ids: torch.Tensor, num_new: int) -> torch.Tensor:
    """A context and `num_new` greedy tokens behind it, float32 frequencies."""
    for _ in range(num_new):
        logits = last_logits(model, rotary, token_ids, None, num_last=1)
        token_ids = torch.cat([token_ids, logits.argmax(-1)])
    return token_ids


def agreement(model: Any, rotary: Rotary, answered: torch.Tensor, num_new: int, dtype: str) -> int:
    """Greedy tokens of the kernel's frequencies before the first that differs from `answered` (of `greedy`). Up to
    there both have the same context, so one forward over it says all."""
    made = last_logits(model, rotary, answered[:-1], dtype, num_last=num_new).argmax(-1)
    is_other = (made != answered[-num_new:]).nonzero()
    return int(is_other[0]) if is_other.numel() else num_new
