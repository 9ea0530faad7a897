"""Choosing next tokens from logits, each sequence by its own parameters and its own random stream."""

from __future__ import annotations

import torch

from mii_hcache.runtime.generation import SamplingParams, TokenLogprob


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
    scores = logits.to("cpu", torch.float32)
    scores = (scores - scores.max()) / params.temperature  # the best stays 0, however small the temperature
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


def logprobs_of(logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> list[TokenLogprob]:
    """How likely each of `token_ids` (`[num_rows]`) was by `logits` (`[num_rows, vocab_size]`)."""
    scores = logits.to(torch.float32).log_softmax(-1)
    chosen = scores.gather(-1, token_ids.to(scores.device)[:, None])[:, 0].tolist()
    best = scores.topk(min(num_top, scores.shape[-1]), dim=-1)
    tops = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        TokenLogprob(token_id=token_id, logprob=logprob, top=tuple(zip(ids, values, strict=True)))
        for token_id, logprob, (ids, values) in zip(token_ids.tolist(), chosen, tops, strict=True)
    ]
