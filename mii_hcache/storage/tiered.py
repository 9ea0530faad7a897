"""DRAM in front of files."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from mii_hcache.core.identity import SpanId
from mii_hcache.storage.base import ChunkStore, StoreStats
from mii_hcache.storage.borrowing import BorrowedChunks
from mii_hcache.storage.directions import ChunkWanted
from mii_hcache.storage.drafts import FileDrafts
from mii_hcache.storage.dram import new_buffer
from mii_hcache.storage.file import FileStore
from mii_hcache.storage.memory import MemoryStore
from mii_hcache.storage.presence import DEADLINE_S
from mii_hcache.storage.records import ChunkRead, ReadOutcome, SpanRecord
from mii_hcache.storage.striped import StripedStore
from mii_hcache.storage.workers import StalledError, Workers

_log = logging.getLogger(__name__)

_PROMOTED_SHARE = 0.5
"""Share of DRAM that may wait to be copied into it from files: more would drive out what was copied a moment ago."""


class TieredStore(ChunkStore):
    """A MemoryStore in front of files; owns both. Safe from any thread.

    `put` copies into DRAM, where the span stays pinned until a background thread has written it to the file tier; it
    blocks, at most `put_wait_s`, only while DRAM is full of unwritten spans. A span that finds no room in files lives
    on in DRAM. A read is served by DRAM, else by files; damage in DRAM falls back to files. After the last chunk of a
    span was read from files, the span is copied into DRAM in the background.

    `delete` waits for background copies of its spans that are in progress, `flush` for everything accepted before.
    """

    name = "tiered"

    def __init__(
        self,
        memory: MemoryStore,
        file: FileStore | StripedStore,
        *,
        num_writers: int = 2,
        put_wait_s: float = 0.25,
        promote: bool = True,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        """`num_writers` background threads write spans, and promote when there is nothing to write. A promotion that
        takes longer than `deadline_s` is left to itself."""
        self._memory = memory
        self._file = file
        self._put_wait_s = put_wait_s
        self._promote = promote
        self._deadline_s = deadline_s
        self._promoters = Workers(num_writers, "hcache-promote")
        self._changed = threading.Condition()
        """Guards what follows; notified when any of it changes."""
        self._to_write: OrderedDict[SpanId, int] = OrderedDict()
        self._to_promote: OrderedDict[SpanId, int] = OrderedDict()
        """With its bytes; in `_to_write`, 0."""
        self._claimed: set[SpanId] = set()
        """Being written, promoted or deleted now, by one thread each."""
        self._num_eased = 0
        """How often room in DRAM may have come: something was unpinned, or deleted."""
        self._num_placing = 0
        """Puts that may have taken room in DRAM and are not queued yet."""
        self._closing = False
        self._most_promoted_bytes = _PROMOTED_SHARE * memory.stats().capacity_bytes
        self._promoted_bytes = 0
        """Of `_to_promote`."""
        self._put_bytes = self._read_bytes = self._dropped_spans = 0
        self._writers = [
            threading.Thread(target=self._work, name=f"hcache-write-{idx}", daemon=True) for idx in range(num_writers)
        ]
        for writer in self._writers:
            writer.start()

    def put(self, record: SpanRecord, chunks: Sequence[memoryview]) -> bool:
        record.check_chunks(chunks)
        span_id = record.span_id
        if self.find(span_id) is not None:
            self.touch([span_id])
            return True
        kept = not self._closing and self._accept(record, chunks)
        with self._changed:
            if kept:
                self._put_bytes += record.num_bytes
            else:
                self._dropped_spans += 1
        return kept

    def put_through(self, record: SpanRecord, chunks: Sequence[memoryview]) -> bool:
        return self.put(record, chunks) if self.find(record.span_id) is not None else self._file.put(record, chunks)

    @property
    def drafts(self) -> FileDrafts | None:
        return self._file.drafts

    def find(self, span_id: SpanId) -> SpanRecord | None:
        return self._memory.find(span_id) or self._file.find(span_id)

    def tier_of(self, span_id: SpanId) -> str | None:
        return self._memory.tier_of(span_id) or self._file.tier_of(span_id)

    def why_missing(self, span_id: SpanId) -> str:
        reason = self._file.why_missing(span_id)
        return reason if reason != "not_saved" else self._memory.why_missing(span_id)

    def get_into(self, reads: Sequence[ChunkRead]) -> ReadOutcome:
        failed: dict[SpanId, str | None] = {}
        todo = list(range(len(reads)))
        while True:
            near = [idx for idx in todo if reads[idx].span_id not in failed and self._memory.find(reads[idx].span_id)]
            if not near:
                break
            outcome = self._memory.get_into([reads[idx] for idx in near])
            done = set(near[: outcome.num_ok])
            todo = [idx for idx in todo if idx not in done]
            if outcome.num_ok < len(near):
                failed[reads[near[outcome.num_ok]].span_id] = outcome.reason
        num_ok, reason = len(reads), None
        if todo:
            outcome = self._file.get_into([reads[idx] for idx in todo])
            if outcome.num_ok < len(todo):
                num_ok = todo[outcome.num_ok]
                in_memory = failed.get(reads[num_ok].span_id)
                reason = "corrupt" if in_memory == "corrupt" else outcome.reason
            self._promote_later([reads[idx] for idx in todo[: outcome.num_ok]])
        with self._changed:
            self._read_bytes += sum(read.out.nbytes for read in reads[:num_ok])
        return ReadOutcome(num_ok=num_ok, reason=reason)

    def borrow(self, wanted: Sequence[ChunkWanted], *, must_be_pinned: bool = False) -> BorrowedChunks | None:
        if not all(self._memory.find(one.span_id) for one in wanted):
            return None
        borrowed = self._memory.borrow(wanted, must_be_pinned=must_be_pinned)
        if borrowed is None:
            return None
        num_ok = borrowed.outcome.num_ok
        if num_ok < len(wanted) and self._file.find(wanted[num_ok].span_id) is not None:
            borrowed.give_back()  # files have what DRAM has lost a moment ago
            return None
        with self._changed:
            self._read_bytes += sum(one.num_bytes for one in wanted[:num_ok])
        return borrowed

    def lend(self, buffer: memoryview) -> None:
        self._file.lend(buffer)

    def take_back(self, buffer: memoryview) -> None:
        self._file.take_back(buffer)

    def weigh(self, loss: Callable[[int], float]) -> None:
        self._file.weigh(loss)  # what leaves DRAM is not lost

    def touch(self, span_ids: Iterable[SpanId]) -> None:
        span_ids = list(span_ids)
        self._memory.touch(span_ids)
        self._file.touch(span_ids)

    def pin(self, span_ids: Iterable[SpanId]) -> None:
        """Also what cannot be found now: it may be by the time that it is unpinned, and the pin undone another's."""
        span_ids = list(span_ids)
        self._memory.pin_always(span_ids)
        self._file.pin_always(span_ids)

    def unpin(self, span_ids: Iterable[SpanId]) -> None:
        span_ids = list(span_ids)
        self._memory.unpin(span_ids)
        self._file.unpin(span_ids)

    def delete(self, span_ids: Iterable[SpanId]) -> int:
        doomed = set(span_ids)
        with self._changed:
            self._changed.wait_for(lambda: doomed.isdisjoint(self._claimed))
            self._claimed |= doomed
        try:
            num_known = sum(self.find(span_id) is not None for span_id in doomed)
            self._memory.delete(doomed)
            self._file.delete(doomed)
        finally:
            with self._changed:
                self._claimed -= doomed
                self._num_eased += 1
                self._changed.notify_all()
        return num_known

    def expire(self, since_s: float) -> list[SpanId]:
        return list({*self._file.expire(since_s), *self._memory.expire(since_s)})

    def flush(self) -> None:
        with self._changed:
            accepted = set(self._to_write) | self._claimed
            self._changed.wait_for(lambda: accepted.isdisjoint(self._claimed) and accepted.isdisjoint(self._to_write))
        self._file.flush()

    def stats(self) -> StoreStats:
        tiers = self.tier_stats()
        memory, file = tiers[self._memory.name], tiers[self._file.name]
        only_memory = [self._memory.find(i) for i in self._memory.span_ids() if self._file.find(i) is None]
        with self._changed:
            return StoreStats(
                num_spans=file.num_spans + len(only_memory),
                num_bytes=file.num_bytes + sum(record.num_bytes for record in only_memory if record is not None),
                capacity_bytes=memory.capacity_bytes + file.capacity_bytes,
                put_bytes=self._put_bytes,
                read_bytes=self._read_bytes,
                evicted_spans=file.evicted_spans,
                dropped_spans=self._dropped_spans + file.dropped_spans,
                corrupt_chunks=memory.corrupt_chunks + file.corrupt_chunks,
                unavailable=file.unavailable,
                num_away=file.num_away,
                evicted_ahead_spans=file.evicted_ahead_spans,
                put_waits=file.put_waits,
            )

    def tier_stats(self) -> dict[str, StoreStats]:
        """Each tier's own view, by its name."""
        return {tier.name: tier.stats() for tier in (self._memory, self._file)}

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._to_promote.clear()
            self._promoted_bytes = 0
            self._changed.notify_all()
        for writer in self._writers:
            writer.join()
        self._promoters.close(self._deadline_s)
        self._file.close()
        self._memory.close()

    def _accept(self, record: SpanRecord, chunks: Sequence[memoryview]) -> bool:
        """Put into DRAM and queue for the files; False when there was no room for `put_wait_s`."""
        span_id = record.span_id
        if record.num_bytes > self._memory.stats().capacity_bytes:
            return self._file.put(record, chunks)
        deadline_s = time.monotonic() + self._put_wait_s
        is_queued = False
        self._memory.pin_always([span_id])
        with self._changed:
            self._num_placing += 1
            num_eased = self._num_eased
        try:
            while not self._memory.put(record, chunks):
                with self._changed:
                    if not self._room_came(num_eased, deadline_s):
                        return False
                    num_eased = self._num_eased
            with self._changed:
                if self._closing:
                    return False  # nobody would write it
                if span_id not in self._to_write and self._file.find(span_id) is None:
                    self._to_write[span_id] = 0
                    is_queued = True
            return True
        finally:
            if not is_queued:
                self._memory.unpin([span_id])  # another writer's copy has a pin of its own
            with self._changed:
                self._num_placing -= 1
                self._num_eased += not is_queued
                self._changed.notify_all()

    def _room_came(self, num_eased: int, deadline_s: float) -> bool:
        """Wait until a put is worth another try, for as long as there is hope. `num_eased`: as it was before the last
        one, so that what came while that failed is not missed. Lock held."""
        self._num_placing -= 1  # or those who wait would wait for each other
        self._changed.notify_all()
        try:
            self._changed.wait_for(
                lambda: self._num_eased != num_eased or self._closing or not self._is_busy,
                max(0.0, deadline_s - time.monotonic()),
            )
        finally:
            self._num_placing += 1
        return self._num_eased != num_eased and not self._closing

    @property
    def _is_busy(self) -> bool:
        """Whether room may come by itself. Lock held."""
        return bool(self._to_write or self._claimed or self._num_placing)

    def _promote_later(self, reads: Sequence[ChunkRead]) -> None:
        if not self._promote:
            return
        for read in reads:
            record = self._file.find(read.span_id)
            if record is not None and read.chunk_of(record) == record.layout.num_chunks - 1:
                with self._changed:
                    waiting_bytes = self._promoted_bytes + record.num_bytes
                    is_room = not self._to_promote or waiting_bytes <= self._most_promoted_bytes
                    if is_room and read.span_id not in self._to_promote and not self._closing:
                        self._to_promote[read.span_id] = record.num_bytes
                        self._promoted_bytes += record.num_bytes
                        self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._next() is not None or (self._closing and not self._to_write))
                claim = self._next()
                if claim is None:
                    return
                queue, span_id = claim
                self._promoted_bytes -= queue.pop(span_id)
                self._claimed.add(span_id)
            try:
                if queue is self._to_write:
                    self._write(span_id)
                else:
                    is_wanted = threading.Event()
                    is_wanted.set()
                    try:
                        self._promoters.call(partial(self._copy_up, span_id, is_wanted.is_set), self._deadline_s)
                    finally:
                        is_wanted.clear()  # before the claim goes: who deletes no longer waits for a copy that hangs
            except StalledError as error:
                _log.warning("a span could not be copied from files into memory (%s)", error)
            except Exception:
                _log.exception("a background copy of span %s failed", span_id.hex()[:16])
            finally:
                if queue is self._to_write:
                    self._memory.unpin([span_id])
                with self._changed:
                    self._claimed.discard(span_id)
                    self._num_eased += 1
                    self._changed.notify_all()

    def _next(self) -> tuple[OrderedDict[SpanId, int], SpanId] | None:
        """What to do next: writes before promotions, in order, but not what another thread works on. Lock held."""
        for queue in (self._to_write, self._to_promote):
            for span_id in queue:
                if span_id not in self._claimed:
                    return queue, span_id
        return None

    def _write(self, span_id: SpanId) -> None:
        with self._memory.held(span_id) as span:
            if span is not None:
                chunks = [span.chunk(chunk_idx) for chunk_idx in range(span.record.layout.num_chunks)]
                self._file.put_checked(span.record, chunks, span.crcs)

    def _copy_up(self, span_id: SpanId, is_wanted: Callable[[], bool]) -> None:
        record = self._file.find(span_id)
        if record is None or self._memory.find(span_id) is not None:
            return
        buffer = new_buffer(record.num_bytes)
        reads = [record.read_of(chunk_idx, chunk.cut(buffer)) for chunk_idx, chunk in enumerate(record.layout.chunks)]
        if self._file.get_into(reads).num_ok == len(reads) and is_wanted():
            self._memory.put(record, [read.out for read in reads])
            if not is_wanted():  # since a moment ago: who deletes no longer waits for us
                self._memory.delete([span_id])
