"""Two-stage saving (paper section 4.2): a snapshot in the step that produces state, a flush behind its back.

Stage 1, engine thread: rows of the whole ragged batch go into a ring of host memory (`rows_for` and `tap`, once per
layer). Stage 2, background threads (`flusher`): rows are gathered into spans, whole spans are put into the store.
Layers that are saved as K and V are read from the blocks in the step that completes a span. Decode never waits; a step
that prefills may wait for room, bounded. What found no room is dropped and counted, and healed later: read from the
sequence's blocks as `kv` before they are freed, so that a drop never cuts off what follows it.

`--save direct` has no second stage, for comparison: `direct.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from functools import partial

import torch

from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind, ModelGeometry
from mii_hcache.core.identity import SpanId
from mii_hcache.core.plans import StoragePlan
from mii_hcache.runtime.buffers import RowRing
from mii_hcache.runtime.capture import StepCapture, make_capture
from mii_hcache.runtime.cutter import SpanCutter
from mii_hcache.runtime.direct import DirectWriter
from mii_hcache.runtime.flusher import Flusher
from mii_hcache.runtime.healer import Healer
from mii_hcache.runtime.patience import Patience
from mii_hcache.runtime.ports import EngineAdapter
from mii_hcache.runtime.scatter import Scatter
from mii_hcache.runtime.share import WHOLE, Share
from mii_hcache.runtime.sink import SnapshotSink
from mii_hcache.runtime.snapshot import Snapshot
from mii_hcache.runtime.stage import Stage
from mii_hcache.runtime.stats import Counters
from mii_hcache.runtime.streams import Streams, streams_of
from mii_hcache.runtime.track import SequenceTrack
from mii_hcache.storage.base import ChunkStore

_log = logging.getLogger(__name__)

HEAL_WAIT_S = 2.0
"""Longest that healing waits for a buffer; once it waited in vain it waits for no other span of the sequence."""

NO_BOUND = 1 << 20
"""Of buffers for K and V in direct saving: there are as many as one step completes spans."""


@dataclass(frozen=True, kw_only=True)
class StepSegment:
    """One sequence's part of a step, in the order of the batch."""

    uid: int
    token_ids: Sequence[int]


