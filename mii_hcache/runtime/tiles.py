"""How a restore's tiles come and get into its blocks: the seam between what is planned and where the bytes are.

`LocalTiles` reads from the store of this process. With tensor parallelism a tile is read by several processes, a part
each, and put together on their devices: another `TileSource`.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING

import torch

from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind
from mii_hcache.core.identity import SpanId
from mii_hcache.runtime.buffers import as_bytes
from mii_hcache.runtime.lent_rows import LentRows
from mii_hcache.runtime.ports import KVTarget
from mii_hcache.runtime.streams import Event
from mii_hcache.runtime.timeline import RestoreTimeline
from mii_hcache.runtime.work import Tile
from mii_hcache.storage.directions import ChunkWanted
from mii_hcache.storage.records import ChunkRead, ReadOutcome

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
    """One restore's host memory that the device copies from, tile by tile. Engine thread only."""

    def __init__(self, restorer: Restorer) -> None:
        self._restorer = restorer
        self._copies: deque[Event] = deque()

    @property
    def num_held(self) -> int:
        """How many."""
        while self._copies and self._copies[0].is_done:
            self._copies.popleft()
        return len(self._copies)

    def give_back(self, release: Callable[[], None], copied: Event | None) -> None:
        """`release` gives memory back, that is needed no longer than until `copied`."""
        if copied is not None:
            self._copies.append(copied)
        self._restorer.give_back(release, copied)


class LocalTiles(TileSource):
    """From the store of this process, by its restorer's reader threads and its placer: from where the store has the
    bytes in memory, if it lends them, else through host buffers."""

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

    def give_back(self, release: Callable[[], None], copied: Event | None) -> None:
        """`release` gives memory back, that is needed no longer than until `copied`."""
        self._copies.give_back(release, copied)


class _LocalRead(TileRead):
    def __init__(self, source: LocalTiles, tile: Tile) -> None:
        self.tile = tile
        self._source = source
        self._pieces: Sequence[torch.Tensor] = ()
        """The rows of the tile, a span in each or all in one, as `Placing.place` takes them: since the end of the
        read."""
        self._release: Callable[[], None] = _nothing
        """Gives that memory back; set by the reader thread before `outcome` ends."""
        self._copied: Event | None = None
        self._chunk_bytes = source.restorer.adapter.geometry.chunk_bytes(tile.kind)
        self.outcome = source.restorer.submit_read(self._read)

    def _read(self) -> ReadOutcome:
        """On a reader thread."""
        self.started_s = started_s = time.perf_counter()
        outcome = self._borrow()
        if outcome is None:
            outcome = self._read_into_buffer()
        num_bytes = self.tile.num_spans * self._chunk_bytes
        self._source.timeline.add_tile("read", started_s, self.tile, num_bytes)
        return outcome

    def _borrow(self) -> ReadOutcome | None:
        """None: the store does not lend these, or the engine wants them otherwise."""
        source, tile = self._source, self.tile
        is_device = source.restorer.streams.has_own_memory
        if not is_device and tile.kind is ChunkKind.HIDDEN:
            return None  # one product over all rows of a tile is faster than one for each span, and needs them together
        wanted = [
            ChunkWanted(span_id=span_id, layer_idx=tile.layer_idx, num_bytes=self._chunk_bytes, kind=tile.kind)
            for span_id in self._span_ids
        ]
        borrowed = source.restorer.store.borrow(wanted, must_be_pinned=is_device)
        if borrowed is None:
            return None
        self._release = borrowed.give_back
        dtype = source.restorer.adapter.dtype
        shape = SPAN_TOKENS, self._chunk_bytes // (SPAN_TOKENS * dtype.itemsize)
        addresses = borrowed.addresses
        if addresses is None:
            self._pieces = [torch.frombuffer(chunk, dtype=dtype).view(shape) for chunk in borrowed.chunks]
        else:
            self._pieces = LentRows(borrowed.chunks, addresses, dtype, shape)
        return borrowed.outcome

    def _read_into_buffer(self) -> ReadOutcome:
        restorer, size = self._source.restorer, self._chunk_bytes
        buffer = restorer.buffers.acquire()
        assert buffer is not None
        self._release = partial(restorer.buffers.release, buffer)
        self._pieces = [self._rows(buffer[: self.tile.num_spans * size])]
        view = as_bytes(buffer)
        return restorer.store.get_into(
            [
                ChunkRead(
                    span_id=span_id,
                    layer_idx=self.tile.layer_idx,
                    out=view[idx * size : (idx + 1) * size],
                    kind=self.tile.kind,
                )
                for idx, span_id in enumerate(self._span_ids)
            ]
        )

    def _rows(self, chunks: torch.Tensor) -> torch.Tensor:
        """`[num_tokens, row_elements]` of whole chunks. Here, for the engine thread has other things to do."""
        num_tokens = SPAN_TOKENS * (chunks.numel() // self._chunk_bytes)
        return chunks.view(self._source.restorer.adapter.dtype).view(num_tokens, -1)

    @property
    def _span_ids(self) -> Sequence[SpanId]:
        first = self.tile.first_span
        return self._source.span_ids[first : first + self.tile.num_spans]

    def place(self, num_spans: int) -> None:
        try:
            pieces = self._pieces[:num_spans]
            if len(pieces) == 1 and len(pieces[0]) > num_spans * SPAN_TOKENS:  # all are in one
                pieces = [pieces[0][: num_spans * SPAN_TOKENS]]
            self._source.placing.place(self.tile, num_spans, pieces)
        finally:
            self._copied = self._source.placing.copied

    def release(self) -> None:
        if self.outcome.done():
            self._source.give_back(self._let_go(), self._copied)
            return
        if not self.outcome.cancel():
            self._source.restorer.let_go(self.outcome)  # it goes on, or hangs: another thread reads in its place
        self.outcome.add_done_callback(self._give_back)

    def _give_back(self, _: Future[ReadOutcome]) -> None:
        """On any thread: nothing was placed."""
        self._let_go()()

    def _let_go(self) -> Callable[[], None]:
        """What gives the memory back. Nothing else of this read refers to it any more: memory that was lent goes with
        the last view of it, and a read may live on until the garbage collector comes."""
        release, self._release, self._pieces = self._release, _nothing, ()
        return release


def _nothing() -> None:
    pass
