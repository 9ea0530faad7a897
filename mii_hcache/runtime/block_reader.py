"""K and V of whole spans, read from a live sequence's blocks into host buffers."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from mii_hcache.core.geometry import SPAN_TOKENS
from mii_hcache.runtime.buffers import SpanBuffers
from mii_hcache.runtime.ports import EngineAdapter
from mii_hcache.runtime.stats import Counters

_log = logging.getLogger(__name__)


class BlockReader:
    """Owns a bounded pool of buffers `[num_layers, SPAN_TOKENS, 2, num_kv_heads, head_size]`, of a rank's own heads.

    Engine thread only, except `release`. On a GPU the copies are stream-ordered: record an event behind them before the
    bytes are used."""

    def __init__(
        self, adapter: EngineAdapter, counters: Counters, *, num_layers: int, max_buffers: int, num_ranks: int = 1
    ) -> None:
        geometry = adapter.geometry
        self._adapter = adapter
        self._counters = counters
        self._buffers = SpanBuffers(
            shape=(num_layers, SPAN_TOKENS, 2, geometry.shard_kv_heads(num_ranks), geometry.head_size),
            dtype=adapter.dtype,
            max_buffers=max_buffers,
        )

    @property
    def num_in_use(self) -> int:
        """Buffers not yet given back."""
        return self._buffers.num_in_use

    def acquire(self, wait_s: float = 0.0) -> torch.Tensor | None:
        """A buffer, or None when all are in use for `wait_s`."""
        return self._buffers.acquire(wait_s)

    def read(self, uid: int, span_idx: int, layers: Sequence[int], buffer: torch.Tensor) -> bool:
        """Read a span's layer `layers[i]` into `buffer[i]`. False, and the buffer given back, when that failed."""
        try:
            target = self._adapter.target(uid)
            for row, layer_idx in enumerate(layers):
                target.read_kv(layer_idx, span_idx * SPAN_TOKENS, buffer[row])
        except Exception:
            _log.exception("a span could not be read from its blocks; it is not saved")
            self._counters.add("save_errors_total")
            self.release(buffer)
            return False
        return True

    def release(self, buffer: torch.Tensor) -> None:
        """Give a buffer back; any thread."""
        self._buffers.release(buffer)
