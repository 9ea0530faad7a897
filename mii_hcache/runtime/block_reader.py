"""K and V of whole spans, read from a live sequence's blocks into host buffers."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from mii_hcache.core.geometry import SPAN_TOKENS
from mii_hcache.runtime.buffers import IDLE_S, SpanBuffers
from mii_hcache.runtime.ports import EngineAdapter
from mii_hcache.runtime.stage import Stage
from mii_hcache.runtime.stats import Counters
from mii_hcache.runtime.streams import Event

_log = logging.getLogger(__name__)


class BlockReader:
    """Owns a bounded pool of buffers `[num_layers, SPAN_TOKENS, 2, num_kv_heads, head_size]`, of a rank's own heads.

    Engine thread only, except `release`.

    On a device with streams, the main stream gathers a span into the stage, in one go, and the stage sends it. So the
    blocks are the sequence's own again when `read` returns, to be overwritten or freed: whoever gets them next writes
    to them on the main stream, or after it, and that is behind the gathering. A copy straight from the blocks would
    have to be waited for before they are freed."""

    def __init__(
        self,
        adapter: EngineAdapter,
        counters: Counters,
        *,
        num_layers: int,
        max_buffers: int,
        stage: Stage | None = None,
        num_ranks: int = 1,
    ) -> None:
        """`stage`: None on a CPU. `num_ranks` hold the model together."""
        geometry = adapter.geometry
        self._adapter = adapter
        self._counters = counters
        self._stage = stage
        self._buffers = SpanBuffers(
            shape=(num_layers, SPAN_TOKENS, 2, geometry.shard_kv_heads(num_ranks), geometry.head_size),
            dtype=adapter.dtype,
            max_buffers=max_buffers,
            idle_s=IDLE_S,
        )

    @property
    def num_in_use(self) -> int:
        """Buffers not yet given back."""
        return self._buffers.num_in_use

    def acquire(self, wait_s: float = 0.0) -> torch.Tensor | None:
        """A buffer, or None when all are in use for `wait_s`."""
        return self._buffers.acquire(wait_s)

    def read(self, uid: int, span_idx: int, layers: Sequence[int], buffer: torch.Tensor) -> list[Event] | None:
        """Launch reading a span's layer `layers[i]` into `buffer[i]`. Returns the moments (none on a CPU) after which
        the bytes are there; before, the buffer must be neither used nor given back. None, and the buffer given back,
        when that failed."""
        rows = buffer[: len(layers)]
        try:
            target = self._adapter.target(uid)
            if self._stage is None:
                target.gather_kv(layers, span_idx * SPAN_TOKENS, rows)
                return []
            part = self._stage.take(rows.numel() * rows.itemsize)
            target.gather_kv(layers, span_idx * SPAN_TOKENS, part.memory.view(rows.dtype).view(rows.shape))
            return [self._stage.send([(rows, part)])]
        except Exception:
            _log.exception("a span could not be read from its blocks; it is not saved")
            self._counters.add("save_errors_total")
            self.release(buffer)
            return None

    def release(self, buffer: torch.Tensor) -> None:
        """Give a buffer back; any thread."""
        self._buffers.release(buffer)
