"""Where snapshots go: the seam below the saver. `flusher.py` saves in two stages, `direct.py` within the step."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable

from mii_hcache.core.identity import SpanId
from mii_hcache.errors import RankLostError
from mii_hcache.runtime.buffers import as_bytes
from mii_hcache.runtime.scatter import Scatter, make_scatter
from mii_hcache.runtime.snapshot import Snapshot, SpanPut
from mii_hcache.runtime.stats import Counters
from mii_hcache.runtime.track import OpenSpan
from mii_hcache.storage.base import ChunkStore
from mii_hcache.storage.records import SpanRecord

_log = logging.getLogger(__name__)


class SnapshotSink(ABC):
    """Takes snapshots and sees them into the store, in the order of the steps. What fails is logged, counted and lost:
    nothing is raised. `submit` and `forget` are for one thread; the rest may be called from any."""

    num_ranks = 1
    """Ranks that save a span together."""

    def __init__(self, *, store: ChunkStore | None, counters: Counters, scatter: Scatter | None = None) -> None:
        """`store`: None for sinks that only hand on. `scatter`: None makes the best one here."""
        self._given_store = store
        self._counters = counters
        self._scatter = make_scatter() if scatter is None else scatter

    @property
    def _store(self) -> ChunkStore:
        assert self._given_store is not None, "this sink has no store"
        return self._given_store

    @abstractmethod
    def submit(self, snapshot: Snapshot) -> None:
        """Take a snapshot over, with its memory: every `release` and `discard` is called once."""

    def forget(self, open_span: OpenSpan) -> None:  # noqa: B027, for sinks that keep nothing of it
        """A span is not continued. Called when its rows are about to be given back; they are still there."""

    @abstractmethod
    def is_pending(self, span_ids: Iterable[SpanId]) -> bool:
        """Whether any of these was submitted and has not reached the store yet."""

    @property
    @abstractmethod
    def num_pending(self) -> int:
        """Spans submitted that have not reached the store yet."""

    @abstractmethod
    def drain(self, timeout_s: float | None = None) -> bool:
        """Wait until everything submitted so far has reached the store; False when `timeout_s` ran out."""

    @abstractmethod
    def stop(self) -> None:
        """Drain, then end what runs in the background, but do not wait for what hangs. Nothing is submitted
        afterwards."""

    def _copy_rows(self, snapshot: Snapshot) -> bool:
        """Wait for the snapshot and copy its rows into their open spans. False: its rows cannot be used."""
        try:
            for ready in snapshot.ready:
                ready.synchronize()
            if snapshot.copies:
                self._scatter.run(snapshot.copies)
        except Exception:
            # State that is not saved only makes a next turn slower; the server lives on, and says so. But a span that
            # misses rows must not be put when a later step completes it.
            _log.exception("a snapshot failed; its spans are lost")
            self._counters.add("save_errors_total")
            for copy in snapshot.copies:
                copy.target.is_damaged = True
            return False
        return True

    def _store_span(self, put: SpanPut) -> None:
        """Put a span, and count what became of it."""
        try:
            self._make_way(put.record)
            if self._put(put):
                self._counters.add("saved_spans_total")
                self._counters.add("saved_bytes_total", put.record.num_bytes)
            else:
                self._counters.add("dropped_spans_total")
        except RankLostError as error:  # the engine's end, which is told elsewhere, and once
            _log.debug("a span is lost: %s", error)
            self._counters.add("save_errors_total")
        except Exception:
            _log.exception("putting a span failed; it is lost")
            self._counters.add("save_errors_total")

    def _put(self, put: SpanPut) -> bool:
        return self._store.put(put.record, [as_bytes(rows) for rows in put.rows])

    def _make_way(self, record: SpanRecord) -> None:
        """Delete a span that another number of ranks saved, which those of now cannot bring back: this one they can."""
        found = self._store.find(record.span_id)
        if found is not None and not found.layout.suits(self.num_ranks):
            self._store.delete([record.span_id])
