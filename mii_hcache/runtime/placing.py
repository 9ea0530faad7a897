"""The device's half of a restore: tiles in host memory become K and V in blocks, on streams beside the engine's own.

    load      copy tile 0 to slot 0 │ copy tile 1 to slot 1 │ wait for main, K and V of tile 2 to their blocks │ ...
    compute   wait for main, tile 0 ┴ project, write blocks, free slot 0 │ ...
    main      the engine's forwards, and fills ······························· wait for both, then use the blocks

Where several ranks hold a model, a slot has the spans that this rank has read, and `compute` gathers those of all ranks
before it projects (`gathering.py`): all ranks place the same tiles in the same order, so their gathers meet.

Who waits for whom:

- Before they first write a restore's blocks, `load` and `compute` wait for what `main` had been given when it was
  opened: the blocks may have been another sequence's a moment ago, and tables of its target are written there.
- A projection, or a gather, waits for its tile's copy; the copy into a slot of the ring waits for the one that used it
  last. What is gathered needs no ring: `compute` alone writes and reads it.
- However a restore ends, `main` waits for its last copy and its last projection before anything else is launched there
  (`join`): what is in the blocks may be used then, or the blocks may be given to somebody else.
- Fills run on `main` while tiles come and wait for none: by plan (`work.plan_fills`) they write other cells, and attend
  only to what earlier fills wrote. Forwards of other sequences touch other blocks.
- Host memory is copied from until the event that `Placing.copied` gives: of buffers that are read into, or of the
  store's own, that it lends.

Memory that two streams touch is never the caching allocator's to hand out in between: the ring lives as long as the
`Placer`, as does what is gathered; a target's tensors are allocated on `main`, outlive `join`, and so are handed out
again only behind it; what a projection allocates stays on `compute`.

Tested on a fake device where everything comes late (`tests/runtime/test_restore_races.py`, `test_rank_races.py`
beside it); never run on a GPU yet.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind
from mii_hcache.runtime.gathering import Gathering, num_own_spans, part_bytes
from mii_hcache.runtime.lent_rows import LentRows
from mii_hcache.runtime.ports import EngineAdapter, KVTarget
from mii_hcache.runtime.share import WHOLE
from mii_hcache.runtime.streams import Event, Stream, Streams
from mii_hcache.runtime.timeline import RestoreTimeline
from mii_hcache.runtime.work import Tile

RING_SLOTS = 4
"""Tiles of hidden states on the device, copied and not yet projected: one is copied while one is projected, and two
more for whoever is late."""


class Placing(ABC):
    """One restore's tiles on their way into its blocks. Engine thread only; never waits for the device."""

    def __init__(
        self,
        adapter: EngineAdapter,
        target: KVTarget,
        timeline: RestoreTimeline,
        gathering: Gathering | None,
    ) -> None:
        self._geometry = adapter.geometry
        self._dtype = adapter.dtype
        self._gathering = gathering
        self._share = WHOLE if gathering is None else gathering.share
        self._target = target
        self._timeline = timeline

    def place(self, tile: Tile, num_spans: int, pieces: Sequence[torch.Tensor]) -> None:
        """Launch what brings the first `num_spans` spans of a tile into the blocks. `pieces`: this rank's rows of them
        in host memory, all in one piece or a span in each: `[num_rows, row_elements]`, contiguous, the engine's dtype;
        of hidden states that are gathered one piece, as long as any rank's. They must stay as they are until `copied`.
        """
        start, num_tokens = tile.first_span * SPAN_TOKENS, num_spans * SPAN_TOKENS
        if tile.kind is ChunkKind.HIDDEN:
            self._project(tile, start, num_tokens, pieces)
        else:
            row_shape = 2, self._geometry.shard_kv_heads(self._share.num_ranks), self._geometry.head_size
            self._write(tile, start, _shaped(pieces, row_shape))

    def place_buffer(self, tile: Tile, buffer: torch.Tensor, num_spans: int) -> None:
        """`place` of what lies in a host buffer, `[num_bytes]`, uint8: this rank's chunks of the tile, one after the
        other, with room for as many as any rank has."""
        num_chunks = num_own_spans(self._share, num_spans) if tile.kind is ChunkKind.HIDDEN else num_spans
        rows = buffer[: num_chunks * part_bytes(self._share, self._geometry, tile.kind)].view(self._dtype)
        self.place(tile, num_spans, [rows.view(num_chunks * SPAN_TOKENS, -1)])

    @abstractmethod
    def _project(self, tile: Tile, start: int, num_tokens: int, own: Sequence[torch.Tensor]) -> None:
        """`own`: the rows of the spans that this rank has."""

    @abstractmethod
    def _write(self, tile: Tile, start: int, kv: Sequence[torch.Tensor]) -> None: ...

    @property
    @abstractmethod
    def copied(self) -> Event | None:
        """After it, host memory of everything placed so far is not read any more; None: it is not read now. Right also
        after `place` has raised."""

    @abstractmethod
    def join(self) -> None:
        """What was placed comes before whatever is launched on `main` from now on."""


