"""Saving without a second stage: the engine's thread writes what a step left, and the step ends when it is written.

The paper's DirectIO, for comparison and for measuring (`--save direct`): what two-stage saving spares decoding.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from mii_hcache.core.identity import SpanId
from mii_hcache.runtime.buffers import as_bytes
from mii_hcache.runtime.sink import SnapshotSink
from mii_hcache.runtime.snapshot import Snapshot, SpanPut

_log = logging.getLogger(__name__)


class DirectWriter(SnapshotSink):
    """Sees a snapshot into the store before `submit` returns; a store that hangs holds up the engine. Nothing is ever
    pending."""

    def submit(self, snapshot: Snapshot) -> None:
        is_copied = self._copy_rows(snapshot)
        for put in snapshot.whole:
            self._finish(put, is_sound=is_copied)
        for copy in snapshot.copies:
            if copy.completes is not None:
                self._finish(copy.completes, is_sound=not copy.target.is_damaged)
        if snapshot.release is not None:
            snapshot.release()
        for discard in snapshot.discard:
            discard()

    def is_pending(self, span_ids: Iterable[SpanId]) -> bool:
        return False

    @property
    def num_pending(self) -> int:
        return 0

    def drain(self, timeout_s: float | None = None) -> bool:
        return True

    def stop(self) -> None:
        """Nothing runs in the background."""

    def _finish(self, put: SpanPut, *, is_sound: bool) -> None:
        if is_sound:
            self._store_span(put)
        else:
            self._counters.add("dropped_spans_total")
        for release in put.releases:
            release()

    def _put(self, put: SpanPut) -> bool:
        return self._store.put_through(put.record, [as_bytes(rows) for rows in put.rows])
