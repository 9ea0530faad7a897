"""Where a forward leaves each layer's QKV input, for whoever saves it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch


class QkvInputTap(Protocol):
    """Asked before each layer's norm where its output shall lie, and told after it where it lies. Engine thread only.

    A norm that writes into the rows it is given makes saving cost no copy: the layer's QKV projection reads its input
    from there. All of it, norm and projection, is launched on the main stream, before the step ends.
    """

    def rows_for(self, layer_idx: int, num_tokens: int) -> torch.Tensor | None:
        """`[num_tokens, hidden_size]`, contiguous, on the engine's device and of its dtype, with anything in it: the
        forward's to write and read until its step ends. None: the norm uses memory of its own."""

    def tap(self, layer_idx: int, hidden: torch.Tensor) -> None:
        """The layer's QKV input, `[num_tokens, hidden_size]`, in the order of the batch: the very tensor that
        `rows_for` gave, or another one, which is copied in stream order, for the next norm may overwrite it."""


class SharedTap:
    """One forward for several: the norm writes where the first of them wants it that wants it, the others copy."""

    def __init__(self, taps: Sequence[QkvInputTap]) -> None:
        self._taps = list(taps)

    def rows_for(self, layer_idx: int, num_tokens: int) -> torch.Tensor | None:
        for tap in self._taps:
            rows = tap.rows_for(layer_idx, num_tokens)
            if rows is not None:
                return rows
        return None

    def tap(self, layer_idx: int, hidden: torch.Tensor) -> None:
        for tap in self._taps:
            tap.tap(layer_idx, hidden)
