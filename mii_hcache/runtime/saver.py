"""Two-stage saving (paper section 4.2): a snapshot in the step that produces state, a flush behind its back.

Stage 1, engine thread: rows of the whole ragged batch go into a ring of host memory (`tap`, once per layer). Stage 2,
background threads (`flusher`): rows are gathered into spans, whole spans are put into the store. Layers that are saved
as K and V are read from the blocks in the step that completes a span. Decode never waits; a step that prefills may wait
for room, bounded. What found no room is dropped and counted, and healed later: read from the sequence's blocks as `kv`
before they are freed, so that a drop never cuts off what follows it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind
from mii_hcache.core.identity import SpanId
from mii_hcache.core.layout import SpanLayout
from mii_hcache.core.plans import StoragePlan
from mii_hcache.runtime.block_reader import BlockReader
from mii_hcache.runtime.buffers import RowRing, SpanBuffers
from mii_hcache.runtime.capture import StepCapture, make_capture
from mii_hcache.runtime.flusher import Flusher, RowCopy, Snapshot, SpanPut
from mii_hcache.runtime.pace import Pace
from mii_hcache.runtime.ports import EngineAdapter
from mii_hcache.runtime.stats import Counters
from mii_hcache.runtime.track import OpenSpan, SequenceTrack
from mii_hcache.storage.base import ChunkStore, SpanRecord

_log = logging.getLogger(__name__)
_Taken = TypeVar("_Taken")

HEAL_WAIT_S = 2.0
"""Longest that healing waits for a buffer; once it waited in vain it waits for no other span of the sequence."""


@dataclass(frozen=True, kw_only=True)
class StepSegment:
    """One sequence's part of a step, in the order of the batch."""

    uid: int
    token_ids: Sequence[int]


