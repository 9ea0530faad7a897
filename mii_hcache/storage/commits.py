"""Transactions of a file store: what makes new spans durable and slots of old ones free."""

from __future__ import annotations

import logging
import sqlite3
import threading
import time

from mii_hcache.storage.catalog import Catalog
from mii_hcache.storage.index import FileIndex
from mii_hcache.storage.presence import AWAY_ERRNOS, Presence
from mii_hcache.storage.room import Room, Watermarks
from mii_hcache.storage.segments import Segments
from mii_hcache.storage.trouble import Trouble

_log = logging.getLogger(__name__)

_TICKS_INTERVAL_S = 30.0
"""How often last uses of old spans are written; a crash forgets that much of the order of eviction."""
_RELIEF_INTERVAL_S = 60.0
"""How long evictions for the catalog's sake wait after one that did not help."""


class Commits:
    """Commits what the index has gathered, one transaction at a time. Any thread; blocks on I/O."""

    def __init__(
        self,
        index: FileIndex,
        segments: Segments,
        catalog: Catalog,
        presence: Presence,
        *,
        is_strict: bool = False,
        watermarks: Watermarks | None = None,
    ) -> None:
        """`presence` is told of a device that fails. `is_strict`: payloads and rows outlive a power cut, see `format`.
        `watermarks`: of the room."""
        self._index = index
        self._segments = segments
        self._catalog = catalog
        self._presence = presence
        self._is_strict = is_strict
        self.room = Room(index, segments, lambda: self.run(publish=False), watermarks)
        self._lock = threading.Lock()
        self._ticks_due_s = self._relief_due_s = 0.0
        self._must_last = False
        self._unsafe_before: dict[int, int] = {}
        """By segment: spans of smaller generations may have lost bytes to a sync that failed, which the disk's cache
        still shows."""
        self._trouble = Trouble(_log)

    def deletions_must_last(self) -> None:
        """Somebody deleted: the next transaction outlives a power cut, and all before it, for what was deleted may have
        been evicted by one that does not."""
        self._must_last = True

    def run(self, *, publish: bool, is_last: bool = False) -> bool:
        """One transaction: deletions, with `publish` also waiting spans; with `is_last` everything. False when the
        catalog refused it."""
        with self._lock:
            if is_last:
                self._ticks_due_s = 0.0
            error = self._transact(publish=publish)
            if error is not None and "full" in str(error) and time.monotonic() >= self._relief_due_s:
                self.room.relieve()
                error = self._transact(publish=publish)
                if error is not None:  # others eat what is given back: do not feed them everything
                    self._relief_due_s = time.monotonic() + _RELIEF_INTERVAL_S
            if error is not None:
                self._trouble.tell("the catalog cannot be written (%s); new spans are not durable", error)
                return False
            self.room.erase(self._index.take_erasable())
            with self._index.lock:
                empty = self._index.pool.take_empty()
            if empty:
                self._segments.remove(empty)
                with self._index.lock:
                    self._index.pool.forget_bytes()
            return True

    def _transact(self, *, publish: bool) -> sqlite3.Error | None:
        """One try of a commit; the error when the catalog refused it. Lock held."""
        now_s = time.monotonic()
        ticks = publish and now_s >= self._ticks_due_s
        if ticks:
            self._ticks_due_s = now_s + _TICKS_INTERVAL_S
        work = self._index.take_work(publish=publish, ticks=ticks)
        written = {place.segment for span in work.add for place in span.places} if self._is_strict else set()
        failed = self._segments.sync(written)
        for number in failed:
            self._unsafe_before[number] = self._index.next_generation()
        for span in work.add:
            if any(span.generation < self._unsafe_before.get(place.segment, 0) for place in span.places):
                self._index.remove_exactly(span, "evicted")
                self._index.count_drop()
        for sync_error in failed.values():
            if sync_error.errno in AWAY_ERRNOS:
                self._presence.failed(sync_error)
        rows = self._index.rows_of(work)
        drop = [(span.record.span_id, span.generation) for span in work.drop]
        must_last, self._must_last = self._must_last, False
        is_owed = self._catalog.has_undurable and (must_last or (publish and self._is_strict))
        try:
            if rows or drop or work.used or is_owed:
                durable = must_last or (publish and self._is_strict) or any(span.erase for span in work.drop)
                self._catalog.commit(add=rows, drop=drop, used=work.used, durable=durable)
        except sqlite3.Error as error:
            self._index.work_failed(work)
            self._must_last |= must_last
            if ticks:
                self._ticks_due_s = 0.0
            return error
        self._index.work_done(work)
        return None