class Placer:
    """The streams and the ring that restores on one engine share. Engine thread only."""

    def __init__(
        self,
        adapter: EngineAdapter,
        streams: Streams,
        *,
        tile_spans: int,
        is_urgent: bool,
        num_slots: int = RING_SLOTS,
        gathering: Gathering | None = None,
    ) -> None:
        """`tile_spans`: most spans of a tile. `is_urgent`: restores before the engine's forwards, where the device can
        choose; else neither comes first. `gathering`: with whom tiles are read, None: by this process alone."""
        self._adapter = adapter
        self.streams = streams
        self.tile_spans = tile_spans
        self.gathering = gathering
        if not streams.has_own_memory:
            return
        self.load = streams.new(is_urgent=is_urgent)
        self.compute = streams.new(is_urgent=is_urgent)
        share = WHOLE if gathering is None else gathering.share
        slot_bytes = num_own_spans(share, tile_spans) * adapter.geometry.chunk_bytes(ChunkKind.HIDDEN)
        self._slots = [
            _Slot(memory=torch.empty(slot_bytes, dtype=torch.uint8, device=adapter.device)) for _ in range(num_slots)
        ]
        self._turn = 0
        self._joint: list[torch.Tensor] = []
        """As gathered, and in order."""
        if gathering is not None:
            num_rows = gathering.num_gathered(tile_spans * SPAN_TOKENS)
            shape = (num_rows, adapter.geometry.hidden_size)
            self._joint = [torch.empty(shape, dtype=adapter.dtype, device=adapter.device) for _ in range(2)]
        self.load.wait(streams.main.record())  # whoever had this memory before may still use it there

    def open(self, target: KVTarget, timeline: RestoreTimeline) -> Placing:
        """For one restore into `target`, whose blocks are its own from now on. Work is noted in `timeline`."""
        if not self.streams.has_own_memory:
            return _HostPlacing(self._adapter, target, timeline, self)
        return _StreamPlacing(self._adapter, target, timeline, self)

    def next_slot(self) -> _Slot:
        """Whose turn it is."""
        slot = self._slots[self._turn]
        self._turn = (self._turn + 1) % len(self._slots)
        return slot

    def joint_memory(self, num_tokens: int) -> list[torch.Tensor]:
        """Room for the rows that are gathered for a tile of so many tokens, and for them in order. One tile's on
        `compute`, until the next one's there."""
        assert self.gathering is not None
        return [memory[: self.gathering.num_gathered(num_tokens)] for memory in self._joint]


@dataclass(kw_only=True)
class _Slot:
    """Room for one tile of hidden states on the device."""

    memory: torch.Tensor
    free: Event | None = None
    """After it nothing reads the memory; None: nothing ever did."""


class _HostPlacing(Placing):
    """The engine computes where the bytes are: all is done when a call returns."""

    copied = None

    def __init__(self, adapter: EngineAdapter, target: KVTarget, timeline: RestoreTimeline, placer: Placer) -> None:
        super().__init__(adapter, target, timeline, placer.gathering)
        self._main = placer.streams.main

    def _project(self, tile: Tile, start: int, num_tokens: int, own: Sequence[torch.Tensor]) -> None:
        began = self._main.record(is_timed=True)
        if self._gathering is not None:
            (rows,) = own
            gathered = rows.new_empty(self._gathering.num_gathered(num_tokens), rows.shape[1])
            ordered = torch.empty_like(gathered)
            self._gathering.launch(self._main, rows, tile.first_span, gathered, ordered)
            own = [ordered[:num_tokens]]
        for rows in own:
            self._target.project_hidden(tile.layer_idx, start, rows)
            start += len(rows)
        self._timeline.add_tile_work("project", began, self._main.record(is_timed=True), tile, _num_bytes(own))

    def _write(self, tile: Tile, start: int, kv: Sequence[torch.Tensor]) -> None:
        began = self._main.record(is_timed=True)
        for rows in kv:
            self._target.write_kv(tile.layer_idx, start, rows, self._main)
            start += len(rows)
        self._timeline.add_tile_work("place", began, self._main.record(is_timed=True), tile, _num_bytes(kv))

    def join(self) -> None:
        pass


