"""What attention and embedding need to know of a ragged batch, worked out once per step."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch

from mii_hcache.engine.modules.rope import rotary_tables


@dataclass(frozen=True, kw_only=True)
class BatchSequence:
    """One sequence's part of a ragged batch."""

    start: int
    """First row of the sequence in the batch."""
    num_tokens: int
    num_seen: int
    """Tokens whose K and V are already in the blocks."""
    block_ids: torch.Tensor
    """`[num_blocks]`, int64, on the cache's device; covers `num_seen + num_tokens` tokens."""
    runs: list[tuple[int, int]]
    """The same blocks as runs of neighbours, in order: first block, number of blocks."""

    @property
    def num_total(self) -> int:
        """Tokens in the blocks after this step."""
        return self.num_seen + self.num_tokens


@dataclass(kw_only=True)
class BatchPlan:
    """A ragged batch's sequences, positions and places in the blocks."""

    sequences: list[BatchSequence]
    positions: torch.Tensor
    """`[num_tokens]`, int64: absolute position of each row."""
    slots: torch.Tensor
    """`[num_tokens]`, int64: row of each token in the cache seen as `[num_blocks * block_size, ...]`."""
    _rotary: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def rotary(self, inv_freq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of this batch's positions, computed once per distinct `inv_freq`."""
        key = inv_freq.data_ptr()
        if key not in self._rotary:
            self._rotary[key] = rotary_tables(self.positions, inv_freq)
        return self._rotary[key]


def token_slots(block_ids: torch.Tensor, positions: torch.Tensor, block_size: int) -> torch.Tensor:
    """Rows of `positions` in the cache seen as `[num_blocks * block_size, ...]`. All int64."""
    return block_ids[positions // block_size] * block_size + positions % block_size


def runs_of(block_ids: torch.Tensor) -> list[tuple[int, int]]:
    """Runs of neighbouring ids (`[num_blocks]`, host): first id and length of each."""
    breaks = (torch.nonzero(block_ids[1:] != block_ids[:-1] + 1).flatten() + 1).tolist()
    edges = [0, *breaks, block_ids.numel()]
    return [(int(block_ids[start]), stop - start) for start, stop in pairwise(edges)]


def make_plan(
    descriptors: list[tuple[int, int, int]], block_tables: list[torch.Tensor], block_size: int, device: torch.device
) -> BatchPlan:
    """`descriptors[i]` = (start row, tokens, seen tokens); `block_tables[i]`: block ids on the host, any integer."""
    sequences = []
    positions = []
    slots = []
    for (start, num_tokens, num_seen), table in zip(descriptors, block_tables, strict=True):
        num_blocks = -(-(num_seen + num_tokens) // block_size)
        host_ids = table[:num_blocks].to(torch.int64)
        at = torch.arange(num_seen, num_seen + num_tokens)
        positions.append(at)
        slots.append(token_slots(host_ids, at, block_size))
        sequences.append(
            BatchSequence(
                start=start,
                num_tokens=num_tokens,
                num_seen=num_seen,
                block_ids=host_ids.to(device),
                runs=runs_of(host_ids),
            )
        )
    return BatchPlan(sequences=sequences, positions=torch.cat(positions).to(device), slots=torch.cat(slots).to(device))
