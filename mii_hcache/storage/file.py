"""Spans in files, durable: slots in segments under a catalog. `format.py` says what lies on disk and in which order."""

from __future__ import annotations

import errno
import logging
import sqlite3
import threading
import time
from array import array
from collections.abc import Iterable, Sequence
from contextlib import ExitStack

from crc32c import crc32c

from mii_hcache.core.identity import SpanId
from mii_hcache.errors import ConfigError, CorruptChunkError
from mii_hcache.storage.base import ChunkRead, ChunkStore, ReadOutcome, SpanRecord, StoreStats
from mii_hcache.storage.catalog import Catalog
from mii_hcache.storage.format import SlotHeader
from mii_hcache.storage.index import FileIndex, HeldSpan
from mii_hcache.storage.lanes import Lanes
from mii_hcache.storage.open_io import open_io
from mii_hcache.storage.pulse import Pulse
from mii_hcache.storage.recovery import recover
from mii_hcache.storage.room import Room
from mii_hcache.storage.segment import StaleSlotError
from mii_hcache.storage.segments import Segments, SlotsArriving
from mii_hcache.storage.slots import Places, SlotPool
from mii_hcache.storage.state_dir import StateDir
from mii_hcache.storage.trouble import Trouble

_log = logging.getLogger(__name__)

_MIN_SEGMENT_BYTES = 64 << 20
_SEGMENTS_PER_STORE = 128
_TICKS_INTERVAL_S = 30.0
"""How often last uses of old spans are written; a crash forgets that much of the order of eviction."""
_RELIEF_INTERVAL_S = 60.0
"""How long evictions for the catalog's sake wait after one that did not help."""


