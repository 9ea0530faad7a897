"""What attention and embedding need to know of a ragged batch, worked out once per step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch

from mii_hcache.engine.modules.rope import rotary_tables
from mii_hcache.engine.modules.upload import StepUpload


@dataclass(frozen=True, kw_only=True)
class BatchSequence:
    """One sequence's part of a ragged batch."""

    start: int
    """First row of the sequence in the batch."""
    num_tokens: int
    num_seen: int
    """Tokens whose K and V are already in the blocks."""
    block_ids: torch.Tensor
    """`[num_blocks]`, integer, on the cache's device; covers `num_seen + num_tokens` tokens."""
    runs: list[tuple[int, int]]
    """The same blocks as runs of neighbours, in order: first block, number of blocks."""

    @property
    def num_total(self) -> int:
        """Tokens in the blocks after this step."""
        return self.num_seen + self.num_tokens


@dataclass(kw_only=True)
class BatchPlan:
    """A ragged batch's sequences, positions and places in the blocks. What is on the device is valid until the next
    batch is planned."""

    descriptors: list[tuple[int, int, int]]
    """Of each sequence: first row, tokens, seen tokens."""
    num_blocks: list[int]
    """Blocks of each sequence."""
    host_tables: torch.Tensor
    """`tables` on the host."""
    token_ids: torch.Tensor | None
    """`[num_tokens]`, int64, on the device; None where the batch's own copy is to be used."""
    positions: torch.Tensor
    """`[num_tokens]`, int64: absolute position of each row."""
    slots: torch.Tensor
    """`[num_tokens]`, int64: row of each token in the cache seen as `[num_blocks * block_size, ...]`."""
    last_rows: torch.Tensor
    """`[num_sequences]`, int64: each sequence's last row in the batch."""
    tables: torch.Tensor
    """`[num_sequences, max_blocks]`, int32: block ids of each sequence, in order; 0 behind its last one."""
    extra: list[torch.Tensor]
    """On the device: what the attention module had sent along."""
    _rotary: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @cached_property
    def sequences(self) -> list[BatchSequence]:
        """Each sequence by itself."""
        found = []
        for row, ((start, num_tokens, num_seen), num_blocks) in enumerate(
            zip(self.descriptors, self.num_blocks, strict=True)
        ):
            found.append(
                BatchSequence(
                    start=start,
                    num_tokens=num_tokens,
                    num_seen=num_seen,
                    block_ids=self.tables[row, :num_blocks],
                    runs=runs_of(self.host_tables[row, :num_blocks]),
                )
            )
        return found

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
    descriptors: list[tuple[int, int, int]],
    block_tables: list[torch.Tensor],
    block_size: int,
    upload: StepUpload,
    token_ids: torch.Tensor | None = None,
    extra: Sequence[torch.Tensor] = (),
) -> BatchPlan:
    """`descriptors[i]` = (start row, tokens, seen tokens), rows in order and without gaps; `block_tables[i]`: block ids
    on the host, any integer; `token_ids`: of the batch, int64 on the host. Everything for the device, `extra` included,
    goes there in one copy."""
    starts, counts, seens = (np.array(column, dtype=np.int64) for column in zip(*descriptors, strict=True))
    num_blocks = -(-(seens + counts) // block_size)
    tables = np.zeros((len(descriptors), int(num_blocks.max())), dtype=np.int32)
    for row, (ids, count) in enumerate(zip(block_tables, num_blocks.tolist(), strict=True)):
        tables[row, :count] = ids[:count].numpy()
    row_of = np.repeat(np.arange(len(descriptors)), counts)
    positions = np.arange(int(counts.sum())) + (seens - starts)[row_of]
    slots = tables[row_of, positions // block_size].astype(np.int64) * block_size + positions % block_size
    arrays = [torch.from_numpy(array) for array in (positions, slots, starts + counts - 1, tables)]
    if token_ids is not None:
        arrays.append(token_ids)
    sent = upload.send([*arrays, *extra])
    return BatchPlan(
        descriptors=descriptors,
        host_tables=arrays[3],
        num_blocks=num_blocks.tolist(),
        positions=sent[0],
        slots=sent[1],
        last_rows=sent[2],
        tables=sent[3],
        token_ids=sent[4] if token_ids is not None else None,
        extra=sent[len(arrays) :],
    )
