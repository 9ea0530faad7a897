"""Starts restores and owns what they share: the reader threads and the host buffers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace

import torch

from mii_hcache.core.geometry import ChunkKind
from mii_hcache.core.identity import SpanId
from mii_hcache.runtime.buffers import SpanBuffers, as_bytes
from mii_hcache.runtime.gathering import Gathering
from mii_hcache.runtime.held_memory import HeldMemory
from mii_hcache.runtime.pieces import pieces_on
from mii_hcache.runtime.placing import Placer
from mii_hcache.runtime.ports import EngineAdapter, KVTarget
from mii_hcache.runtime.restore import Restore
from mii_hcache.runtime.stats import Counters
from mii_hcache.runtime.streams import Event, Streams, streams_of
from mii_hcache.runtime.tiles import LocalTiles, TileSource
from mii_hcache.runtime.timeline import RestoreTimeline
from mii_hcache.storage.base import ChunkStore
from mii_hcache.storage.presence import DEADLINE_S
from mii_hcache.storage.records import ReadOutcome, SpanRecord
from mii_hcache.storage.workers import Workers

_log = logging.getLogger(__name__)

STOP_S = 2.0
"""How long stopping waits for reads that nobody waits for any more."""
_SLACK = 1.1

OpenTiles = Callable[["Restorer", KVTarget, Sequence[SpanId], RestoreTimeline], TileSource]
"""Makes one restore's `TileSource`: for these blocks, of these spans, which notes what it does."""


class Restorer:
    """Engine thread only, except `submit_read`."""

    def __init__(
        self,
        *,
        adapter: EngineAdapter,
        store: ChunkStore,
        counters: Counters,
        tile_spans: int | None = None,
        read_ahead_bytes: int | None = None,
        read_deadline_s: float = DEADLINE_S,
        open_tiles: OpenTiles = LocalTiles,
        streams: Streams | None = None,
        is_urgent: bool = False,
        gathering: Gathering | None = None,
    ) -> None:
        """`tile_spans`, `read_ahead_bytes`: as in `Pieces`, None for what suits the device. `read_deadline_s`: a tile's
        read that takes longer hangs, and its restore does without it. `open_tiles`: where tiles come from. `streams`:
        the device's, None for torch's. `is_urgent`: restores before the engine's forwards, where a GPU can choose; to
        be measured, and until then not. `gathering`: as in `Placer`; `open_tiles` fits it."""
        pieces = pieces_on(adapter.device)
        self.adapter = adapter
        self.store = store
        self.counters = counters
        self.streams = streams or streams_of(adapter.device)
        self.pieces = replace(
            pieces,
            tile_spans=tile_spans or pieces.tile_spans,
            read_ahead_bytes=pieces.read_ahead_bytes if read_ahead_bytes is None else read_ahead_bytes,
        )
        self.num_open = 0
        """Restores that are neither over nor cancelled."""
        self.read_deadline_s = _SLACK * read_deadline_s
        """A little later than the store, which then knows already which spans cannot be read."""
        self._open_tiles = open_tiles
        largest_bytes = self.pieces.tile_spans * max(adapter.geometry.chunk_bytes(kind) for kind in ChunkKind)
        self._max_ahead = max(self.pieces.least_ahead, self.pieces.read_ahead_bytes // largest_bytes)
        self._lent: list[memoryview] = []
        self._held = HeldMemory()
        self.buffers = SpanBuffers(shape=(largest_bytes,), dtype=torch.uint8, max_buffers=1 << 20, on_made=self._lend)
        self.is_urgent = is_urgent
        self.placer = Placer(
            adapter, self.streams, tile_spans=self.pieces.tile_spans, is_urgent=is_urgent, gathering=gathering
        )
        self._readers = Workers(self.pieces.num_readers, "hcache-read")

    @property
    def tiles_ahead(self) -> int:
        """Tiles that one restore may have read, or be reading, ahead of what the device has copied."""
        return max(self.pieces.least_ahead, self._max_ahead // max(1, self.num_open))

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

    def open_tiles(self, target: KVTarget, span_ids: Sequence[SpanId], timeline: RestoreTimeline) -> TileSource:
        """Where the tiles of a restore come from."""
        return self._open_tiles(self, target, span_ids, timeline)

    def give_back(self, release: Callable[[], None], copied: Event | None) -> None:
        """As `HeldMemory`, and looks for more that can be given back."""
        self._held.give_back(release, copied)
        self.collect()

    def collect(self) -> bool:
        """Give back the host memory that the device has copied. Does not block. Restores do so as they go on; of the
        last one something is left when it is over, which somebody must come back for. False: nothing is left."""
        self._held.collect()
        return bool(self._held)

    def submit_read(self, read: Callable[[], ReadOutcome]) -> Future[ReadOutcome]:
        """Run in the background."""
        return self._readers.submit(read)

    def let_go(self, outcome: Future[ReadOutcome]) -> None:
        """Nobody waits for a read that has begun: another thread takes the place of its own. Does not block."""
        self._readers.replace(outcome)

    def stop(self) -> None:
        """End the reader threads; no restore may be running. Returns also while reads hang; memory that these go to is
        not taken back from the store."""
        have_ended = self._readers.close(STOP_S)
        self._held.stop()
        if not have_ended or not self.buffers.wait_until_unused(STOP_S):
            _log.warning("reads hang: the memory that reads go to (%d in use) is left", self.buffers.num_in_use)
            return
        while self._lent:
            self.store.take_back(self._lent.pop())

    def _lend(self, buffer: torch.Tensor) -> None:
        """The same few buffers take all that is read, so a store may as well know them."""
        view = as_bytes(buffer)
        self.store.lend(view)
        self._lent.append(view)
