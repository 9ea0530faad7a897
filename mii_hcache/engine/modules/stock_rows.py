"""Rows at any positions, in the form in which the host's ragged kernels take a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_INT32_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class RowBatch:
    """A ragged batch whose sequences are single rows, built on the device without a copy from the host.

    Has the calls of the host's `RaggedBatchWrapper` that its kernels make. A kernel looks a row's block up at
    `list[position // block_size]`, where `list` is the address of the sequence's block ids. Over a cache that is seen
    in blocks of one token (`[num_slots, 1, 2, num_kv_heads, head_size]`) a block is a slot, and the list of row `i` is
    the address of its slot less `position` elements: the one element that is read is the row's own.
    """

    token_ids: torch.Tensor
    """`[num_rows]`, int32 or int64."""
    metadata: torch.Tensor
    """`[2]`, int32: rows, sequences."""
    sequences: torch.Tensor
    """`[num_rows, 4]`, int32: first row, rows, tokens before them, nothing."""
    row_sequences: torch.Tensor
    """`[num_rows]`, int32: the sequence of each row."""
    block_lists: torch.Tensor
    """`[num_rows]`, int64: addresses; zeros where there is no cache."""
    slots: torch.Tensor | None
    """`[num_rows]`, int32: what the addresses point to, kept alive."""

    def input_ids(self) -> torch.Tensor:
        return self.token_ids

    def batch_metadata_buffer(self) -> torch.Tensor:
        return self.metadata

    def inflight_seq_descriptors(self) -> torch.Tensor:
        return self.sequences

    def tokens_to_seq(self) -> torch.Tensor:
        return self.row_sequences

    def kv_ptrs(self) -> torch.Tensor:
        return self.block_lists


def batch_of_rows(
    positions: torch.Tensor, *, slots: torch.Tensor | None = None, token_ids: torch.Tensor | None = None
) -> RowBatch:
    """positions: `[num_rows]`, int64, absolute; slots: `[num_rows]`, int64, where K and V go; token_ids: `[num_rows]`.
    All on one device; enqueued on the current stream."""
    num_rows, device = positions.numel(), positions.device
    row_idx = torch.arange(num_rows, dtype=torch.int32, device=device)
    sequences = torch.zeros(num_rows, 4, dtype=torch.int32, device=device)
    sequences[:, 0] = row_idx
    sequences[:, 1] = 1
    sequences[:, 2] = positions
    block_lists = torch.zeros(num_rows, dtype=torch.int64, device=device)
    if slots is not None:
        slots = slots.to(torch.int32)
        block_lists = slots.data_ptr() + _INT32_BYTES * (row_idx - positions)
    return RowBatch(
        token_ids=row_idx if token_ids is None else token_ids,
        metadata=torch.full((2,), num_rows, dtype=torch.int32, device=device),
        sequences=sequences,
        row_sequences=row_idx,
        block_lists=block_lists,
        slots=slots,
    )
