"""Stage 2 of saving: background threads that turn snapshots into spans in the store.

One thread scatters rows into open spans, strictly in the order of the steps; whole spans go to a few threads that put
them. Everything waiting is bounded: by the ring's rows, by the pool's buffers, and by `MAX_WAITING_PUTS`.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch

from mii_hcache.core.identity import SpanId
from mii_hcache.runtime.buffers import as_bytes
from mii_hcache.runtime.stats import Counters
from mii_hcache.runtime.track import OpenSpan
from mii_hcache.storage.base import ChunkStore, SpanRecord

_log = logging.getLogger(__name__)

MAX_WAITING_PUTS = 64
"""Whole spans that may wait for the store before the scattering thread waits too."""


@dataclass(frozen=True, kw_only=True)
class SpanPut:
    """A whole span, ready once its snapshot's rows are there."""

    record: SpanRecord
    rows: Sequence[torch.Tensor]
    """Of each chunk, in the order of the record's layout: `[SPAN_TOKENS, ...]`, host, contiguous."""
    releases: Sequence[Callable[[], None]] = ()
    """Called when the rows are no longer needed."""


@dataclass(frozen=True, kw_only=True)
class RowCopy:
    """Rows on their way from a snapshot into an open span."""

    source: torch.Tensor
    """`[num_layers, num_rows, row_elements]`."""
    target: OpenSpan
    span_row: int
    completes: SpanPut | None = None
    """The span that these rows complete, if it is to be put."""


@dataclass(kw_only=True)
class Snapshot:
    """What one step, or one read from blocks, left behind."""

    ready: list[torch.cuda.Event] = field(default_factory=list)
    """The copies to host memory are done after these events."""
    copies: list[RowCopy] = field(default_factory=list)
    whole: list[SpanPut] = field(default_factory=list)
    release: Callable[[], None] | None = None
    """Called when copies and whole spans no longer need the snapshot's memory."""
    discard: list[Callable[[], None]] = field(default_factory=list)
    """Called after this and every earlier snapshot's copies."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do for it."""
        return self.release is None and not self.whole and not self.discard


class Flusher:
    """Owns the background threads. `submit` is for one thread; the rest may be called from any."""

    def __init__(self, *, store: ChunkStore, counters: Counters, num_threads: int) -> None:
        self._store = store
        self._counters = counters
        self._changed = threading.Condition()
        self._pending: dict[SpanId, int] = {}
        self._num_snapshots = 0
        self._snapshots: queue.SimpleQueue[Snapshot | None] = queue.SimpleQueue()
        self._puts: queue.Queue[SpanPut | None] = queue.Queue(MAX_WAITING_PUTS)
        self._scatterer = threading.Thread(target=self._scatter_all, name="hcache-scatter", daemon=True)
        self._putters = [
            threading.Thread(target=self._put_all, name=f"hcache-put-{idx}", daemon=True) for idx in range(num_threads)
        ]
        for thread in (self._scatterer, *self._putters):
            thread.start()

    def submit(self, snapshot: Snapshot) -> None:
        """Take a snapshot over; never blocks. Its spans are pending from now on."""
        with self._changed:
            self._num_snapshots += 1
            for put in _puts_of(snapshot):
                span_id = put.record.span_id
                self._pending[span_id] = self._pending.get(span_id, 0) + 1
        self._snapshots.put(snapshot)

    def is_pending(self, span_ids: Iterable[SpanId]) -> bool:
        """Whether any of these was submitted and has not reached the store yet."""
        with self._changed:
            return bool(self._pending) and any(span_id in self._pending for span_id in span_ids)

    @property
    def num_pending(self) -> int:
        """Spans submitted that have not reached the store yet."""
        with self._changed:
            return len(self._pending)

    def drain(self, timeout_s: float | None = None) -> bool:
        """Wait until everything submitted so far has reached the store; False when `timeout_s` ran out."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._num_snapshots and not self._pending, timeout_s)

    def stop(self) -> None:
        """Drain, then end the threads."""
        self._snapshots.put(None)
        self._scatterer.join()
        for _ in self._putters:
            self._puts.put(None)
        for thread in self._putters:
            thread.join()

    def _scatter_all(self) -> None:
        while (snapshot := self._snapshots.get()) is not None:
            self._scatter(snapshot)
            with self._changed:
                self._num_snapshots -= 1
                self._changed.notify_all()

    def _scatter(self, snapshot: Snapshot) -> None:
        release = _CountDown(1 + len(snapshot.whole), snapshot.release)
        is_copied = self._copy_rows(snapshot)
        release()
        for put in snapshot.whole:
            self._hand_over(replace(put, releases=[release, *put.releases]), is_sound=is_copied)
        for copy in snapshot.copies:
            if copy.completes is not None:
                self._hand_over(copy.completes, is_sound=not copy.target.is_damaged)
        for discard in snapshot.discard:
            discard()

    def _copy_rows(self, snapshot: Snapshot) -> bool:
        """Wait for the snapshot and copy its rows into their open spans. False: its rows cannot be used."""
        try:
            for ready in snapshot.ready:
                ready.synchronize()
            for copy in snapshot.copies:
                num_rows = copy.source.shape[1]
                copy.target.rows[:, copy.span_row : copy.span_row + num_rows] = copy.source
        except Exception:
            # State that is not saved only makes a next turn slower; the server lives on, and says so. But a span that
            # misses rows must not be put when a later step completes it.
            _log.exception("a snapshot failed; its spans are lost")
            self._counters.add("save_errors_total")
            for copy in snapshot.copies:
                copy.target.is_damaged = True
            return False
        return True

    def _hand_over(self, put: SpanPut, *, is_sound: bool) -> None:
        if is_sound:
            self._puts.put(put)
        else:
            self._counters.add("dropped_spans_total")
            self._finish(put)

    def _put_all(self) -> None:
        while (put := self._puts.get()) is not None:
            try:
                if self._store.put(put.record, [as_bytes(rows) for rows in put.rows]):
                    self._counters.add("saved_spans_total")
                    self._counters.add("saved_bytes_total", put.record.num_bytes)
                else:
                    self._counters.add("dropped_spans_total")
            except Exception:
                _log.exception("putting a span failed; it is lost")
                self._counters.add("save_errors_total")
            finally:
                self._finish(put)

    def _finish(self, put: SpanPut) -> None:
        for release in put.releases:
            release()
        with self._changed:
            span_id = put.record.span_id
            self._pending[span_id] -= 1
            if not self._pending[span_id]:
                del self._pending[span_id]
            self._changed.notify_all()


def _puts_of(snapshot: Snapshot) -> list[SpanPut]:
    return [*snapshot.whole, *(copy.completes for copy in snapshot.copies if copy.completes is not None)]


class _CountDown:
    """Calls `action` at the `count`-th call. Any thread."""

    def __init__(self, count: int, action: Callable[[], None] | None) -> None:
        self._count = count
        self._action = action
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self._count -= 1
            is_last = self._count == 0
        if is_last and self._action is not None:
            self._action()
