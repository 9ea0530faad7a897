"""Tiles that every rank reads its part of: rank 0's side (paper section 5).

Each rank reads its spans' hidden rows, or its heads' K and V, into its own host memory, all at the same time; what all
have read is placed by an order to all, on the same streams as in one process (`placing.py`). Rank 0 alone knows the
store, and says where chunks lie. A tile that one rank could not read to the end is cut there for all of them: they
place the same spans or none.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from mii_hcache.core.geometry import ChunkKind
from mii_hcache.core.identity import SpanId
from mii_hcache.errors import RankLostError
from mii_hcache.runtime.buffers import as_bytes
from mii_hcache.runtime.gathering import part_bytes, positions_of
from mii_hcache.runtime.peers import Failed, ForgetPart, JoinRestore, OpenRestore, Peers, PlaceTile, ReadPart
from mii_hcache.runtime.ports import KVTarget
from mii_hcache.runtime.share import Share
from mii_hcache.runtime.streams import Event
from mii_hcache.runtime.tiles import Copies, TileRead, TileSource
from mii_hcache.runtime.timeline import RestoreTimeline
from mii_hcache.runtime.work import Tile
from mii_hcache.storage.directions import ChunkWanted, ReadDirections
from mii_hcache.storage.records import ChunkRead, ReadOutcome

if TYPE_CHECKING:
    import torch

    from mii_hcache.runtime.restorer import Restorer

UidOf = Callable[[KVTarget], int]
"""The engine's name of the sequence whose blocks these are."""

_read_ids = itertools.count(1)


def next_read_id() -> int:
    """A name for a read by several ranks that no other one has."""
    return next(_read_ids)


class ShardedTiles(TileSource):
    """Of one restore. `target`, which it is opened for, may be one that reaches all ranks; what is placed here goes to
    the blocks of this rank, as `restorer.adapter` has them. A tile that this rank fails to place is the end of the
    engine (RankLostError): the others wait for it in a gather, and would take the next tile's rows for it."""

    def __init__(
        self,
        restorer: Restorer,
        target: KVTarget,
        span_ids: Sequence[SpanId],
        timeline: RestoreTimeline,
        *,
        uid_of: UidOf,
        peers: Peers,
    ) -> None:
        """Give all but the first four by `functools.partial`: then it is a `restorer.OpenTiles`. The restorer knows
        with whom to gather. Raises HCacheError when a rank is gone."""
        self.restorer = restorer
        self.uid = uid_of(target)
        self.span_ids = span_ids
        self.timeline = timeline
        self.peers = peers
        self.share = Share(rank=0, num_ranks=peers.num_ranks)
        self._copies = Copies(restorer)
        order = OpenRestore(uid=self.uid, tile_spans=restorer.pieces.tile_spans, is_urgent=restorer.is_urgent)
        peers.order(order)
        try:
            self.placing = restorer.placer.open(restorer.adapter.target(self.uid), timeline)
        except BaseException:
            with suppress(RankLostError):
                peers.order(JoinRestore(uid=self.uid))
            raise

    def start(self, tile: Tile) -> TileRead:
        return _ShardedRead(self, tile)

    @property
    def num_held(self) -> int:
        return self._copies.num_held

    def join(self) -> None:
        with suppress(RankLostError):  # the engine is lost, and says so to whoever uses it again
            self.peers.order(JoinRestore(uid=self.uid))
        self.placing.join()

    def give_back(self, buffer: torch.Tensor, copied: Event | None) -> None:
        """A buffer is needed no longer than until `copied`."""
        self._copies.give_back(partial(self.restorer.buffers.release, buffer), copied)


@dataclass(kw_only=True)
class _Part:
    """What one follower reads."""

    positions: range
    directions: ReadDirections
    answer: Future[object]


