"""Stage 2 of saving: background threads that turn snapshots into spans in the store.

One thread scatters rows into open spans, strictly in the order of the steps, with others' help within a large one
(`scatter.py`); whole spans go to a few threads that put them. Everything waiting is bounded: by the ring's rows, by the
pool's buffers, and by `MAX_WAITING_PUTS`.

Spans are put one by one. A span of a real model is a batch of I/O by itself: four of 32 x 512 KiB or of 15 x 256 KiB
written as one batch were as fast (1.7 and 1.5 GB/s beside 1.6 and 1.7) at the same CPU time. Only spans of a few small
chunks, as tests have, would gain.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace

from mii_hcache.core.identity import SpanId
from mii_hcache.runtime.scatter import Scatter
from mii_hcache.runtime.sink import SnapshotSink
from mii_hcache.runtime.snapshot import Snapshot, SpanPut
from mii_hcache.runtime.stats import Counters
from mii_hcache.storage.base import ChunkStore

MAX_WAITING_PUTS = 64
"""Whole spans that may wait for the store before the scattering thread waits too."""
STALL_S = 30.0
"""A stop waits for what gets done, however long that takes, but not for a disk that did nothing for so long. Stores
notice a hanging disk sooner by themselves."""
_log = logging.getLogger(__name__)


class Flusher(SnapshotSink):
    """Owns the background threads. `submit` is for one thread; the rest may be called from any."""

    def __init__(
        self, *, store: ChunkStore | None, counters: Counters, num_threads: int, scatter: Scatter | None = None
    ) -> None:
        """`num_threads` put spans."""
        super().__init__(store=store, counters=counters, scatter=scatter)
        self._changed = threading.Condition()
        self._pending: dict[SpanId, int] = {}
        self._num_snapshots = 0
        self._num_done = 0
        """Snapshots scattered and spans put, ever."""
        self._snapshots: queue.SimpleQueue[Snapshot | None] = queue.SimpleQueue()
        self._puts: queue.Queue[SpanPut | None] = queue.Queue(MAX_WAITING_PUTS)
        self._scatterer = threading.Thread(target=self._scatter_all, name="hcache-scatter", daemon=True)
        self._putters = [
            threading.Thread(target=self._put_all, name=f"hcache-put-{idx}", daemon=True) for idx in range(num_threads)
        ]
        for thread in (self._scatterer, *self._putters):
            thread.start()

    def submit(self, snapshot: Snapshot) -> None:
        """Never blocks. The snapshot's spans are pending from now on."""
        with self._changed:
            self._num_snapshots += 1
            for put in snapshot.puts:
                span_id = put.record.span_id
                self._pending[span_id] = self._pending.get(span_id, 0) + 1
        self._snapshots.put(snapshot)

    def is_pending(self, span_ids: Iterable[SpanId]) -> bool:
        with self._changed:
            return bool(self._pending) and any(span_id in self._pending for span_id in span_ids)

    @property
    def num_pending(self) -> int:
        with self._changed:
            return len(self._pending)

    def drain(self, timeout_s: float | None = None) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._num_snapshots and not self._pending, timeout_s)

    def stop(self) -> None:
        """Returns also when saving hangs: what it hangs on keeps its threads and their memory, and the spans that wait
        behind it are lost."""
        self._snapshots.put(None)
        if not self._wait_while_it_goes_on():
            num_unsaved = self.num_pending
            _log.error(
                "saving has hung for %g s: %d spans that were accepted are not saved, and their memory is left to what "
                "hangs (a disk?)",
                *(STALL_S, num_unsaved),
            )
            self._counters.add("unsaved_spans_total", num_unsaved)
            return
        self._scatterer.join()
        for _ in self._putters:
            self._puts.put(None)
        for thread in self._putters:
            thread.join()

    def _wait_while_it_goes_on(self) -> bool:
        """Wait until all is done, for as long as it takes; False when nothing got done for `STALL_S`."""
        with self._changed:
            while self._num_snapshots or self._pending:
                before = self._num_done
                if not self._changed.wait_for(lambda before=before: self._num_done > before, STALL_S):  # type: ignore[misc]
                    return False
        return True

    def _scatter_all(self) -> None:
        while (snapshot := self._snapshots.get()) is not None:
            self._work_off(snapshot)
            with self._changed:
                self._num_snapshots -= 1
                self._num_done += 1
                self._changed.notify_all()

    def _work_off(self, snapshot: Snapshot) -> None:
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

    def _hand_over(self, put: SpanPut, *, is_sound: bool) -> None:
        if is_sound:
            self._puts.put(put)
        else:
            self._counters.add("dropped_spans_total")
            self._finish(put)

    def _put_all(self) -> None:
        while (put := self._puts.get()) is not None:
            self._store_span(put)
            self._finish(put)

    def _finish(self, put: SpanPut) -> None:
        for release in put.releases:
            release()
        with self._changed:
            span_id = put.record.span_id
            self._pending[span_id] -= 1
            if not self._pending[span_id]:
                del self._pending[span_id]
            self._num_done += 1
            self._changed.notify_all()


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
