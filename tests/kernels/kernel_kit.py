"""What the kernels' tests share: ragged batches over a poisoned pool of blocks, and attention written out in full."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""The GPU where there is one; else Triton's interpreter computes on the CPU (`tests/conftest.py`)."""

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3}
"""bfloat16 is left to GPUs: the interpreter truncates where a GPU rounds."""


@dataclass(kw_only=True)
class Batch:
    """A ragged batch whose K and V lie in scattered blocks; every other element of the pool is NaN."""

    descriptors: list[tuple[int, int, int]]
    """Of each sequence: first row, tokens, seen tokens."""
    tables: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    cache: torch.Tensor
    kv: list[torch.Tensor]
    """Of each sequence: `[num_total, 2, num_kv_heads, head_size]`."""

    @property
    def num_tokens(self) -> int:
        return sum(count for _, count, _ in self.descriptors)


def make_batch(
    lengths: list[tuple[int, int]],
    *,
    num_kv_heads: int,
    head_size: int,
    block_size: int,
    dtype: torch.dtype,
    holds_own: bool = True,
    seed: int = 0,
) -> Batch:
    """`lengths[i]`: seen tokens and new tokens of a sequence. `holds_own`: the new ones are in the blocks already."""
    generator = torch.Generator().manual_seed(seed)
    totals = [seen + count for seen, count in lengths]
    blocks_of = [-(-total // block_size) for total in totals]
    pool = list(range(sum(blocks_of) + 3))
    random.Random(seed).shuffle(pool)
    cache = torch.full((len(pool), block_size, 2, num_kv_heads, head_size), float("nan"), dtype=dtype)
    rows = cache.view(-1, 2, num_kv_heads, head_size)
    tables = torch.zeros(len(lengths), max(blocks_of), dtype=torch.int32)
    descriptors, slots, positions, kvs = [], [], [], []
    start = 0
    for idx, ((seen, count), total, num_blocks) in enumerate(zip(lengths, totals, blocks_of, strict=True)):
        ids = torch.tensor([pool.pop() for _ in range(num_blocks)])
        tables[idx, :num_blocks] = ids
        at = torch.arange(total)
        own = ids[at // block_size] * block_size + at % block_size
        kv = torch.randn(total, 2, num_kv_heads, head_size, generator=generator).to(dtype)
        stop = total if holds_own else seen
        rows[own[:stop]] = kv[:stop]
        kvs.append(kv)
        slots.append(own[seen:])
        positions.append(at[seen:])
        descriptors.append((start, count, seen))
        start += count
    return Batch(
        descriptors=descriptors,
        tables=tables.to(DEVICE),
        slots=torch.cat(slots).to(DEVICE),
        positions=torch.cat(positions).to(DEVICE),
        cache=cache.to(DEVICE),
        kv=kvs,
    )


def written_out(
    q: torch.Tensor,
    kv: torch.Tensor,
    num_seen: int,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Causal attention of a sequence's last tokens, every score in float64. q: `[num_tokens, num_heads, head_size]`."""
    group = q.shape[1] // kv.shape[2]
    keys, values = (kv[:, idx].double().repeat_interleave(group, 1) for idx in (0, 1))
    scores = torch.einsum("qhd,khd->hqk", q.double(), keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    position = num_seen + torch.arange(q.shape[0])[:, None]
    key = torch.arange(kv.shape[0])[None]
    is_hidden = key > position
    if window is not None:
        is_hidden |= key <= position - window
    scores = scores.masked_fill(is_hidden, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