class _ShardedRead(TileRead):
    def __init__(self, source: ShardedTiles, tile: Tile) -> None:
        restorer = source.restorer
        buffer = restorer.buffers.acquire()
        assert buffer is not None
        self.tile = tile
        self._source = source
        self._buffer = buffer
        self._copied: Event | None = None
        self._read_id = next_read_id()
        self._lock = threading.Lock()
        """Guards what follows."""
        self._asked: list[int] = []
        """Followers that hold, or will hold, a part."""
        self._is_over = False
        try:
            self.outcome = restorer.submit_read(self._read)
        except BaseException:
            restorer.buffers.release(buffer)
            raise

    def _read(self) -> ReadOutcome:
        """On a reader thread: it reads rank 0's part while the others read theirs."""
        self.started_s = started_s = time.perf_counter()
        source, tile = self._source, self.tile
        parts: list[_Part] = []
        try:
            for rank in range(1, source.share.num_ranks):
                part = self._ask(replace(source.share, rank=rank))
                if part is not None:
                    parts.append(part)
            own = positions_of(source.share, tile)
            outcomes = [(own, self._read_own(own))]
            outcomes += [(part.positions, self._answer_of(part)) for part in parts]
        finally:
            for part in parts:
                part.directions.end(ReadOutcome(num_ok=0))  # nothing where it was told how it went
        num_bytes = tile.num_spans * part_bytes(source.share, source.restorer.adapter.geometry, tile.kind)
        source.timeline.add_tile("read", started_s, tile, num_bytes)
        return agreed(tile, outcomes)

    def _wanted(self, share: Share, positions: range) -> list[ChunkWanted]:
        tile, source = self.tile, self._source
        is_hidden = tile.kind is ChunkKind.HIDDEN
        return [
            ChunkWanted(
                span_id=source.span_ids[tile.first_span + position],
                layer_idx=tile.layer_idx,
                num_bytes=part_bytes(share, source.restorer.adapter.geometry, tile.kind),
                kind=tile.kind,
                shard=0 if is_hidden else share.rank,
                num_shards=1 if is_hidden else share.num_ranks,
            )
            for position in positions
        ]

    def _ask(self, share: Share) -> _Part | None:
        """Have a follower read its part; None when it has none, or nobody waits for it any more."""
        source, positions = self._source, positions_of(share, self.tile)
        if not positions:
            return None
        directions = source.restorer.store.directions(self._wanted(share, positions))
        assert directions is not None, "other processes cannot read this store"
        with self._lock:
            if self._is_over:
                directions.end(ReadOutcome(num_ok=0))
                return None
            self._asked.append(share.rank)
            answer = source.peers.ask(share.rank, ReadPart(read_id=self._read_id, slots=directions.slots))
        return _Part(positions=positions, directions=directions, answer=answer)

    def _read_own(self, positions: range) -> ReadOutcome:
        view, share = as_bytes(self._buffer), self._source.share
        size = part_bytes(share, self._source.restorer.adapter.geometry, self.tile.kind)
        reads = [
            ChunkRead(
                span_id=one.span_id,
                layer_idx=one.layer_idx,
                out=view[idx * size : (idx + 1) * size],
                kind=one.kind,
                shard=one.shard,
                num_shards=one.num_shards,
            )
            for idx, one in enumerate(self._wanted(share, positions))
        ]
        restorer = self._source.restorer
        outcome = restorer.store.get_into(reads) if reads else ReadOutcome(num_ok=0)
        restorer.counters.add("shard_read_bytes_total", size * outcome.num_ok)
        return outcome

    def _answer_of(self, part: _Part) -> ReadOutcome:
        """How a follower fared, of which its store is told. Blocks."""
        answer = part.answer.result()
        if isinstance(answer, Failed):
            self._source.restorer.counters.add("restore_errors_total")
            answer = ReadOutcome(num_ok=0, reason="unavailable")
            part.directions.end(ReadOutcome(num_ok=0))
        assert isinstance(answer, ReadOutcome)
        part.directions.end(answer)
        if answer.reason is None and answer.num_ok < len(part.positions):
            return replace(answer, reason=part.directions.reason or "missing")
        return answer

    def place(self, num_spans: int) -> None:
        source, tile = self._source, replace(self.tile, num_spans=num_spans)
        with self._lock:
            self._is_over = True
        source.peers.order(
            PlaceTile(
                read_id=self._read_id,
                uid=source.uid,
                layer_idx=tile.layer_idx,
                first_span=tile.first_span,
                num_spans=num_spans,
                kind=tile.kind,
            )
        )
        try:
            source.placing.place_buffer(tile, self._buffer, num_spans)
        except Exception as error:  # the others gather this tile: with whatever this rank gathered next
            raise RankLostError(f"rank 0 failed to place a tile that the others place: {error}") from error
        finally:
            self._copied = source.placing.copied

    def release(self) -> None:
        with self._lock:
            was_over, self._is_over = self._is_over, True
            asked = [] if was_over else self._asked
        for rank in asked:
            self._source.peers.ask(rank, ForgetPart(read_id=self._read_id))
        if self.outcome.done():
            self._source.give_back(self._buffer, self._copied)
            return
        if not self.outcome.cancel():
            self._source.restorer.let_go(self.outcome)  # it goes on, or hangs: another thread reads in its place
        self.outcome.add_done_callback(partial(self._give_back, self._buffer))

    def _give_back(self, buffer: torch.Tensor, _: Future[ReadOutcome]) -> None:
        """On any thread: nothing was placed."""
        self._source.restorer.buffers.release(buffer)


def agreed(tile: Tile, outcomes: Sequence[tuple[range, ReadOutcome]]) -> ReadOutcome:
    """How many leading spans of a tile all ranks have read. `outcomes`: of each rank, which spans it was to read and
    how far it got."""
    num_ok, reason = tile.num_spans, None
    for positions, outcome in outcomes:
        if outcome.num_ok < len(positions) and positions[outcome.num_ok] < num_ok:
            num_ok, reason = positions[outcome.num_ok], outcome.reason or "missing"
    return ReadOutcome(num_ok=num_ok, reason=reason)