class _StreamPlacing(Placing):
    """The engine has a device."""

    def __init__(self, adapter: EngineAdapter, target: KVTarget, timeline: RestoreTimeline, placer: Placer) -> None:
        super().__init__(adapter, target, timeline, placer.gathering)
        self._placer = placer
        self._main, self._load, self._compute = placer.streams.main, placer.load, placer.compute
        target.prepare()
        self._begun = self._main.record()
        self._has_waited: set[Stream] = set()
        self._copied: Event | None = None
        self._projected: Event | None = None
        """The last copy and the last projection; None: there are none, or `main` waits for them already."""

    @property
    def copied(self) -> Event | None:
        return self._copied

    def _after_main(self, stream: Stream) -> Stream:
        if stream not in self._has_waited:
            stream.wait(self._begun)
            self._has_waited.add(stream)
        return stream

    def _project(self, tile: Tile, start: int, num_tokens: int, own: Sequence[torch.Tensor]) -> None:
        load, compute = self._load, self._after_main(self._compute)
        slot = self._placer.next_slot()
        num_bytes = _num_bytes(own)
        staged = slot.memory[:num_bytes].view(self._dtype).view(-1, self._geometry.hidden_size)
        if slot.free is not None:
            load.wait(slot.free)
        began = load.record(is_timed=True)
        try:
            load.copy_joined(staged, own)
        finally:
            copied = self._copied = load.record(is_timed=True)
        self._timeline.add_tile_work("load", began, copied, tile, num_bytes)
        compute.wait(copied)
        began = compute.record(is_timed=True)
        hidden = staged
        try:
            if self._gathering is not None:
                gathered, ordered = self._placer.joint_memory(num_tokens)
                self._gathering.launch(compute, staged, tile.first_span, gathered, ordered)
                hidden = ordered[:num_tokens]
            compute.launch(partial(self._target.project_hidden, tile.layer_idx, start, hidden))
        finally:
            projected = slot.free = self._projected = compute.record(is_timed=True)
        self._timeline.add_tile_work("project", began, projected, tile, num_bytes)

    def _write(self, tile: Tile, start: int, kv: Sequence[torch.Tensor]) -> None:
        load = self._after_main(self._load)
        began = load.record(is_timed=True)
        try:
            if len(kv) == 1:
                self._target.write_kv(tile.layer_idx, start, kv[0], load)
            else:  # in one call all the same: a target looks through all its blocks in each
                copies = _CopiesOfPieces(kv)
                self._target.write_kv(tile.layer_idx, start, copies.whole, copies)
                for target, pieces in copies.joined:
                    load.copy_joined(target, pieces)
                load.copy_many(copies.pairs)
        finally:
            copied = self._copied = load.record(is_timed=True)
        self._timeline.add_tile_work("load", began, copied, tile, _num_bytes(kv))

    def join(self) -> None:
        if self._copied is not None:
            self._main.wait(self._copied)
        if self._projected is not None:
            self._main.wait(self._projected)


class _CopiesOfPieces(Stream):
    """For one `KVTarget.write_kv`, which launches copies and nothing else: makes those from a tile that is nowhere as a
    whole into copies from its pieces, a span in each."""

    def __init__(self, pieces: Sequence[torch.Tensor]) -> None:
        self._pieces = pieces
        first = pieces[0]
        self.whole = torch.empty(
            len(pieces) * SPAN_TOKENS, *first.shape[1:], dtype=first.dtype, device=torch.device("meta")
        )
        """What the target is given: a shape without memory."""
        self._storage = self.whole.untyped_storage()._cdata
        self.joined: list[tuple[torch.Tensor, Sequence[torch.Tensor]]] = []
        """Whole pieces behind each other: all there are where a block is as long as a span."""
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        is_of_it = source.untyped_storage()._cdata == self._storage and source.is_contiguous()
        assert is_of_it and source.shape[1:] == self.whole.shape[1:] == target.shape[1:], (
            "write_kv copies rows as they are"
        )
        first, num_rows = source.storage_offset() // self.whole.stride(0), source.shape[0]
        if first % SPAN_TOKENS == num_rows % SPAN_TOKENS == 0 and target.is_contiguous():
            self.joined.append((target, self._pieces[first // SPAN_TOKENS : (first + num_rows) // SPAN_TOKENS]))
            return
        at = 0
        while at < num_rows:
            idx, row = divmod(first + at, SPAN_TOKENS)
            count = min(SPAN_TOKENS - row, num_rows - at)
            self.pairs.append((_rows_of(target, at, count), _rows_of(self._pieces[idx], row, count)))
            at += count

    def launch(self, work: Callable[[], None]) -> None:
        raise AssertionError("write_kv launches copies only")

    def record(self, *, is_timed: bool = False) -> Event:
        raise AssertionError("write_kv launches copies only")

    def wait(self, event: Event) -> None:
        raise AssertionError("write_kv launches copies only")


def _rows_of(tensor: torch.Tensor, start: int, num_rows: int) -> torch.Tensor:
    """Without a new view of all of it, which takes as long as a copy's launch."""
    return tensor if num_rows == tensor.shape[0] else tensor[start : start + num_rows]


def _shaped(pieces: Sequence[torch.Tensor], row_shape: tuple[int, ...]) -> Sequence[torch.Tensor]:
    if isinstance(pieces, LentRows):
        return pieces.shaped(SPAN_TOKENS, *row_shape)
    return [rows.view(rows.shape[0], *row_shape) for rows in pieces]


def _num_bytes(pieces: Sequence[torch.Tensor]) -> int:
    return pieces.nbytes if isinstance(pieces, LentRows) else sum(rows.nbytes for rows in pieces)
