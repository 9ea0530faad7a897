"""How a restore's tiles come and get into its blocks: the seam between what is planned and where the bytes are.

`LocalTiles` reads from the store of this process. With tensor parallelism a tile is read by several processes, a part
each, and put together on their devices: another `TileSource`.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING

import torch

from mii_hcache.core.identity import SpanId
from mii_hcache.runtime.buffers import as_bytes
from mii_hcache.runtime.ports import KVTarget
from mii_hcache.runtime.streams import Event
from mii_hcache.runtime.timeline import RestoreTimeline
from mii_hcache.runtime.work import Tile
from mii_hcache.storage.base import ChunkRead, ReadOutcome

if TYPE_CHECKING:
    from mii_hcache.runtime.restorer import Restorer


class TileRead(ABC):
    """One tile on its way. Engine thread only; its bytes need not be in this process."""

    tile: Tile
    outcome: Future[ReadOutcome]
    """How many leading spans arrived and were verified, wherever they were read; or what was raised. Ends on any
    thread. Until then nothing of the tile can be placed."""
    started_s: float = math.inf
    """`time.perf_counter` when somebody took the read up: from then on it may be overdue."""

    @abstractmethod
    def place(self, num_spans: int) -> None:
        """Launch whatever brings the first `num_spans` spans (at least one, at most as many as arrived) into the
        blocks. Once at most, after `outcome`. Does not wait for the device."""

    @abstractmethod
    def release(self) -> None:
        """Nobody waits for the tile any more, placed or not. Its memory comes back when nothing uses it: neither a read
        that goes on, or hangs, nor a copy to the device. Once for every read. Does not block."""


class TileSource(ABC):
    """One restore's tiles. Engine thread only."""

    @abstractmethod
    def start(self, tile: Tile) -> TileRead:
        """Start reading a tile. Does not block."""

    @property
    @abstractmethod
    def num_held(self) -> int:
        """Tiles that were placed and released while the device still copies them from host memory."""

    @abstractmethod
    def join(self) -> None:
        """What was placed comes before whatever the engine's own calls do from now on: what is in the blocks may be
        used, or the blocks may be given to somebody else. To be called however the restore ends. Does not block."""


class Copies:
    """One restore's host buffers that the device copies from. Engine thread only."""

    def __init__(self, restorer: Restorer) -> None:
        self._restorer = restorer
        self._copies: deque[Event] = deque()

    @property
    def num_held(self) -> int:
        """How many."""
        while self._copies and self._copies[0].is_done:
            self._copies.popleft()
        return len(self._copies)

    def give_back(self, buffer: torch.Tensor, copied: Event | None) -> None:
        """A buffer is needed no longer than until `copied`."""
        if copied is not None:
            self._copies.append(copied)
        self._restorer.give_back(buffer, copied)


class LocalTiles(TileSource):
    """From the store of this process, by its restorer's reader threads, through host buffers, by its placer."""

    def __init__(
        self, restorer: Restorer, target: KVTarget, span_ids: Sequence[SpanId], timeline: RestoreTimeline
    ) -> None:
        """`span_ids`: of all spans of the restore, in order. Reads and what is placed are noted in `timeline`."""
        self.restorer = restorer
        self.span_ids = span_ids
        self.timeline = timeline
        self.placing = restorer.placer.open(target, timeline)
        self._copies = Copies(restorer)

    def start(self, tile: Tile) -> TileRead:
        return _LocalRead(self, tile)

    @property
    def num_held(self) -> int:
        return self._copies.num_held

    def join(self) -> None:
        self.placing.join()

    def give_back(self, buffer: torch.Tensor, copied: Event | None) -> None:
        """A buffer is needed no longer than until `copied`."""
        self._copies.give_back(buffer, copied)


class _LocalRead(TileRead):
    def __init__(self, source: LocalTiles, tile: Tile) -> None:
        restorer = source.restorer
        buffer = restorer.buffers.acquire()
        assert buffer is not None
        self.tile = tile
        self._source = source
        self._buffer = buffer
        self._copied: Event | None = None
        chunk_bytes = restorer.adapter.geometry.chunk_bytes(tile.kind)
        view = as_bytes(buffer)
        self._chunks = [
            ChunkRead(
                span_id=source.span_ids[tile.first_span + idx],
                layer_idx=tile.layer_idx,
                out=view[idx * chunk_bytes : (idx + 1) * chunk_bytes],
                kind=tile.kind,
            )
            for idx in range(tile.num_spans)
        ]
        try:
            self.outcome = restorer.submit_read(self._read)
        except BaseException:
            restorer.buffers.release(buffer)
            raise

    def _read(self) -> ReadOutcome:
        """On a reader thread."""
        self.started_s = started_s = time.perf_counter()
        outcome = self._source.restorer.store.get_into(self._chunks)
        self._source.timeline.add_tile("read", started_s, self.tile, sum(chunk.out.nbytes for chunk in self._chunks))
        return outcome

    def place(self, num_spans: int) -> None:
        try:
            self._source.placing.place(self.tile, self._buffer, num_spans)
        finally:
            self._copied = self._source.placing.copied

    def release(self) -> None:
        if self.outcome.done():
            self._source.give_back(self._buffer, self._copied)
            return
        if not self.outcome.cancel():
            self._source.restorer.let_go(self.outcome)  # it goes on, or hangs: another thread reads in its place
        self.outcome.add_done_callback(partial(self._give_back, self._buffer))

    def _give_back(self, buffer: torch.Tensor, _: Future[ReadOutcome]) -> None:
        """On any thread: nothing was placed."""
        self._source.restorer.buffers.release(buffer)
