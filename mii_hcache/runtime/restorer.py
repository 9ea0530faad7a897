"""Brings a context's K and V back, layer by layer, in slices between engine steps (paper sections 3.1 and 4.1).

A few reader threads keep the next tiles in flight while the engine thread projects the current one. Work is ordered by
(layer, tile): a tile is a run of spans of one kind. Tokens count as present only after every layer of every span has
arrived and been verified; damage cuts the restored prefix at its span, and the rest is prefilled.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field
from functools import partial

import torch

from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind
from mii_hcache.runtime.buffers import SpanBuffers, as_bytes
from mii_hcache.runtime.ports import EngineAdapter, KVTarget
from mii_hcache.runtime.stats import Counters
from mii_hcache.storage.base import ChunkRead, ChunkStore, ReadOutcome, SpanRecord

MAX_TILE_SPANS = 8
"""Longest tile: 512 tokens."""
READ_AHEAD = 3
"""Tiles read or being read ahead of the one that is projected."""


@dataclass(frozen=True, kw_only=True)
class _Tile:
    """Consecutive spans of one kind, for one layer."""

    layer_idx: int
    first_span: int
    num_spans: int
    kind: ChunkKind

    @property
    def is_stored(self) -> bool:
        """False for layer 0 of hidden spans, which comes from token ids."""
        return not (self.kind is ChunkKind.HIDDEN and self.layer_idx == 0)


@dataclass(kw_only=True)
class _Read:
    tile: _Tile
    buffer: torch.Tensor | None = None
    outcome: Future[ReadOutcome] | None = None


@dataclass(kw_only=True)
class RestoreOutcome:
    """What a restore brought back."""

    num_tokens: int = 0
    kinds: list[str] = field(default_factory=list)
    tiers: list[str] = field(default_factory=list)
    cut_reason: str | None = None
    """`corrupt` or `missing` when the prefix was cut short."""
    read_bytes: int = 0


class Restore:
    """One context being restored. Engine thread only: call `step` until it returns the outcome, or `cancel`."""

    def __init__(
        self,
        restorer: Restorer,
        target: KVTarget,
        records: Sequence[SpanRecord],
        token_ids: Sequence[int],
    ) -> None:
        num_tokens = len(records) * SPAN_TOKENS
        if len(token_ids) < num_tokens:
            raise ValueError(f"{len(token_ids)} token ids for {len(records)} spans")
        self._restorer = restorer
        self._target = target
        self._records = list(records)
        self._token_ids = torch.tensor(token_ids[:num_tokens], dtype=torch.int64)
        self._num_spans = len(records)
        self._tiles = self._plan_tiles()
        self._reads: deque[_Read] = deque()
        self._span_ids = [record.span_id for record in records]
        self._is_open = True
        store = restorer.store
        self._tiers = [store.tier_of(span_id) or store.name for span_id in self._span_ids]
        self.outcome = RestoreOutcome()
        store.touch(self._span_ids)
        store.pin(self._span_ids)

    def step(self, budget_s: float, *, wait: bool) -> RestoreOutcome | None:
        """Work for about `budget_s` (a tile at least, when one has arrived). The outcome when done, else None.

        `wait` False returns at once when the next tile's read is still in flight, so that others may decode; True waits
        for it, for what is left of `budget_s`.
        """
        if not self._is_open:
            raise RuntimeError("this restore is over")
        started_s = time.perf_counter()
        left_s = budget_s
        try:
            while self._is_ready(left_s if wait else 0.0):
                if not self._advance():
                    self._finish()
                    return self.outcome
                left_s = budget_s - (time.perf_counter() - started_s)
                if left_s <= 0:
                    return None
            return None
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Give buffers and pins back; the target holds nothing valid. Idempotent. Does not block: a buffer that is
        still read into is given back when that read ends."""
        if not self._is_open:
            return
        self._is_open = False
        while self._reads:
            read = self._reads.popleft()
            if read.outcome is not None:
                read.outcome.cancel()
                read.outcome.add_done_callback(partial(self._give_back, read))
        self._restorer.store.unpin(self._span_ids)

    def _finish(self) -> None:
        self.cancel()
        if self.outcome.cut_reason == "corrupt":
            # What follows has not been read to the end and will be prefilled now: let it be saved anew.
            self._restorer.store.delete(self._span_ids[self._num_spans :])
        self.outcome.num_tokens = self._num_spans * SPAN_TOKENS
        self.outcome.kinds = sorted({record.kind.value for record in self._records[: self._num_spans]})
        self.outcome.tiers = sorted(set(self._tiers[: self._num_spans]))
        self._target.commit(self.outcome.num_tokens)

    def _plan_tiles(self) -> Iterator[_Tile]:
        size = self._restorer.tile_spans
        for layer_idx in range(self._restorer.adapter.geometry.num_layers):
            first = 0
            while first < self._num_spans:
                kind = self._records[first].kind
                last = first + 1
                while last < min(first + size, self._num_spans) and self._records[last].kind is kind:
                    last += 1
                yield _Tile(layer_idx=layer_idx, first_span=first, num_spans=last - first, kind=kind)
                first = last

    def _read_ahead(self) -> None:
        while len(self._reads) < READ_AHEAD and (tile := next(self._tiles, None)) is not None:
            self._reads.append(self._start_read(tile))

    def _is_ready(self, wait_s: float = 0.0) -> bool:
        """Whether the next tile can be worked on (or none is left), after waiting for it for up to `wait_s`."""
        self._read_ahead()
        outcome = self._reads[0].outcome if self._reads else None
        if outcome is None:
            return True
        if wait_s > 0 and not outcome.done():
            wait_for([outcome], timeout=min(wait_s, threading.TIMEOUT_MAX))
        return outcome.done()

    def _advance(self) -> bool:
        """Finish one tile, whose read has ended. False when none is left."""
        if not self._reads:
            return False
        read = self._reads.popleft()
        try:
            num_spans = self._await_spans(read)
            if num_spans > 0:
                self._write(read, num_spans)
        finally:
            self._give_back(read)
        return True

    def _start_read(self, tile: _Tile) -> _Read:
        if not tile.is_stored:
            return _Read(tile=tile)
        restorer = self._restorer
        buffer = restorer.buffers.acquire()
        assert buffer is not None
        chunk_bytes = restorer.adapter.geometry.chunk_bytes(tile.kind)
        view = as_bytes(buffer)
        reads = [
            ChunkRead(
                span_id=self._span_ids[tile.first_span + idx],
                layer_idx=tile.layer_idx,
                out=view[idx * chunk_bytes : (idx + 1) * chunk_bytes],
                kind=tile.kind,
            )
            for idx in range(tile.num_spans)
        ]
        return _Read(tile=tile, buffer=buffer, outcome=restorer.submit_read(reads))

    def _await_spans(self, read: _Read) -> int:
        """Spans of the tile that may be written; cuts the prefix when some did not arrive."""
        tile = read.tile
        if read.outcome is not None:
            outcome = read.outcome.result()
            first_bad = tile.first_span + outcome.num_ok
            if outcome.num_ok < tile.num_spans and first_bad < self._num_spans:
                self._num_spans = first_bad
                self.outcome.cut_reason = outcome.reason
                self._restorer.counters.add("restore_cuts_total")
        return min(tile.num_spans, self._num_spans - tile.first_span)

    def _write(self, read: _Read, num_spans: int) -> None:
        tile = read.tile
        adapter = self._restorer.adapter
        start = tile.first_span * SPAN_TOKENS
        num_tokens = num_spans * SPAN_TOKENS
        if read.buffer is None:
            self._target.recompute_first_layer(start, self._token_ids[start : start + num_tokens])
            return
        geometry = adapter.geometry
        num_bytes = num_spans * geometry.chunk_bytes(tile.kind)
        self.outcome.read_bytes += num_bytes
        rows = read.buffer[:num_bytes].view(adapter.dtype).view(num_tokens, -1).to(adapter.device, non_blocking=True)
        if tile.kind is ChunkKind.HIDDEN:
            self._target.project_hidden(tile.layer_idx, start, rows)
        else:
            kv = rows.view(num_tokens, 2, geometry.num_kv_heads, geometry.head_size)
            self._target.write_kv(tile.layer_idx, start, kv)
        if adapter.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # the host buffer is reused as soon as this returns

    def _give_back(self, read: _Read, _: Future[ReadOutcome] | None = None) -> None:
        if read.buffer is not None:
            self._restorer.buffers.release(read.buffer)
            read.buffer = None


