"""Tiles on a rank that follows: it reads its parts of them when it is asked to, and places them when it is told to."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from mii_hcache.core.geometry import ChunkKind
from mii_hcache.runtime.buffers import SpanBuffers, as_bytes, host_empty
from mii_hcache.runtime.gathering import Gathering, gather_now, place_now, positions_of, rubbish
from mii_hcache.runtime.held_memory import HeldMemory
from mii_hcache.runtime.parts import Reply
from mii_hcache.runtime.peers import Failed, GatherRubbish, JoinRestore, OpenRestore, PlaceRubbish, PlaceTile, ReadPart
from mii_hcache.runtime.placing import Placer, Placing
from mii_hcache.runtime.ports import EngineAdapter
from mii_hcache.runtime.stats import Counters
from mii_hcache.runtime.streams import Streams, streams_of
from mii_hcache.runtime.timeline import RestoreTimeline
from mii_hcache.runtime.work import Tile
from mii_hcache.storage.records import ReadOutcome
from mii_hcache.storage.slot_files import SlotFiles
from mii_hcache.storage.workers import Workers

_log = logging.getLogger(__name__)

NUM_READERS = 3


@dataclass(eq=False, kw_only=True)
class _Part:
    buffer: torch.Tensor
    pool: SpanBuffers
    ended: Future[ReadOutcome]
    job: Future[None] | None = None
    """Reads it, from when it was submitted on."""
    is_forgotten: bool = False

    def release(self) -> None:
        self.pool.release(self.buffer)


class FollowingTiles:
    """Reads this rank's parts of tiles, and places them. `read` and `forget`: any thread; the rest: engine thread."""

    def __init__(
        self,
        *,
        adapter: EngineAdapter,
        gathering: Gathering,
        files: SlotFiles,
        counters: Counters,
        streams: Streams | None = None,
    ) -> None:
        """`streams`: the device's, None for torch's."""
        self._adapter = adapter
        self._gathering = gathering
        self._share = gathering.share
        self._files = files
        self._counters = counters
        self._streams = streams or streams_of(adapter.device)
        self._placer: Placer | None = None
        self._placings: dict[int, Placing] = {}
        """By uid, of restores that are open."""
        self._held = HeldMemory()
        self._nothing: torch.Tensor | None = None
        self._readers = Workers(NUM_READERS, "hcache-read")
        self._lock = threading.Lock()
        """Guards what follows."""
        self._parts: dict[int, _Part] = {}
        self._pools: dict[int, SpanBuffers] = {}

    def read(self, question: ReadPart, reply: Reply) -> None:
        """`reply` says how far it got."""
        sizes = [slot.header.num_bytes for slot in question.slots]
        pool = self._pool(sum(sizes) + max(sizes, default=0))  # some ranks have one chunk more, which all must hold
        buffer = pool.acquire()
        assert buffer is not None
        view, start = as_bytes(buffer), 0
        outs = []
        for size in sizes:
            outs.append(view[start : start + size])
            start += size
        part = _Part(buffer=buffer, pool=pool, ended=Future())
        with self._lock:
            self._parts[question.read_id] = part

        def work() -> None:
            try:
                is_wanted = not part.is_forgotten
                outcome = self._files.read(question.slots, outs) if is_wanted else ReadOutcome(num_ok=0)
                self._counters.add("shard_read_bytes_total", sum(sizes[: outcome.num_ok]))
            except Exception as error:
                _log.exception("this rank's part of a tile could not be read")
                part.ended.set_result(ReadOutcome(num_ok=0))
                reply(Failed(what=str(error)))
                return
            part.ended.set_result(outcome)
            reply(outcome)

        part.job = self._readers.submit(work)

    def forget(self, read_id: int) -> None:
        """The tile will not be placed; its memory comes back when the read has ended. One that hangs holds up no other:
        another thread takes the place of its own."""
        with self._lock:
            part = self._parts.pop(read_id, None)
        if part is not None:
            part.is_forgotten = True
            if part.job is not None:
                self._readers.replace(part.job)
            part.ended.add_done_callback(lambda _: part.release())

    def place(self, order: PlaceTile) -> None:
        """Raises what the engine raises, and RuntimeError for a tile that this rank has not read."""
        tile = Tile(layer_idx=order.layer_idx, first_span=order.first_span, num_spans=order.num_spans, kind=order.kind)
        with self._lock:
            part = self._parts.pop(order.read_id, None)
        if part is not None and not part.ended.done():
            raise RuntimeError(f"tile {order.read_id} is placed before it was read")
        num_own = len(positions_of(self._share, tile))
        if part is None and num_own:
            raise RuntimeError(f"tile {order.read_id} was never read")
        placing = self._placings[order.uid]
        try:
            placing.place_buffer(tile, self._no_rows() if part is None else part.buffer, tile.num_spans)
        finally:
            if part is not None:
                self._held.give_back(part.release, placing.copied)

    def open(self, order: OpenRestore) -> None:
        """A restore begins."""
        if self._placer is None or self._placer.tile_spans < order.tile_spans:
            self._placer = Placer(
                self._adapter,
                self._streams,
                tile_spans=order.tile_spans,
                is_urgent=order.is_urgent,
                gathering=self._gathering,
            )
        self._placings[order.uid] = self._placer.open(self._adapter.target(order.uid), RestoreTimeline())

    def join(self, order: JoinRestore) -> None:
        """It is over."""
        self._placings.pop(order.uid).join()

    def collect(self) -> None:
        """Take back the memory that the device has copied. Does not block; to be called now and then."""
        self._held.collect()

    def _no_rows(self) -> torch.Tensor:
        """For a short tile none of whose spans is this rank's, which takes part in the gather all the same: a chunk of
        nothing. Never written again, so nobody need wait for who copies from it."""
        if self._nothing is None:
            self._nothing = host_empty(self._adapter.geometry.chunk_bytes(ChunkKind.HIDDEN), dtype=torch.uint8).zero_()
        return self._nothing

    def place_rubbish(self, order: PlaceRubbish) -> None:
        """For measuring."""
        tile = Tile(layer_idx=order.layer_idx, first_span=0, num_spans=order.num_spans, kind=order.kind)
        buffer = rubbish(self._share, self._adapter.geometry, order.num_spans)
        place_now(self._adapter, self._adapter.target(order.uid), self._gathering, tile, buffer)

    def gather_rubbish(self, order: GatherRubbish) -> None:
        """For measuring."""
        buffer = rubbish(self._share, self._adapter.geometry, order.num_spans)
        gather_now(self._adapter, self._gathering, order.num_spans, buffer)

    def stop(self) -> None:
        """End the threads; memory that the device copies from is left to it until it is done."""
        self._readers.close(2.0)
        self._held.stop()

    @property
    def num_held(self) -> int:
        """Tiles that were read, or are being read, and neither placed nor forgotten, or that are copied from."""
        return len(self._parts) + len(self._held)

    def _pool(self, num_bytes: int) -> SpanBuffers:
        """Of buffers of at least so many bytes, in a few sizes."""
        size = 1 << max(12, (num_bytes - 1).bit_length())
        with self._lock:
            if size not in self._pools:
                self._pools[size] = SpanBuffers(shape=(size,), dtype=torch.uint8, max_buffers=1 << 20)
            return self._pools[size]
