"""Choosing next tokens from logits, each sequence by its own parameters and its own random stream."""

from __future__ import annotations

import torch

from mii_hcache.runtime.generation import SamplingParams


def make_generator(params: SamplingParams) -> torch.Generator | None:
    """A random stream of a sequence's own, so that its tokens do not depend on its neighbours; None when greedy."""
    if params.temperature == 0:
        return None
    generator = torch.Generator(device="cpu")
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed(params.seed % 2**63)
    return generator


def sample(logits: torch.Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """One token from `logits` (`[vocab_size]`): temperature, then top-k, then top-p, then a draw. CPU, float32."""
    scores = logits.to("cpu", torch.float32) / params.temperature
    if 0 < params.top_k < scores.numel():
        kth = torch.topk(scores, params.top_k).values[-1]
        scores = scores.masked_fill(scores < kth, float("-inf"))
    probabilities = scores.softmax(-1)
    if params.top_p < 1.0:
        ordered, order = probabilities.sort(descending=True)
        before = ordered.cumsum(-1) - ordered
        dropped = order[before >= params.top_p]  # the token that crosses top_p stays, so one always does
        probabilities[dropped] = 0.0
    return int(torch.multinomial(probabilities, 1, generator=generator))
