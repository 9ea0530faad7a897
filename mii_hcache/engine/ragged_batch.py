"""The host's ragged batch, sent to the device once: with our attention's plan, or by the host without a race."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.inference.v2.ragged.ragged_wrapper import RaggedBatchWrapper

from mii_hcache.runtime.streams import Event, Streams


class StepBatch(RaggedBatchWrapper):  # type: ignore[misc]
    """One step's sequences and token ids.

    The host's `finalize` copies five arrays from pinned buffers that its next call writes again, whether or not they
    have left: safe only where every step is waited for, and tokens that a restore recomputes are not. Modules that plan
    on their own need none of the five: their plan takes the token ids along (`for_stock` False). DeepSpeed's own
    modules do: then `finalize` first waits until the last copies are over.
    """

    def __init__(self, config: Any, streams: Streams, *, for_stock: bool) -> None:
        super().__init__(config)
        self._streams = streams
        self._for_stock = for_stock
        self._sent: Event | None = None
        self.token_ids = torch.empty(0, dtype=torch.int64)
        """`[num_tokens]`, int64, host: of the finalized batch."""

    @property
    def descriptors(self) -> list[tuple[int, int, int]]:
        """Of each sequence: first row, tokens, seen tokens."""
        flat = self._inflight_seq_descriptors_shadow_buf
        return list(zip(flat[0::4], flat[1::4], flat[2::4], strict=True))

    @property
    def table_pointers(self) -> list[int]:
        """Of each sequence: address of its row in the host's table of block ids."""
        return list(self._kv_blocks_ptr_buf)

    def finalize(self, padding: bool | None = False) -> None:
        self.token_ids = torch.cat(self._batch_tokens)
        if not self._for_stock:
            return
        if self._sent is not None:
            self._sent.synchronize()
        super().finalize(padding)
        self._sent = self._streams.main.record()
