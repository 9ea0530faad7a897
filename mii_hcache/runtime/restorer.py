"""Starts restores and owns what they share: the reader threads and the host buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from mii_hcache.core.geometry import ChunkKind
from mii_hcache.runtime.buffers import SpanBuffers, as_bytes
from mii_hcache.runtime.ports import EngineAdapter, KVTarget
from mii_hcache.runtime.restore import Restore
from mii_hcache.runtime.stats import Counters
from mii_hcache.storage.base import ChunkStore, ReadOutcome, SpanRecord

MAX_TILE_SPANS = 8
"""Longest tile: 512 tokens."""
NUM_READERS = 3
"""Tiles read at a time, and the fewest that are read ahead."""
READ_AHEAD_BYTES = 256 << 20
"""What may lie in host memory, read and not yet placed, of all restores together: enough for the reads to go on while
a forward runs."""


class Restorer:
    """Engine thread only, except `submit_read`."""

    def __init__(
        self,
        *,
        adapter: EngineAdapter,
        store: ChunkStore,
        counters: Counters,
        tile_spans: int = MAX_TILE_SPANS,
        read_ahead_bytes: int = READ_AHEAD_BYTES,
    ) -> None:
        self.adapter = adapter
        self.store = store
        self.counters = counters
        self.tile_spans = tile_spans
        """Spans per tile; the smaller, the finer the slices."""
        self.num_open = 0
        """Restores that are neither over nor cancelled."""
        largest_bytes = tile_spans * max(adapter.geometry.chunk_bytes(kind) for kind in ChunkKind)
        self._max_ahead = max(NUM_READERS, read_ahead_bytes // largest_bytes)
        self._lent: list[memoryview] = []
        self.buffers = SpanBuffers(shape=(largest_bytes,), dtype=torch.uint8, max_buffers=1 << 20, on_made=self._lend)
        self._reader = ThreadPoolExecutor(max_workers=NUM_READERS, thread_name_prefix="hcache-read")

    @property
    def tiles_ahead(self) -> int:
        """Tiles that one restore may have read, or be reading, ahead of what is placed."""
        return max(NUM_READERS, self._max_ahead // max(1, self.num_open))

    def start(
        self,
        target: KVTarget,
        records: Sequence[SpanRecord],
        token_ids: Sequence[int],
        *,
        recompute_tokens: int = 0,
        recompute_layers: int = 0,
    ) -> Restore:
        """Restore the spans of `records` (a prefix of the chain, in order) into `target`, whose blocks are reserved.

        token_ids: at least the ids of those spans. `recompute_tokens`, a multiple of 64: the first tokens, which go
        through all layers instead of being read. `recompute_layers`: layers of the other tokens that do so, though
        they may be saved; those that some span lacks do so anyway. Raises ValueError for what cannot be done.
        """
        return Restore(
            self, target, records, token_ids, recompute_tokens=recompute_tokens, recompute_layers=recompute_layers
        )

    def submit_read(self, read: Callable[[], ReadOutcome]) -> Future[ReadOutcome]:
        """Run in the background."""
        return self._reader.submit(read)

    def stop(self) -> None:
        """End the reader threads; no restore may be running."""
        self._reader.shutdown()
        while self._lent:
            self.store.take_back(self._lent.pop())

    def _lend(self, buffer: torch.Tensor) -> None:
        """The same few buffers take all that is read, so a store may as well know them."""
        view = as_bytes(buffer)
        self.store.lend(view)
        self._lent.append(view)