class Saver:
    """Saves the state of live sequences; a `QkvInputTap`. Engine thread only, except `is_pending`,
    `drain` and `num_pending`."""

    def __init__(
        self,
        *,
        adapter: EngineAdapter,
        store: ChunkStore | None,
        plan: StoragePlan | None,
        max_batch_tokens: int,
        counters: Counters,
        save: str = "two-stage",
        save_wait: float = 0.1,
        num_threads: int = 2,
        scatter: Scatter | None = None,
        ring_batches: int = 2,
        is_worth_saving: Callable[[SpanId], bool] = lambda span_id: True,
        streams: Streams | None = None,
        share: Share = WHOLE,
        sink: SnapshotSink | None = None,
    ) -> None:
        """`plan`: what is saved of each span, None for nothing; `is_worth_saving` picks spans (`Sightings`).
        `save`: `two-stage`, or `direct`, which writes within the step and has no ring and no threads (`direct.py`).
        `save_wait`: share of a prefill step that it may wait for room. The ring holds `ring_batches` (>= 2) full ragged
        batches. `num_threads` put spans; `scatter` copies rows, None being the best one here. `streams`: of the
        engine's device, None for those that it has. `share`: what of each span is saved here. `sink`: where it goes,
        whatever `save` and `num_threads` say; None: to `store`."""
        is_direct = save == "direct"
        self.streams = streams_of(adapter.device) if streams is None else streams
        """Of the engine's device."""
        self._adapter = adapter
        self._store = store
        self._plan = plan
        self._counters = counters
        self._is_worth_saving = is_worth_saving
        self._tracks: dict[int, SequenceTrack] = {}
        # Direct: room that a step takes comes back only at its own end, so that waiting for it would be in vain.
        wait_share = 0.0 if is_direct else save_wait
        self._patience = Patience(
            share=wait_share, max_batch_tokens=max_batch_tokens, counters=counters, main=self.streams.main
        )
        self._segments: list[StepSegment] = []
        self._num_tapped = 0
        self._hidden_rows = _hidden_rows(plan)
        self._share = share
        self._sink: SnapshotSink
        if sink is not None:
            self._sink = sink
        elif store is None:
            raise ValueError("a saver needs a store or a sink")
        elif is_direct:
            self._sink = DirectWriter(store=store, counters=counters, scatter=scatter, hidden_rows=self._hidden_rows)
        else:
            self._sink = Flusher(store=store, counters=counters, scatter=scatter, num_threads=num_threads)
        ring_rows = (1 if is_direct else ring_batches) * max_batch_tokens
        stage = None
        if plan is not None and self.streams.has_own_memory:
            num_bytes = stage_bytes(adapter.geometry, plan, len(self._hidden_rows), max_batch_tokens)
            stage = Stage(streams=self.streams, device=adapter.device, num_bytes=num_bytes)
        self._capture = None if not self._hidden_rows else self._make_capture(ring_rows, stage)
        self._cutter: SpanCutter | None = None
        if plan is not None:
            self._cutter = SpanCutter(
                adapter=adapter,
                plan=plan,
                hidden_rows=self._hidden_rows,
                sink=self._sink,
                counters=counters,
                patience=self._patience,
                is_settled=self._is_settled,
                max_kv_buffers=NO_BOUND if is_direct else max(4, ring_rows // SPAN_TOKENS),
                stage=stage,
                share=share,
                name_put=self._name_put,
            )
        self._healer = Healer(
            adapter=adapter,
            counters=counters,
            is_settled=self._is_settled,
            submit=self._submit,
            stage=stage,
            num_ranks=share.num_ranks,
            name_put=self._name_put,
        )

    def _make_capture(self, ring_rows: int, stage: Stage | None) -> StepCapture:
        ring = RowRing(
            num_layers=len(self._hidden_rows),
            capacity_rows=ring_rows,
            row_elements=self._adapter.geometry.row_elements(ChunkKind.HIDDEN),
            dtype=self._adapter.dtype,
        )
        return make_capture(ring, stage=stage, main=self.streams.main)

    @property
    def plan(self) -> StoragePlan | None:
        """What is saved while serving; None when nothing is."""
        return self._plan

    # --- sequences ----------------------------------------------------------------------------------------------

    def open(self, uid: int, *, seed: bytes, token_ids: Sequence[int], left_out: Set[SpanId] = frozenset()) -> None:
        """A sequence starts with `token_ids` in its blocks. Spans of `left_out` are never saved from it."""
        if self._plan is not None:
            self._tracks[uid] = SequenceTrack(uid=uid, seed=seed, token_ids=token_ids, left_out=frozenset(left_out))

    def truncate(self, uid: int, num_tokens: int) -> None:
        """The sequence goes back to its first `num_tokens` tokens."""
        track = self._tracks.get(uid)
        if track is not None and self._cutter is not None:
            self._cutter.discard(track.truncate(num_tokens))

    def heal(self, uid: int, wait_s: float = HEAL_WAIT_S) -> bool:
        """Save whole spans that the store lacks (dropped, evicted, damaged), read from the blocks as `kv`. Call before
        the blocks are freed.

        True when nothing is left to do. False when some span found no buffer within `wait_s`: try again, or `give_up`.
        """
        track = self._tracks.get(uid)
        return track is None or self._healer.heal(track, wait_s)

    def give_up(self, uid: int) -> None:
        """Count the spans of a sequence that were never healed; its next turn will prefill from the first of them."""
        track = self._tracks.get(uid)
        if track is not None:
            self._healer.give_up(track)

    def close(self, uid: int) -> None:
        """The sequence leaves the engine. What was accepted stays; call `heal` first to lose nothing."""
        track = self._tracks.pop(uid, None)
        if track is not None and self._cutter is not None:
            self._cutter.discard(track.close_open_span())

    # --- steps --------------------------------------------------------------------------------------------------

    def begin_step(self, segments: Sequence[StepSegment]) -> None:
        """A ragged batch is about to run: take room for its rows."""
        self._segments = list(segments)
        num_tokens = sum(len(segment.token_ids) for segment in segments)
        is_prefill = num_tokens > len(self._segments)
        self._patience.begin(num_tokens, is_prefill=is_prefill)
        self._num_tapped = 0
        capture = self._capture if self._has_own_rows(segments) else None
        if capture is not None and not self._patience.wait_for(lambda wait_s: capture.begin(num_tokens, wait_s)):
            self._counters.add("dropped_rows_total", num_tokens)
        self._patience.start_clock(is_prefill=is_prefill)

    def _has_own_rows(self, segments: Sequence[StepSegment]) -> bool:
        """Whether a step has hidden rows that this rank saves. Of a step that has none, as many of those that decode a
        few sequences, none is captured. Of one that has some, all are: they leave the device in one copy, and what is
        needed of them lies in as many pieces as layers and spans."""
        if self._share.is_whole:
            return True
        for segment in segments:
            track = self._tracks.get(segment.uid)
            if track is not None:
                start = len(track.token_ids)
                spans = range(start // SPAN_TOKENS, -(-(start + len(segment.token_ids)) // SPAN_TOKENS))
                if any(self._share.has_hidden(span_idx) for span_idx in spans):
                    return True
        return False

    def rows_for(self, layer_idx: int, num_tokens: int) -> torch.Tensor | None:
        """See `QkvInputTap`. None for a layer that is not saved, and for a step without room."""
        capture, row = self._capture, self._hidden_rows.get(layer_idx)
        return None if capture is None or row is None else capture.rows_for(row, num_tokens)

    def tap(self, layer_idx: int, hidden: torch.Tensor) -> None:
        """See `QkvInputTap`."""
        capture, row = self._capture, self._hidden_rows.get(layer_idx)
        if capture is not None and row is not None:
            capture.take(row, hidden)
            self._num_tapped += 1

    def end_step(self) -> None:
        """The batch ran: hand what it left to the background threads, or have it written (`direct`). What cannot be
        saved is dropped, logged and counted; the step's requests go on."""
        segments, self._segments = self._segments, []
        num_tokens = sum(len(segment.token_ids) for segment in segments)
        self._patience.end(num_tokens)
        if self._cutter is not None:
            self._snapshot(self._cutter, segments, num_tokens)

    def abort_step(self) -> None:
        """The batch failed: its rows are garbage, its sequences must be closed."""
        if self._capture is not None:
            self._capture.abort()
        self._segments = []

    def _snapshot(self, cutter: SpanCutter, segments: list[StepSegment], num_tokens: int) -> None:
        snapshot = Snapshot()
        rows = None if self._capture is None else self._take_rows(self._capture, snapshot, num_tokens)
        parts: Sequence[torch.Tensor | None] = [None] * len(segments)
        if rows is not None:
            parts = rows.split_with_sizes([len(segment.token_ids) for segment in segments], 1)
        for segment, own_rows in zip(segments, parts, strict=True):
            track = self._tracks.get(segment.uid)
            if track is not None:
                cutter.cut(snapshot, track, segment.token_ids, own_rows)
        self._submit(snapshot)

    def _take_rows(self, capture: StepCapture, snapshot: Snapshot, num_rows: int) -> torch.Tensor | None:
        """The hidden rows of the whole step, None when they were dropped."""
        if capture.is_taking and self._num_tapped != len(self._hidden_rows):
            # A forward that bypasses the tap leaves rows that nobody wrote.
            _log.error("%d of %d layers were captured; the step is not saved", self._num_tapped, len(self._hidden_rows))
            capture.abort()
            self._counters.add("save_errors_total")
            self._counters.add("dropped_rows_total", num_rows)
        lease, ready = capture.end()
        if lease is None:
            return None
        if ready is not None:
            snapshot.ready.append(ready)
        snapshot.release = partial(capture.ring.release, lease)
        return lease.rows

    def _submit(self, snapshot: Snapshot) -> None:
        if snapshot.is_empty:  # nothing was taken: a hanging store piles up nothing
            return
        self._sink.submit(snapshot)

    def _is_settled(self, track: SequenceTrack, span_idx: int) -> bool:
        """Whether a whole span needs no saving: it is saved, about to be, not worth it, or it was given up."""
        assert self._store is not None
        span_id = track.span_ids[span_idx]
        if span_id in track.left_out or not self._is_worth_saving(span_id):
            return True
        if self._sink.is_pending((span_id,)):  # asked before: what reaches the store in between would be healed
            return True
        found = self._store.find(span_id)
        return found is not None and found.layout.suits(self._share.num_ranks)

    def _name_put(self, track: SequenceTrack, span_idx: int) -> int:
        """By which name several ranks speak of a span that is about to be put; 0 where there is one."""
        return 0

    # --- waiting ------------------------------------------------------------------------------------------------

    def is_pending(self, span_ids: Iterable[SpanId]) -> bool:
        """Whether any of these was accepted and has not reached the store yet."""
        return self._sink.is_pending(span_ids)

    @property
    def num_pending(self) -> int:
        """Spans accepted that have not reached the store yet."""
        return self._sink.num_pending

    def drain(self, timeout_s: float | None = None) -> bool:
        """Wait until everything accepted has reached the store; False when `timeout_s` ran out."""
        return self._sink.drain(timeout_s)

    def stop(self) -> None:
        """Drain and end the background threads. What hangs is left alone, logged and counted (`flusher.STALL_S`)."""
        self._sink.stop()


def stage_bytes(geometry: ModelGeometry, plan: StoragePlan, num_hidden_layers: int, max_batch_tokens: int) -> int:
    """Of a stage where no step waits for what the step before it sends: two full batches of hidden rows and one of K
    and V, and the piece that may be left out at the end of the ring, which also holds a span to be healed."""
    hidden_bytes, kv_bytes = (geometry.row_bytes(kind) for kind in (ChunkKind.HIDDEN, ChunkKind.KV))
    num_kv_layers = max(kinds.count(ChunkKind.KV) for kinds in (plan.kinds, plan.other_kinds or plan.kinds))
    batches = max_batch_tokens * (2 * num_hidden_layers * hidden_bytes + num_kv_layers * kv_bytes)
    return batches + max_batch_tokens * hidden_bytes + SPAN_TOKENS * geometry.num_layers * kv_bytes + (1 << 16)


def _hidden_rows(plan: StoragePlan | None) -> dict[int, int]:
    """Row in the ring and in open spans of each layer that is tapped."""
    if plan is None:
        return {}
    patterns = (plan.kinds, plan.other_kinds or plan.kinds)
    layers = [idx for idx in range(len(plan.kinds)) if any(kinds[idx] is ChunkKind.HIDDEN for kinds in patterns)]
    return {layer_idx: row for row, layer_idx in enumerate(layers)}
