"""Spans in DRAM."""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from crc32c import crc32c

from mii_hcache.core.identity import SpanId
from mii_hcache.storage.base import ChunkStore, StoreStats
from mii_hcache.storage.borrowing import BorrowedChunks, PlainMemory, SpanMemory
from mii_hcache.storage.copying import copy_bytes, shared_copying
from mii_hcache.storage.directions import ChunkWanted
from mii_hcache.storage.dram import SpareBuffers
from mii_hcache.storage.eviction import Loss, order_named
from mii_hcache.storage.lanes import Lanes
from mii_hcache.storage.reasons import Reasons
from mii_hcache.storage.records import ChunkRead, ReadOutcome, SpanRecord

_log = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class MemorySpan:
    """A span as it lies in DRAM. Its bytes are never changed while anybody holds it, also after it was removed."""

    record: SpanRecord
    buffer: memoryview
    """All chunks."""
    crcs: Sequence[int]
    """CRC32C of the bytes that the writer gave, by chunk."""
    is_pinned: bool = False
    """Whether `buffer` is."""
    address: int = 0
    """Of `buffer`."""
    num_holders: int = 0
    num_borrowers: int = 0
    """Of the holders, those that count against the capacity and keep it from eviction."""
    alive: bool = True
    is_erased: bool = False
    """Its memory is not kept for the next one: what was deleted leaves DRAM."""

    def chunk(self, chunk_idx: int) -> memoryview:
        """Bytes of one chunk."""
        return self.record.layout.chunks[chunk_idx].cut(self.buffer)