class FileStore(ChunkStore):
    """Bounded, durable store in a state directory. Safe from any thread; locks are never held over I/O on chunks.

    `put` blocks on writes, `get_into` on reads, `flush` and `close` on the disk's cache, `delete` on nothing. A span is
    readable as soon as `put` returns, and durable after `flush` or at latest about `flush_interval_s` later. Bytes of
    deleted spans leave the disk with the next commit, where the file system can punch holes.

    A full or failing disk never raises: `put` evicts, else drops and counts. While the catalog cannot be written, spans
    stay readable, and are tried again with every flush.
    """

    name = "file"

    def __init__(
        self,
        state_dir: StateDir,
        capacity_bytes: int,
        *,
        num_threads: int | None = None,
        flush_interval_s: float | None = 0.2,
        flush_bytes: int = 64 << 20,
        segment_bytes: int | None = None,
        io: str = "auto",
    ) -> None:
        """Opens what the directory holds, evicts down to `capacity_bytes` (of segment files on disk). Blocks on I/O.

        `num_threads` wait for one batch of reads and verify it; None leaves it to the backend. Waiting spans are
        committed after `flush_interval_s` or `flush_bytes`; None leaves it to `flush`. `segment_bytes`: size of new
        segment files, by default a small share of the capacity. `io`: how bytes get to the disk and back, see
        `open_io`.
        """
        if capacity_bytes <= 0:
            raise ConfigError(f"capacity_bytes must be > 0, got {capacity_bytes}")
        self._capacity_bytes = capacity_bytes
        self._flush_bytes = flush_bytes
        self._commit_lock = threading.Lock()
        self._ticks_due_s = self._relief_due_s = 0.0
        self._write_trouble = Trouble(_log)
        self._catalog_trouble = Trouble(_log)
        with ExitStack() as undo:
            self._catalog = Catalog(state_dir.catalog, state_dir.read_store_uuid())
            undo.callback(self._catalog.close)
            self._store_uuid = self._catalog.store_uuid
            if state_dir.read_store_uuid() is None:
                state_dir.write_store_uuid(self._store_uuid)
            self.io, self.io_reason = open_io(io)
            undo.callback(self.io.close)
            self._segments = Segments(state_dir.segments, self._store_uuid, self.io)
            undo.callback(self._segments.close)
            if segment_bytes is None:
                segment_bytes = max(_MIN_SEGMENT_BYTES, capacity_bytes // _SEGMENTS_PER_STORE)
            pool = SlotPool(capacity_bytes, segment_bytes)
            rows, self.notes = recover(self._catalog, self._segments, pool)
            self._index = FileIndex(pool, self._catalog.first_generation(), rows)
            self._room = Room(self._index, self._segments, lambda: self._commit(publish=False))
            self._room.shrink()
            undo.pop_all()
        self._lanes = Lanes(num_threads or self.io.num_threads, "hcache-read")
        self._pulse = None if flush_interval_s is None else Pulse(self.flush, flush_interval_s, "hcache-commit")

    def put(self, record: SpanRecord, chunks: Sequence[memoryview]) -> bool:
        record.check_chunks(chunks)
        views = [chunk.cast("B") for chunk in chunks]
        return self.put_checked(record, views, None)

    def put_checked(self, record: SpanRecord, chunks: Sequence[memoryview], crcs: Sequence[int] | None) -> bool:
        """`put` of byte views whose CRC32Cs were taken when the bytes were made: damage since then is found."""
        with self._index.operation() as is_open:
            if self._index.find(record.span_id) is not None:
                self._index.touch([record.span_id])
                return True
            if not is_open or not self._write(record, chunks, crcs):
                self._drop()
                return False
        if self._pulse is not None:
            self._pulse.poke(at_once=self._index.waiting_bytes() >= self._flush_bytes)
        return True

    def find(self, span_id: SpanId) -> SpanRecord | None:
        return self._index.find(span_id)

    def why_missing(self, span_id: SpanId) -> str:
        return self._index.why_missing(span_id)

    def get_into(self, reads: Sequence[ChunkRead]) -> ReadOutcome:
        with self._index.operation() as is_open:
            found = self._index.begin_reads(reads) if is_open else []
            try:
                slots = [(span.places[idx], read.out) for (span, idx), read in zip(found, reads, strict=False)]
                with self._segments.reading(slots) as arriving:
                    num_ok, reason = self._lanes.run(
                        len(found), lambda idx: self._finish_read(arriving, idx, *found[idx], reads[idx].out)
                    )
                if reason is not None:
                    self._forget_damaged(*found[num_ok], reason)
            finally:
                self._index.end_reads(found)
            with self._index.lock:
                self._index.counters.read_bytes += sum(read.out.nbytes for read in reads[:num_ok])
        if reason is None and num_ok < len(reads):
            reason = "missing"
        return ReadOutcome(num_ok=num_ok, reason=reason)

    def lend(self, buffer: memoryview) -> None:
        self.io.lend(buffer)

    def take_back(self, buffer: memoryview) -> None:
        self.io.take_back(buffer)

    def touch(self, span_ids: Iterable[SpanId]) -> None:
        self._index.touch(span_ids)

    def pin(self, span_ids: Iterable[SpanId]) -> None:
        self._index.pin(span_ids, always=False)

    def pin_always(self, span_ids: Iterable[SpanId]) -> None:
        """`pin` that also counts for spans that are not here yet: for a store that holds spans in several tiers."""
        self._index.pin(span_ids, always=True)

    def unpin(self, span_ids: Iterable[SpanId]) -> None:
        self._index.unpin(span_ids)

    def delete(self, span_ids: Iterable[SpanId]) -> int:
        num_deleted = self._index.remove(span_ids, "deleted")
        if num_deleted and self._pulse is not None:
            self._pulse.poke()
        return num_deleted

    def flush(self) -> None:
        with self._index.operation() as is_open:
            if is_open:
                self._commit(publish=True)

    def stats(self) -> StoreStats:
        with self._index.lock:
            counters = self._index.counters
            return StoreStats(
                num_spans=len(self._index),
                num_bytes=counters.num_bytes,
                capacity_bytes=self._capacity_bytes,
                put_bytes=counters.put_bytes,
                read_bytes=counters.read_bytes,
                evicted_spans=counters.evicted_spans,
                dropped_spans=counters.dropped_spans,
                corrupt_chunks=counters.corrupt_chunks,
            )

    @property
    def disk_bytes(self) -> int:
        """Bytes that the segment files occupy; never above the capacity."""
        with self._index.lock:
            return self._index.pool.disk_bytes

    def close(self) -> None:
        if not self._index.close():
            return
        if self._pulse is not None:
            self._pulse.stop()
        self._ticks_due_s = 0.0
        self._commit(publish=True)
        self._index.clear()
        self._lanes.close()
        self._segments.close()
        self._catalog.close()

    def _write(self, record: SpanRecord, chunks: Sequence[memoryview], crcs: Sequence[int] | None) -> bool:
        """Write a span and publish it. False when no room could be made or the disk failed."""
        if crcs is None:
            crcs = [crc32c(chunk) for chunk in chunks]
        for _ in range(2):
            places = self._room.reserve(record.layout)
            if places is None:
                return False
            generation = self._index.next_generation()
            span = HeldSpan(record=record, generation=generation, places=Places(places), crcs=array("I", crcs))
            try:
                headers = [self._header(span, chunk_idx) for chunk_idx in range(len(chunks))]
                self._segments.write(zip(places, headers, chunks, strict=True))
            except OSError as error:
                self._write_trouble.tell("spans cannot be written to files (%s): evicting, else dropping them", error)
                self._room.erase(places)
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    return False
                self._room.pause_growth()
                continue
            except BaseException:
                self._room.erase(places)
                raise
            if not self._index.publish(span):
                self._room.give_back(places)
            return True
        return False

    def _drop(self, span: HeldSpan | None = None) -> None:
        """Count a span that could not be kept; forget it if it was readable already."""
        if span is not None:
            self._index.remove_exactly(span, "evicted")
        with self._index.lock:
            self._index.counters.dropped_spans += 1

    def _header(self, span: HeldSpan, chunk_idx: int) -> SlotHeader:
        chunk = span.record.layout.chunks[chunk_idx]
        return SlotHeader(
            store_uuid=self._store_uuid,
            span_id=span.record.span_id,
            layer_idx=chunk.layer_idx,
            kind=chunk.kind,
            generation=span.generation,
            num_bytes=chunk.num_bytes,
            crc=span.crcs[chunk_idx],
        )

    def _finish_read(
        self, arriving: SlotsArriving, idx: int, span: HeldSpan, chunk_idx: int, out: memoryview
    ) -> str | None:
        try:
            arriving.finish(idx, self._header(span, chunk_idx))
            if crc32c(out) != span.crcs[chunk_idx]:
                raise CorruptChunkError("wrong checksum")
        except StaleSlotError:
            return "missing"
        except (CorruptChunkError, OSError):
            return "corrupt"
        return None

    def _forget_damaged(self, span: HeldSpan, chunk_idx: int, reason: str) -> None:
        """Forget a span that a read found stale or damaged."""
        is_corrupt = reason == "corrupt"
        with self._index.lock:
            self._index.counters.corrupt_chunks += is_corrupt
        if self._index.remove_exactly(span, "corrupt" if is_corrupt else "evicted"):
            segment, slot = span.places[chunk_idx]
            _log.warning(
                "file: chunk %d of span %s is %s (segment %d, slot %d); span forgotten",
                *(chunk_idx, span.record.span_id.hex()[:16], reason, segment, slot),
            )
            if self._pulse is not None:
                self._pulse.poke()

    def _commit(self, *, publish: bool) -> bool:
        """One transaction: deletions, with `publish` also waiting spans. False when the catalog refused it."""
        with self._commit_lock:
            error = self._transact(publish=publish)
            if error is not None and "full" in str(error) and time.monotonic() >= self._relief_due_s:
                self._room.relieve()
                error = self._transact(publish=publish)
                if error is not None:  # others eat what is given back: do not feed them everything
                    self._relief_due_s = time.monotonic() + _RELIEF_INTERVAL_S
            if error is not None:
                self._catalog_trouble.tell("the catalog cannot be written (%s); new spans are not durable", error)
                return False
            self._room.erase(self._index.take_erasable())
            with self._index.lock:
                empty = self._index.pool.take_empty()
            if empty:
                self._segments.remove(empty)
                with self._index.lock:
                    self._index.pool.forget_bytes()
            return True

    def _transact(self, *, publish: bool) -> sqlite3.Error | None:
        """One try of a commit; the error when the catalog refused it. Commit lock held."""
        now_s = time.monotonic()
        ticks = publish and now_s >= self._ticks_due_s
        if ticks:
            self._ticks_due_s = now_s + _TICKS_INTERVAL_S
        work = self._index.take_work(publish=publish, ticks=ticks)
        failed = self._segments.sync({place.segment for span in work.add for place in span.places})
        for span in work.add:
            if any(place.segment in failed for place in span.places):
                self._drop(span)
        rows = self._index.rows_of(work)
        drop = [(span.record.span_id, span.generation) for span in work.drop]
        try:
            if rows or drop or work.used or (publish and self._catalog.has_undurable):
                self._catalog.commit(add=rows, drop=drop, used=work.used, durable=publish)
        except sqlite3.Error as error:
            self._index.work_failed(work)
            return error
        self._index.work_done(work)
        return None
