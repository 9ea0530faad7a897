"""From a step's rows to spans: who needs copying into an open span, and what is whole and can be put."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import torch

from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind, ModelGeometry
from mii_hcache.core.layout import LayerKinds, SpanLayout
from mii_hcache.core.plans import StoragePlan
from mii_hcache.runtime.block_reader import BlockReader
from mii_hcache.runtime.buffers import IDLE_S, SpanBuffers
from mii_hcache.runtime.patience import Patience
from mii_hcache.runtime.ports import EngineAdapter
from mii_hcache.runtime.share import WHOLE, Share
from mii_hcache.runtime.sink import SnapshotSink
from mii_hcache.runtime.snapshot import RowCopy, Snapshot, SpanPut
from mii_hcache.runtime.stage import Stage
from mii_hcache.runtime.stats import Counters
from mii_hcache.runtime.track import OpenSpan, SequenceTrack

_log = logging.getLogger(__name__)


class SpanCutter:
    """Cuts steps at span boundaries; owns the memory of open spans. Engine thread only."""

    def __init__(
        self,
        *,
        adapter: EngineAdapter,
        plan: StoragePlan,
        hidden_rows: dict[int, int],
        sink: SnapshotSink,
        counters: Counters,
        patience: Patience,
        is_settled: Callable[[SequenceTrack, int], bool],
        max_kv_buffers: int,
        stage: Stage | None = None,
        share: Share = WHOLE,
        name_put: Callable[[SequenceTrack, int], int] = lambda track, span_idx: 0,
    ) -> None:
        """`hidden_rows`: row in the ring and in open spans of each layer that is tapped. `is_settled`: whether a span
        needs no saving. `max_kv_buffers` spans' K and V may wait for the store. `stage`: None on a CPU. `share`: what
        of each span is saved here; `name_put`: by which name several ranks speak of a put."""
        self._geometry = adapter.geometry
        self._share = share
        self._name_put = name_put
        self._plan = plan
        self._patterns: dict[tuple[bool, bool], _Pattern] = {}
        self._hidden_rows = hidden_rows
        self._sink = sink
        self._counters = counters
        self._patience = patience
        self._is_settled = is_settled
        self._open_buffers = SpanBuffers(
            shape=(len(hidden_rows), SPAN_TOKENS, self._geometry.row_elements(ChunkKind.HIDDEN)),
            dtype=adapter.dtype,
            max_buffers=1 << 20,  # one a live sequence, and what waits for the store: bounded elsewhere
            idle_s=IDLE_S,
        )
        num_kv_layers = max(kinds.count(ChunkKind.KV) for kinds in (plan.kinds, plan.other_kinds or plan.kinds))
        self._kv_blocks = BlockReader(
            adapter,
            counters,
            num_layers=num_kv_layers,
            max_buffers=max_kv_buffers if num_kv_layers else 0,
            stage=stage,
            num_ranks=share.num_ranks,
        )

    def cut(
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
                is_all = num_rows == stop - start  # so in decoding: a view of it would be another
                own_rows = rows if rows is None or is_all else rows.narrow(1, at - start, num_rows)
                self._take(snapshot, track, span_idx, span_row, num_rows, own_rows)
                at += num_rows
        except Exception:
            _log.exception("rows of a step could not be taken; they are dropped")
            self._counters.add("save_errors_total")
            rows = None
        open_span = track.close_open_span() if rows is None else None
        if open_span is not None:  # it misses rows now; given back after the copies that this snapshot makes into it
            snapshot.discard.append(partial(self._give_back, open_span))

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
        pattern = self._pattern_of(span_idx)
        if pattern.needs_hidden and rows is None:
            return
        if not pattern.needs_hidden or num_rows == SPAN_TOKENS:
            put = self._put_of(snapshot, track, span_idx, rows) if is_wanted else None
            if put is not None:
                snapshot.whole.append(put)
            return
        assert rows is not None
        if span_row == 0:
            buffer = self._open_buffers.acquire()
            assert buffer is not None
            track.open_span = OpenSpan(span_idx=span_idx, rows=buffer, layout=pattern.layout)
        open_span = track.open_span
        if open_span is None or open_span.span_idx != span_idx:
            return  # an earlier row of this span was dropped or lies in a saved span: healed from the blocks
        completes = None
        if is_last:
            track.close_open_span()
            release = partial(self._give_back, open_span)
            try:
                completes = self._put_of(snapshot, track, span_idx, open_span.rows, release) if is_wanted else None
            finally:
                if completes is None:
                    snapshot.discard.append(release)
        snapshot.copies.append(RowCopy(source=rows, target=open_span, span_row=span_row, completes=completes))

    def _put_of(
        self,
        snapshot: Snapshot,
        track: SequenceTrack,
        span_idx: int,
        hidden: torch.Tensor | None = None,
        release: Callable[[], None] | None = None,
    ) -> SpanPut | None:
        """A whole span to be put: its hidden rows (`[num_hidden_rows, SPAN_TOKENS, hidden_size]`), and K and V read
        from its blocks now, which are there when the snapshot is ready. None, with `release` not called, when there is
        no room for those."""
        pattern = self._pattern_of(span_idx)
        kv_layers, kv = pattern.kv_layers, None
        if kv_layers:
            kv = self._patience.wait_for(self._kv_blocks.acquire)
            ready = None if kv is None else self._kv_blocks.read(track.uid, span_idx, kv_layers, kv)
            if ready is None:
                self._counters.add("dropped_rows_total", SPAN_TOKENS)
                return None
            snapshot.ready += ready
        back = None if kv is None else partial(self._kv_blocks.release, kv)
        releases = [action for action in (release, back) if action is not None]
        kv_rows = iter(() if kv is None else kv)
        rows = []
        for chunk in pattern.chunks:
            if chunk.kind is ChunkKind.KV:
                rows.append(next(kv_rows))
            else:
                assert hidden is not None
                rows.append(hidden[self._hidden_rows[chunk.layer_idx]])
        record, put_id = track.record(span_idx, pattern.layout), self._name_put(track, span_idx)
        return SpanPut(record=record, rows=rows, releases=releases, put_id=put_id)

    def discard(self, open_span: OpenSpan | None) -> None:
        """An open span is not continued: its memory comes back after the copies of earlier steps."""
        if open_span is not None:
            self._sink.submit(Snapshot(discard=[partial(self._give_back, open_span)]))

    def _give_back(self, open_span: OpenSpan) -> None:
        self._sink.forget(open_span)
        self._open_buffers.release(open_span.rows)

    def _pattern_of(self, span_idx: int) -> _Pattern:
        kinds = self._plan.kinds_of(span_idx)
        key = kinds is self._plan.kinds, self._share.has_hidden(span_idx)
        pattern = self._patterns.get(key)
        if pattern is None:
            pattern = self._patterns[key] = _Pattern(self._geometry, kinds, self._share, span_idx)
        return pattern


class _Pattern:
    """How spans like the one at `span_idx` are saved here: asked for by every sequence in every step, so worked out
    once."""

    def __init__(self, geometry: ModelGeometry, kinds: LayerKinds, share: Share, span_idx: int) -> None:
        self.layout = SpanLayout.of(geometry, kinds, share.num_ranks)
        self.chunks = [self.layout.chunks[chunk_idx] for chunk_idx in share.chunks(span_idx, self.layout)]
        self.needs_hidden = any(chunk.kind is ChunkKind.HIDDEN for chunk in self.chunks)
        self.kv_layers = [chunk.layer_idx for chunk in self.chunks if chunk.kind is ChunkKind.KV]
