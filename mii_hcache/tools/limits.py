"""How far a restored context may be from one that never left, and why not further.

Two runs of the same tokens may differ: a matrix product of another shape adds up in another order. So:

* **float32.** Tokens must be equal, all of them, and logits within `FLOAT32_LOGITS` of the largest logit. The order of
  additions alone gives about 1e-6 of it in four layers and grows with depth and width: the bound leaves room for that,
  and for nothing that could be seen in an answer.
* **16 bit.** Rounding is so coarse that logits differ visibly between two right runs. The bound is measured: the same
  tokens are run on the same engine with other batch splits (the whole prompt anew, and in batches of `SPLITS` tokens),
  and the most that any two of these runs differ is the engine's own noise. A restored context is one more run of that
  kind, so it does not stand out by being one of the pair that is furthest apart: of n runs and itself, with the pair
  that it forms with the reference as likely to be that as any other, it does so once in n (n + 1) / 2 times, by chance:
  once in 21 for six runs, where compared with the reference alone it would be once in six. Therefore it may differ by
  `NOISE_FACTOR` times the noise. That is rare: each difference is the largest of N numbers (answer tokens times
  vocabulary) that are sums of many roundings, so it lies near s sqrt(2 ln N), s being their spread, and half as much
  again comes by chance about once in N to the power of 1.25. Where splits differ more from each other than normal
  numbers of one spread do, the noise says so itself. Tokens must be equal wherever the best two logits are further
  apart than twice the bound: elsewhere either is right.
* **K and V** are compared directly: every layer, every restored token, every number. What was saved as `kv` must come
  back bit by bit. K and V projected from hidden states come from the very rows that the model's own projection had, so
  they may differ by the rounding of that one product: `KV_ULPS` steps of the dtype, and never less than `FLOAT32_KV`
  for the order of additions in float32, relative to the layer's largest value. A row of another token differs by about
  1. Logits alone would not do: two tokens with each other's V in one layer of a 1,500-token history move the logits of
  a tiny float32 model by 1e-3 to 1e-5 of the largest one, less than the noise of any 16-bit model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from mii_hcache.core.geometry import ChunkKind

FLOAT32_LOGITS = 1e-3
FLOAT32_KV = 1e-4
KV_ULPS = 8
NOISE_FACTOR = 1.5
SPLITS = (37, 96, 200)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The bounds of one conversation on one engine."""

    dtype: torch.dtype
    scale: float
    """Largest logit of the reference."""
    noise: float | None = None
    """Largest logit difference between batch splits (`noise_of`); None where it was not measured (float32)."""

    @property
    def is_exact(self) -> bool:
        """Whether tokens must be equal without exception."""
        return self.dtype is torch.float32

    @property
    def logits(self) -> float:
        """Most that a logit may differ."""
        if self.is_exact or self.noise is None:
            return FLOAT32_LOGITS * self.scale
        return NOISE_FACTOR * self.noise

    def kv(self, kind: ChunkKind) -> float:
        """Most that restored K and V may differ, relative to the layer's largest value."""
        return 0.0 if kind is ChunkKind.KV else max(FLOAT32_KV, KV_ULPS * torch.finfo(self.dtype).eps)


@dataclass(kw_only=True)
class Agreement:
    """How answers agree with the reference, turn by turn."""

    num_tokens: int = 0
    num_equal: int = 0
    max_logit_difference: float = 0.0
    max_kv_difference: float | None = None
    """None where nothing was restored."""
    _widest_miss: float = 0.0
    """Largest gap between the best two logits at a place where another token came."""

    def add(self, logits: torch.Tensor, reference: torch.Tensor) -> float:
        """One answer: `[num_answer, vocab_size]`, both float32. Returns the largest difference."""
        difference = logit_difference(logits, reference)
        self.max_logit_difference = max(self.max_logit_difference, difference)
        is_equal = logits.argmax(-1) == reference.argmax(-1)
        self.num_tokens += is_equal.numel()
        self.num_equal += int(is_equal.sum())
        best = reference.topk(2, dim=-1).values
        gaps = (best[:, 0] - best[:, 1])[~is_equal]
        if gaps.numel():
            self._widest_miss = max(self._widest_miss, float(gaps.max()))
        return difference

    def add_kv(self, difference: float) -> None:
        """K and V of one restored history."""
        self.max_kv_difference = max(self.max_kv_difference or 0.0, difference)

    def complaints(self, limits: Limits, kind: ChunkKind | None) -> list[str]:
        """What is beyond its bound; empty when all is well."""
        found = []
        if not self.max_logit_difference <= limits.logits < float("inf"):  # where noise is not finite, nothing is right
            found.append(f"logits differ by {self.max_logit_difference:.3g}, the bound is {limits.logits:.3g}")
        may_differ = 0.0 if limits.is_exact else 2 * limits.logits
        if self.num_equal < self.num_tokens and (limits.is_exact or self._widest_miss > may_differ):
            found.append(f"{self.num_tokens - self.num_equal} of {self.num_tokens} tokens differ")
        if kind is not None and self.max_kv_difference is not None and not self.max_kv_difference <= limits.kv(kind):
            found.append(f"K and V differ by {self.max_kv_difference:.3g}, the bound is {limits.kv(kind):.3g}")
        return found


def noise_of(runs: Sequence[torch.Tensor]) -> float:
    """Largest difference between any two runs of the same tokens, `[num_answer, vocab_size]` each, float32; infinite
    unless all is finite."""
    return max(logit_difference(one, other) for one, other in combinations(runs, 2))


def logit_difference(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest absolute difference; infinite unless all is finite."""
    difference = float((logits - reference).abs().max())
    return difference if difference < float("inf") else float("inf")
