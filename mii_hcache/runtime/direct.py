"""Saving without a second stage: the engine's thread writes what a step left, and the step ends when it is written.

The paper's DirectIO, for comparison and for measuring (`--save direct`): what two-stage saving spares decoding. Rows go
to their span's place on the device in the step that computes them, all of a step as one batch of small writes; the
step that completes a span makes it a span. Open spans are kept in host memory all the same, for their checksums.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from mii_hcache.core.geometry import ChunkKind
from mii_hcache.core.identity import SpanId
from mii_hcache.runtime.buffers import as_bytes
from mii_hcache.runtime.scatter import Scatter
from mii_hcache.runtime.sink import SnapshotSink
from mii_hcache.runtime.snapshot import RowCopy, Snapshot, SpanPut
from mii_hcache.runtime.stats import Counters
from mii_hcache.runtime.track import OpenSpan
from mii_hcache.storage.base import ChunkStore
from mii_hcache.storage.drafts import FileDrafts, RowWrite, SpanDraft

_log = logging.getLogger(__name__)

_ALIGN_BYTES = 4096


class DirectWriter(SnapshotSink):
    """Sees a snapshot into the store before `submit` returns; a store that hangs holds up the engine. Nothing is ever
    pending. A store that takes no drafts, and a span whose rows could not be written, get spans whole."""

    def __init__(
        self, *, store: ChunkStore, counters: Counters, hidden_rows: Mapping[int, int], scatter: Scatter | None = None
    ) -> None:
        """`hidden_rows`: row in open spans of each layer."""
        super().__init__(store=store, counters=counters, scatter=scatter)
        self._hidden_rows = hidden_rows
        self._drafts: dict[OpenSpan, SpanDraft] = {}
        self._completing: SpanDraft | None = None

    def submit(self, snapshot: Snapshot) -> None:
        is_copied = self._copy_rows(snapshot)
        if is_copied and self._store.drafts is not None:
            self._write_rows(self._store.drafts, snapshot.copies)
        for put in snapshot.whole:
            self._finish(put, is_sound=is_copied)
        for copy in snapshot.copies:
            if copy.completes is not None:
                self._finish(copy.completes, is_sound=not copy.target.is_damaged, span=copy.target)
        if snapshot.release is not None:
            snapshot.release()
        for discard in snapshot.discard:
            discard()

    def forget(self, open_span: OpenSpan) -> None:
        draft, drafts = self._drafts.pop(open_span, None), self._store.drafts
        if draft is not None and drafts is not None:
            drafts.drop(draft)

    def is_pending(self, span_ids: Iterable[SpanId]) -> bool:
        return False

    @property
    def num_pending(self) -> int:
        return 0

    def drain(self, timeout_s: float | None = None) -> bool:
        return True

    def stop(self) -> None:
        for open_span in list(self._drafts):
            self.forget(open_span)

    def _write_rows(self, drafts: FileDrafts, copies: Iterable[RowCopy]) -> None:
        """Write the rows of a step. When that fails, their spans are put whole once they are."""
        copies = list(copies)
        rows: list[RowWrite] = []
        try:
            for copy in copies:
                draft = self._draft_of(drafts, copy)
                if draft is not None:
                    rows += self._rows_of(draft, copy)
            if rows:
                drafts.write(rows)
        except Exception:
            _log.exception("rows of a step could not be written")
            self._counters.add("save_errors_total")
            for copy in copies:
                self.forget(copy.target)

    def _draft_of(self, drafts: FileDrafts, copy: RowCopy) -> SpanDraft | None:
        span = copy.target
        if copy.span_row == 0 and span not in self._drafts and span.layout is not None:
            draft = drafts.begin(span.layout)
            if draft is not None:
                self._drafts[span] = draft
        return self._drafts.get(span)

    def _rows_of(self, draft: SpanDraft, copy: RowCopy) -> Iterable[RowWrite]:
        """The new rows in every chunk, with what shares their blocks of the disk; K and V when the span is whole."""
        num_rows, row_bytes = copy.source.shape[1], copy.source.shape[2] * copy.source.itemsize
        start = copy.span_row * row_bytes // _ALIGN_BYTES * _ALIGN_BYTES
        stop = -(-(copy.span_row + num_rows) * row_bytes // _ALIGN_BYTES) * _ALIGN_BYTES
        for chunk_idx, chunk in enumerate(draft.layout.chunks):
            if chunk.kind is ChunkKind.HIDDEN:
                data = as_bytes(copy.target.rows[self._hidden_rows[chunk.layer_idx]])
                yield RowWrite(draft, chunk_idx, start, data[start:stop])
            elif copy.completes is not None:
                yield RowWrite(draft, chunk_idx, 0, as_bytes(copy.completes.rows[chunk_idx]))

    def _finish(self, put: SpanPut, *, is_sound: bool, span: OpenSpan | None = None) -> None:
        if is_sound:
            self._completing = None if span is None else self._drafts.pop(span, None)
            self._store_span(put)
        else:
            self._counters.add("dropped_spans_total")
        for release in put.releases:
            release()

    def _put(self, put: SpanPut) -> bool:
        chunks, draft, drafts = [as_bytes(rows) for rows in put.rows], self._completing, self._store.drafts
        self._completing = None
        if draft is None or drafts is None:
            return self._store.put_through(put.record, chunks)
        return drafts.publish(draft, put.record, chunks)