class Restorer:
    """Starts restores and owns what they share: the reader threads and the host buffers."""

    def __init__(
        self, *, adapter: EngineAdapter, store: ChunkStore, counters: Counters, tile_spans: int = MAX_TILE_SPANS
    ) -> None:
        self.adapter = adapter
        self.store = store
        self.counters = counters
        self.tile_spans = tile_spans
        """Spans per tile; the smaller, the finer the slices."""
        largest = max(adapter.geometry.chunk_bytes(kind) for kind in ChunkKind)
        self.buffers = SpanBuffers(shape=(tile_spans * largest,), dtype=torch.uint8, max_buffers=1 << 20)
        self._reader = ThreadPoolExecutor(max_workers=READ_AHEAD, thread_name_prefix="hcache-read")

    def start(self, target: KVTarget, records: Sequence[SpanRecord], token_ids: Sequence[int]) -> Restore:
        """Restore the spans of `records` (a prefix of the chain, in order) into `target`, whose blocks are reserved.

        token_ids: at least the ids of those spans. Raises ValueError when there are fewer."""
        return Restore(self, target, records, token_ids)

    def submit_read(self, reads: list[ChunkRead]) -> Future[ReadOutcome]:
        """Read in the background."""
        return self._reader.submit(self.store.get_into, reads)

    def stop(self) -> None:
        """End the reader threads; no restore may be running."""
        self._reader.shutdown()