class MemoryStore(ChunkStore):
    """Bounded store in DRAM; nothing survives the process. Bytes are copied in, copied out or lent, and verified on
    every read.

    One short lock, never held while bytes are copied. No method blocks on I/O; `put` and `get_into` take the time of
    their copies.
    """

    name = "memory"

    def __init__(
        self, capacity_bytes: int, *, num_threads: int = 4, evict: str = "lru", memory: SpanMemory | None = None
    ) -> None:
        """`capacity_bytes`: payload. `num_threads` copy and verify one batch of reads. What is lent is verified by its
        borrower alone: nothing is copied, and handing a chunk to another thread takes the interpreter longer than
        lending it. Writes are copied by threads of their own, which all stores share (`storage.copying`). `evict`:
        "lru" or "cost", see `eviction`. `memory`: where the bytes lie, None for the system's."""
        self._memory = memory or PlainMemory()
        self._capacity_bytes = capacity_bytes
        self._lock = threading.Lock()
        self._spans: dict[SpanId, MemorySpan] = {}
        self._order = order_named(evict, lambda span_id: self._spans[span_id].record.num_bytes)
        self._reasons = Reasons()
        self._spare = SpareBuffers()
        self._lanes = Lanes(num_threads, "hcache-memory")
        self._closed = False
        self._used_bytes = 0
        self._reserved_bytes = 0
        self._lent_bytes = 0
        """Of spans that were removed while they were lent."""
        self._put_bytes = self._read_bytes = 0
        self._evicted_spans = self._dropped_spans = self._corrupt_chunks = 0

    def put(self, record: SpanRecord, chunks: Sequence[memoryview]) -> bool:
        record.check_chunks(chunks)
        with self._lock:
            if record.span_id in self._spans:
                self._order.use([record.span_id])
                return True
            if self._closed or not self._make_room(record.num_bytes):
                self._dropped_spans += 1
                return False
            self._reserved_bytes += record.num_bytes
            buffer = self._spare.take(record.num_bytes)
            self._spare.shrink(self._capacity_bytes - self._taken_bytes)
        span: MemorySpan | None = None
        try:
            if buffer is None:
                buffer = self._memory.new_buffer(record.num_bytes)
            span = _copy_in(record, chunks, buffer)
            span.is_pinned = self._memory.is_pinned(buffer)
            span.address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        except (MemoryError, OSError) as error:
            _log.warning("no memory for a span of %d bytes (%s); not kept", record.num_bytes, error)
        finally:
            with self._lock:
                self._reserved_bytes -= record.num_bytes
                kept = self._publish(span)
        return kept

    def find(self, span_id: SpanId) -> SpanRecord | None:
        span = self._spans.get(span_id)
        return None if span is None else span.record

    def why_missing(self, span_id: SpanId) -> str:
        with self._lock:
            return self._reasons.of(span_id)

    def get_into(self, reads: Sequence[ChunkRead]) -> ReadOutcome:
        with self._lock:
            found = self._hold(reads)

        def copy_out(idx: int) -> str | None:
            span, chunk_idx = found[idx]
            out = reads[idx].out
            copy_bytes(out, span.chunk(chunk_idx))  # and verified while it is in the CPU's cache
            return None if crc32c(out) == span.crcs[chunk_idx] else "corrupt"

        try:
            num_ok, reason = self._lanes.run(len(found), copy_out)
        finally:
            with self._lock:
                for span, _ in found:
                    self._let_go(span)
        with self._lock:
            self._read_bytes += sum(read.out.nbytes for read in reads[:num_ok])
            if reason is not None:
                self._forget_damaged(*found[num_ok])
        if reason is None and num_ok < len(reads):
            reason = "missing"
        return ReadOutcome(num_ok=num_ok, reason=reason)

    def borrow(self, wanted: Sequence[ChunkWanted], *, must_be_pinned: bool = False) -> BorrowedChunks | None:
        with self._lock:
            found = self._hold(wanted)
            if must_be_pinned and not all(span.is_pinned for span, _ in found):
                for span, _ in found:
                    self._let_go(span)
                return None
            for span, _ in found:
                span.num_borrowers += 1
                self._order.pin([span.record.span_id])

        lent: list[memoryview] = []
        reason = None
        try:
            for span, chunk_idx in found:
                chunk = span.chunk(chunk_idx)
                if crc32c(chunk) != span.crcs[chunk_idx]:
                    reason = "corrupt"
                    break
                lent.append(chunk)
        finally:
            num_ok = len(lent)
            self._take_back(found[num_ok:])
        with self._lock:
            self._read_bytes += sum(one.num_bytes for one in wanted[:num_ok])
            if reason is not None:
                self._forget_damaged(*found[num_ok])
        if reason is None and num_ok < len(wanted):
            reason = "missing"
        return BorrowedChunks(
            lent,
            ReadOutcome(num_ok=num_ok, reason=reason),
            partial(self._take_back, found[:num_ok]),
            [span.address + span.record.layout.chunks[chunk_idx].offset for span, chunk_idx in found[:num_ok]],
        )

    def touch(self, span_ids: Iterable[SpanId]) -> None:
        with self._lock:
            self._order.use(span_ids)

    def pin(self, span_ids: Iterable[SpanId]) -> None:
        with self._lock:
            self._order.pin(span_id for span_id in span_ids if span_id in self._spans)

    def unpin(self, span_ids: Iterable[SpanId]) -> None:
        with self._lock:
            self._order.unpin(span_ids)

    def weigh(self, loss: Loss) -> None:
        with self._lock:
            self._order.weigh(loss)

    def pin_always(self, span_ids: Iterable[SpanId]) -> None:
        """`pin` that also counts for spans that are not here yet: for a store that holds spans in several tiers."""
        with self._lock:
            self._order.pin(span_ids)

    def delete(self, span_ids: Iterable[SpanId]) -> int:
        with self._lock:
            gone = [span_id for span_id in span_ids if self._remove(span_id, is_erased=True)]
            self._reasons.note(gone, "deleted")
            self._spare.shrink(0)  # deleted bytes leave DRAM, too
        return len(gone)

    def expire(self, since_s: float) -> list[SpanId]:
        with self._lock:
            gone = [SpanId(key) for key in self._order.unused_since(since_s)]
            for span_id in gone:
                self._remove(span_id, is_erased=True)
            self._reasons.note(gone, "expired")
            self._spare.shrink(0)
        return gone

    @contextmanager
    def held(self, span_id: SpanId) -> Iterator[MemorySpan | None]:
        """The span itself, without a copy and unverified, for the time of a `with` block: for a writer that passes its
        CRCs on. None when it is not here."""
        with self._lock:
            span = self._spans.get(span_id)
            if span is not None:
                span.num_holders += 1
        try:
            yield span
        finally:
            with self._lock:
                if span is not None:
                    self._let_go(span)

    def span_ids(self) -> list[SpanId]:
        """All spans held, in no order."""
        with self._lock:
            return list(self._spans)

    def flush(self) -> None:
        """Nothing here survives a crash."""

    def stats(self) -> StoreStats:
        with self._lock:
            return StoreStats(
                num_spans=len(self._spans),
                num_bytes=self._used_bytes,
                capacity_bytes=self._capacity_bytes,
                put_bytes=self._put_bytes,
                read_bytes=self._read_bytes,
                evicted_spans=self._evicted_spans,
                dropped_spans=self._dropped_spans,
                corrupt_chunks=self._corrupt_chunks,
            )

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for span_id in list(self._spans):
                self._remove(span_id)
            self._spare.shrink(0)
        self._lanes.close()

    @property
    def _taken_bytes(self) -> int:
        """Lock held."""
        return self._used_bytes + self._reserved_bytes + self._lent_bytes

    def _hold(self, reads: Sequence[ChunkRead] | Sequence[ChunkWanted]) -> list[tuple[MemorySpan, int]]:
        """Take hold of the leading chunks that are here, each by itself. Lock held."""
        found: list[tuple[MemorySpan, int]] = []
        for read in reads:
            span = self._spans.get(read.span_id)
            chunk_idx = None if span is None else read.chunk_of(span.record)
            if span is None or chunk_idx is None:
                break
            span.num_holders += 1
            found.append((span, chunk_idx))
        self._order.use({span.record.span_id for span, _ in found})
        return found

    def _take_back(self, lent: Sequence[tuple[MemorySpan, int]]) -> None:
        """What was lent is not read any more."""
        with self._lock:
            for span, _ in lent:
                self._order.unpin([span.record.span_id])
                span.num_borrowers -= 1
                if not span.alive and not span.num_borrowers:
                    self._lent_bytes -= span.record.num_bytes
                self._let_go(span)

    def _make_room(self, num_bytes: int) -> bool:
        """Evict until `num_bytes` fit; evicts nothing when that cannot be reached. Lock held."""
        excess = self._taken_bytes + num_bytes - self._capacity_bytes
        victims: list[SpanId] = []
        for span_id in self._order.victims():
            if excess <= 0:
                break
            victims.append(span_id)
            excess -= self._spans[span_id].record.num_bytes
        if excess > 0:
            return False
        for span_id in victims:
            self._remove(span_id)
        self._reasons.note(victims, "evicted")
        self._evicted_spans += len(victims)
        return True

    def _publish(self, span: MemorySpan | None) -> bool:
        """Lock held."""
        if span is None or self._closed:
            self._dropped_spans += 1
            return False
        record = span.record
        if record.span_id in self._spans:
            self._spare.give(span.buffer)
        else:
            self._spans[record.span_id] = span
            self._order.add(record.span_id, record.parent_id, record.span_idx)
            self._reasons.clear(record.span_id)
            self._used_bytes += record.num_bytes
            self._put_bytes += record.num_bytes
        return True

    def _remove(self, span_id: SpanId, *, is_erased: bool = False) -> bool:
        """Lock held."""
        span = self._spans.pop(span_id, None)
        if span is None:
            return False
        self._order.remove(span_id)
        self._used_bytes -= span.record.num_bytes
        if span.num_borrowers:
            self._lent_bytes += span.record.num_bytes
        span.alive = False
        span.is_erased = is_erased
        span.num_holders += 1
        self._let_go(span)
        return True

    def _let_go(self, span: MemorySpan) -> None:
        """One holder less; the last holder of a removed span gives its memory to the next one. Lock held."""
        span.num_holders -= 1
        if not span.alive and not span.num_holders and not (self._closed or span.is_erased):
            self._spare.give(span.buffer)

    def _forget_damaged(self, span: MemorySpan, chunk_idx: int) -> None:
        """Lock held."""
        self._corrupt_chunks += 1
        span_id = span.record.span_id
        if self._spans.get(span_id) is span:
            self._remove(span_id)
            self._reasons.note([span_id], "corrupt")
            _log.warning("memory: chunk %d of span %s is damaged; span forgotten", chunk_idx, span_id.hex()[:16])


def _copy_in(record: SpanRecord, chunks: Sequence[memoryview], buffer: memoryview) -> MemorySpan:
    sources = [chunk.cast("B") for chunk in chunks]
    span = MemorySpan(record=record, buffer=buffer, crcs=[crc32c(source) for source in sources])
    shared_copying().copy((span.chunk(chunk_idx), source) for chunk_idx, source in enumerate(sources))
    return span