class Saver:
    """Saves the state of live sequences. Engine thread only, except `is_pending`, `drain` and `num_pending`."""

    def __init__(
        self,
        *,
        adapter: EngineAdapter,
        store: ChunkStore,
        plan: StoragePlan | None,
        max_batch_tokens: int,
        counters: Counters,
        save_wait: float = 0.1,
        num_threads: int = 2,
        ring_batches: int = 2,
        is_worth_saving: Callable[[SpanId], bool] = lambda span_id: True,
    ) -> None:
        """`plan`: what is saved of each span, None for nothing; `is_worth_saving` picks spans (`Sightings`).
        `save_wait`: share of a prefill step that it may wait for room. The ring holds `ring_batches` (>= 2) full ragged
        batches."""
        geometry = adapter.geometry
        self._adapter = adapter
        self._store = store
        self._plan = plan
        self._counters = counters
        self._save_wait = save_wait
        self._is_worth_saving = is_worth_saving
        self._tracks: dict[int, SequenceTrack] = {}
        self._flusher = Flusher(store=store, counters=counters, num_threads=num_threads)
        self._pace = Pace(max_batch_tokens)
        self._segments: list[StepSegment] = []
        self._step_started_s = 0.0
        self._wait_left_s = 0.0
        self._num_tapped = 0
        self._capture: StepCapture | None = None
        self._hidden_rows: dict[int, int] = {}
        """Row in the ring and in open spans of each layer that is tapped."""
        patterns = () if plan is None else (plan.kinds, plan.other_kinds or plan.kinds)
        for layer_idx in range(geometry.num_layers):
            if any(kinds[layer_idx] is ChunkKind.HIDDEN for kinds in patterns):
                self._hidden_rows[layer_idx] = len(self._hidden_rows)
        ring_rows = ring_batches * max_batch_tokens
        if self._hidden_rows:
            num_layers = len(self._hidden_rows)
            row_elements = geometry.row_elements(ChunkKind.HIDDEN)
            self._capture = make_capture(
                ring=RowRing(
                    num_layers=num_layers, capacity_rows=ring_rows, row_elements=row_elements, dtype=adapter.dtype
                ),
                device=adapter.device,
                num_layers=num_layers,
                max_rows=max_batch_tokens,
                row_elements=row_elements,
                dtype=adapter.dtype,
            )
            self._open_buffers = SpanBuffers(
                shape=(num_layers, SPAN_TOKENS, row_elements),
                dtype=adapter.dtype,
                max_buffers=1 << 20,  # one a live sequence, and what waits for the store: bounded elsewhere
            )
        num_kv_layers = max((kinds.count(ChunkKind.KV) for kinds in patterns), default=0)
        self._kv_blocks = BlockReader(
            adapter,
            counters,
            num_layers=num_kv_layers,
            max_buffers=max(4, ring_rows // SPAN_TOKENS) if num_kv_layers else 0,
        )
        self._healed_blocks = BlockReader(adapter, counters, num_layers=geometry.num_layers, max_buffers=4)

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
        if track is not None:
            self._discard(track.truncate(num_tokens))

    def heal(self, uid: int, wait_s: float = HEAL_WAIT_S) -> bool:
        """Save whole spans that the store lacks (dropped, evicted, damaged), read from the blocks as `kv`. Call before
        the blocks are freed.

        True when nothing is left to do. False when some span found no buffer within `wait_s`: try again, or `give_up`.
        """
        track = self._tracks.get(uid)
        if track is None:
            return True
        deadline_s = time.monotonic() + wait_s
        for span_idx in range(track.num_spans):
            if self._is_settled(track, span_idx):
                continue
            buffer = self._healed_blocks.acquire(max(0.0, deadline_s - time.monotonic()))
            if buffer is None:
                return False
            is_read = self._heal_span(track, span_idx, buffer)
            self._counters.add("healed_spans_total" if is_read else "unhealed_spans_total")
        return True

    def give_up(self, uid: int) -> None:
        """Count the spans of a sequence that were never healed; its next turn will prefill from the first of them."""
        track = self._tracks.get(uid)
        if track is not None:
            missing = sum(not self._is_settled(track, span_idx) for span_idx in range(track.num_spans))
            self._counters.add("unhealed_spans_total", missing)

    def close(self, uid: int) -> None:
        """The sequence leaves the engine. What was accepted stays; call `heal` first to lose nothing."""
        track = self._tracks.pop(uid, None)
        if track is not None:
            self._discard(track.close_open_span())

    # --- steps --------------------------------------------------------------------------------------------------

    def begin_step(self, segments: Sequence[StepSegment]) -> None:
        """A ragged batch is about to run: take room for its rows."""
        self._segments = list(segments)
        num_tokens = sum(len(segment.token_ids) for segment in segments)
        is_prefill = num_tokens > len(self._segments)
        self._wait_left_s = self._save_wait * self._pace.expected_s(num_tokens) if is_prefill else 0.0
        self._num_tapped = 0
        capture = self._capture
        if capture is not None and not self._wait_for(lambda wait_s: capture.begin(num_tokens, wait_s)):
            self._counters.add("dropped_rows_total", num_tokens)
        self._step_started_s = time.perf_counter()

    def tap(self, layer_idx: int, hidden: torch.Tensor) -> None:
        """A layer's QKV input, `[num_tokens, hidden_size]`, in the order of the batch; copied in stream order."""
        row = self._hidden_rows.get(layer_idx)
        if self._capture is not None and row is not None:
            self._capture.copy(row, hidden)
            self._num_tapped += 1

    def end_step(self) -> None:
        """The batch ran: hand what it left to the background threads. What cannot be saved is dropped, logged and
        counted; the step's requests go on."""
        segments, self._segments = self._segments, []
        num_tokens = sum(len(segment.token_ids) for segment in segments)
        if num_tokens > len(segments):
            self._pace.note(num_tokens, time.perf_counter() - self._step_started_s)
        if self._plan is not None:
            self._snapshot(segments)

    def abort_step(self) -> None:
        """The batch failed: its rows are garbage, its sequences must be closed."""
        if self._capture is not None:
            self._capture.abort()
        self._segments = []

    def _wait_for(self, take: Callable[[float], _Taken]) -> _Taken:
        """Take room, waiting for as long as this step still may."""
        started_s = time.perf_counter()
        taken = take(self._wait_left_s)
        if self._wait_left_s > 0:
            waited_s = time.perf_counter() - started_s
            self._counters.add("save_wait_seconds_total", waited_s)
            self._wait_left_s = max(0.0, self._wait_left_s - waited_s)
        return taken

    def _snapshot(self, segments: list[StepSegment]) -> None:
        snapshot = Snapshot()
        rows = None if self._capture is None else self._take_rows(self._capture, snapshot)
        first_row = 0
        for segment in segments:
            num_rows = len(segment.token_ids)
            track = self._tracks.get(segment.uid)
            if track is not None:
                own_rows = rows[:, first_row : first_row + num_rows] if rows is not None else None
                self._cut(snapshot, track, segment.token_ids, own_rows)
            first_row += num_rows
        self._submit(snapshot)

    def _take_rows(self, capture: StepCapture, snapshot: Snapshot) -> torch.Tensor | None:
        """The hidden rows of the whole step, None when they were dropped."""
        lease, ready = capture.end()
        if lease is None:
            return None
        if ready is not None:
            snapshot.ready.append(ready)
        snapshot.release = partial(capture.ring.release, lease)
        if self._num_tapped == lease.rows.shape[0]:
            return lease.rows
        # A forward that bypasses the tap leaves rows that nobody wrote.
        _log.error("%d of %d layers were captured; the step is not saved", self._num_tapped, lease.rows.shape[0])
        self._counters.add("save_errors_total")
        self._counters.add("dropped_rows_total", lease.num_rows)
        return None

    def _submit(self, snapshot: Snapshot) -> None:
        if snapshot.is_empty:  # nothing was taken: a hanging store piles up nothing
            return
        if self._adapter.device.type == "cuda":  # K and V may be on their way from the blocks
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record()
            snapshot.ready.append(ready)
        self._flusher.submit(snapshot)

    def _cut(
        self, snapshot: Snapshot, track: SequenceTrack, token_ids: Sequence[int], rows: torch.Tensor | None
    ) -> None:
        """Cut one sequence's part of a step at span boundaries. `rows` None: no hidden rows were captured."""
        start = len(track.token_ids)
        track.extend(token_ids)
        stop = len(track.token_ids)
        try:
            at = start
            while at < stop:
                span_idx, span_row = divmod(at, SPAN_TOKENS)
                num_rows = min(SPAN_TOKENS - span_row, stop - at)
                own_rows = rows[:, at - start : at - start + num_rows] if rows is not None else None
                self._take(snapshot, track, span_idx, span_row, num_rows, own_rows)
                at += num_rows
        except Exception:
            _log.exception("rows of a step could not be taken; they are dropped")
            self._counters.add("save_errors_total")
            rows = None
        open_span = track.close_open_span() if rows is None else None
        if open_span is not None:  # it misses rows now; given back after the copies that this snapshot makes into it
            snapshot.discard.append(partial(self._open_buffers.release, open_span.rows))

    def _take(
        self,
        snapshot: Snapshot,
        track: SequenceTrack,
        span_idx: int,
        span_row: int,
        num_rows: int,
        rows: torch.Tensor | None,
    ) -> None:
        """Rows of one span: put it at once if it is whole here, else copy its hidden rows to the open span."""
        is_last = span_row + num_rows == SPAN_TOKENS
        is_wanted = is_last and not self._is_settled(track, span_idx)
        needs_hidden = ChunkKind.HIDDEN in self._layout_of(span_idx).kind_counts
        if needs_hidden and rows is None:
            return
        if not needs_hidden or num_rows == SPAN_TOKENS:
            put = self._put_of(track, span_idx, rows) if is_wanted else None
            if put is not None:
                snapshot.whole.append(put)
            return
        assert rows is not None
        if span_row == 0:
            buffer = self._open_buffers.acquire()
            assert buffer is not None
            track.open_span = OpenSpan(span_idx=span_idx, rows=buffer)
        open_span = track.open_span
        if open_span is None or open_span.span_idx != span_idx:
            return  # an earlier row of this span was dropped or lies in a saved span: healed from the blocks
        completes = None
        if is_last:
            track.close_open_span()
            release = partial(self._open_buffers.release, open_span.rows)
            completes = self._put_of(track, span_idx, open_span.rows, release) if is_wanted else None
            if completes is None:
                snapshot.discard.append(release)
        snapshot.copies.append(RowCopy(source=rows, target=open_span, span_row=span_row, completes=completes))

    def _put_of(
        self,
        track: SequenceTrack,
        span_idx: int,
        hidden: torch.Tensor | None = None,
        release: Callable[[], None] | None = None,
    ) -> SpanPut | None:
        """A span to be put: `hidden` (`[num_hidden_rows, SPAN_TOKENS, hidden_size]`), and K and V read from its blocks
        now. None, with `release` not called, when there is no room for those."""
        layout = self._layout_of(span_idx)
        kv_layers = [chunk.layer_idx for chunk in layout.chunks if chunk.kind is ChunkKind.KV]
        kv = None
        if kv_layers:
            kv = self._wait_for(self._kv_blocks.acquire)
            if kv is None or not self._kv_blocks.read(track.uid, span_idx, kv_layers, kv):
                self._counters.add("dropped_rows_total", SPAN_TOKENS)
                return None
        back = None if kv is None else partial(self._kv_blocks.release, kv)
        releases = [action for action in (release, back) if action is not None]
        kv_rows = iter(() if kv is None else kv)
        rows = []
        for chunk in layout.chunks:
            if chunk.kind is ChunkKind.KV:
                rows.append(next(kv_rows))
            else:
                assert hidden is not None
                rows.append(hidden[self._hidden_rows[chunk.layer_idx]])
        return SpanPut(record=self._record(track, span_idx, layout), rows=rows, releases=releases)

    def _heal_span(self, track: SequenceTrack, span_idx: int, buffer: torch.Tensor) -> bool:
        """Save a span from its blocks; takes the buffer over. False: it could not be read."""
        layout = SpanLayout.uniform(self._adapter.geometry, ChunkKind.KV)
        if not self._healed_blocks.read(track.uid, span_idx, range(layout.num_layers), buffer):
            return False
        put = SpanPut(
            record=self._record(track, span_idx, layout),
            rows=list(buffer),
            releases=[partial(self._healed_blocks.release, buffer)],
        )
        self._submit(Snapshot(whole=[put]))
        return True

    def _layout_of(self, span_idx: int) -> SpanLayout:
        assert self._plan is not None
        return SpanLayout.of(self._adapter.geometry, self._plan.kinds_of(span_idx))

    def _is_settled(self, track: SequenceTrack, span_idx: int) -> bool:
        """Whether a whole span needs no saving: it is saved, about to be, or not worth it, or it was given up."""
        span_id = track.span_ids[span_idx]
        return (
            span_id in track.left_out
            or not self._is_worth_saving(span_id)
            or self._store.find(span_id) is not None
            or self._flusher.is_pending((span_id,))
        )

    def _record(self, track: SequenceTrack, span_idx: int, layout: SpanLayout) -> SpanRecord:
        return SpanRecord(
            span_id=track.span_ids[span_idx],
            parent_id=track.parent_id(span_idx),
            span_idx=span_idx,
            token_ids=track.packed_tokens(span_idx),
            layout=layout,
        )

    def _discard(self, open_span: OpenSpan | None) -> None:
        if open_span is not None:
            self._flusher.submit(Snapshot(discard=[partial(self._open_buffers.release, open_span.rows)]))

    # --- waiting ------------------------------------------------------------------------------------------------

    def is_pending(self, span_ids: Iterable[SpanId]) -> bool:
        """Whether any of these was accepted and has not reached the store yet."""
        return self._flusher.is_pending(span_ids)

    @property
    def num_pending(self) -> int:
        """Spans accepted that have not reached the store yet."""
        return self._flusher.num_pending

    def drain(self, timeout_s: float | None = None) -> bool:
        """Wait until everything accepted has reached the store; False when `timeout_s` ran out."""
        return self._flusher.drain(timeout_s)

    def stop(self) -> None:
        """Drain and end the background threads."""
        self._flusher.stop()
