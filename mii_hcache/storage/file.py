"""Spans in files, durable: slots in segments under a catalog. `format.py` says what lies on disk and in which order."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import TypeVar

from mii_hcache.core.identity import SpanId
from mii_hcache.errors import ConfigError
from mii_hcache.storage.base import ChunkStore, DeviceReader, StoreStats
from mii_hcache.storage.catalog import Catalog
from mii_hcache.storage.commits import Commits
from mii_hcache.storage.device_reads import DeviceReaders, FileDeviceReader
from mii_hcache.storage.directions import ChunkWanted, ReadDirections, SharedDraft, Writer
from mii_hcache.storage.drafts import FileDrafts
from mii_hcache.storage.file_directions import FileDirections, begin_shared
from mii_hcache.storage.format import SlotHeader
from mii_hcache.storage.index import FileIndex, HeldSpan
from mii_hcache.storage.open_space import open_space
from mii_hcache.storage.presence import DEADLINE_S, FIRST_PAUSE_S, Presence
from mii_hcache.storage.probe import try_to_write
from mii_hcache.storage.pulse import Pulse
from mii_hcache.storage.records import ChunkRead, ReadOutcome, SpanRecord
from mii_hcache.storage.recovery import recover
from mii_hcache.storage.room import Watermarks
from mii_hcache.storage.segments import Segments
from mii_hcache.storage.slots import SlotPool
from mii_hcache.storage.span_reader import SpanReader
from mii_hcache.storage.span_writer import SpanWriter
from mii_hcache.storage.state_dir import StateDir
from mii_hcache.storage.suspects import Suspects
from mii_hcache.storage.workers import StalledError, Workers

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_MIN_SEGMENT_BYTES = 64 << 20
_SEGMENTS_PER_STORE = 128
_MAX_PUTS = 16
"""Puts at a time, not counting those that hang."""
_PATIENCE = 3
"""Deadlines that a flush may take, which is more than one operation."""
_SLACK = 1.05
"""Who waits for an operation gives up a little after it counts as one that hangs."""


class FileStore(ChunkStore):
    """Bounded, durable store in a state directory. Safe from any thread; locks are never held over I/O on chunks.

    `put` blocks on writes, `get_into` on reads, `flush` and `close` on the catalog, `delete` on nothing. A span is
    readable as soon as `put` returns. After `flush`, or at latest about `flush_interval_s` later, it outlives the
    process, and with `durability` "strict" a power cut, too. Bytes of deleted spans leave the disk with the next
    commit, where the file system can punch holes; a flushed deletion outlives a power cut always.

    A full or failing disk never raises: `put` evicts, else drops and counts. While the catalog cannot be written, spans
    stay readable, and are tried again with every flush. A disk that fails or hangs is away until a probe succeeds (see
    `Presence`): nothing is found or put there, and nothing forgotten. All calls but `get_into` return in bounded time
    also while it hangs; what a hanging `put` was given is kept alive, and read, until the disk lets go of it.
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
        deadline_s: float = DEADLINE_S,
        first_pause_s: float = FIRST_PAUSE_S,
        durability: str = "relaxed",
        evict: str = "lru",
        watermarks: Watermarks | None = None,
    ) -> None:
        """Opens what the directory holds, evicts down to `capacity_bytes` (of segment files on disk). Blocks on I/O.

        `num_threads` wait for one batch of reads and verify it; None leaves it to the backend. Waiting spans are
        committed after `flush_interval_s` or `flush_bytes`; None leaves it to `flush`. `segment_bytes`: size of new
        segment files, by default a small share of the capacity. `io`: how bytes get to the disk and back, see
        `open_io`. `durability`: "strict" or "relaxed", see `format`. `evict`: "lru" or "cost", see `eviction`.
        `watermarks`: when a put finds room already made, None to make it when it is needed. `deadline_s`,
        `first_pause_s`: see `Presence`.
        """
        if capacity_bytes <= 0:
            raise ConfigError(f"capacity_bytes must be > 0, got {capacity_bytes}")
        self._capacity_bytes = capacity_bytes
        self._state_dir = state_dir
        self._flush_bytes = flush_bytes
        self.presence = Presence(
            str(state_dir.path),
            self._probe,
            deadline_s=deadline_s,
            first_pause_s=first_pause_s,
            on_stall=lambda: self.io.cancel(),
            on_return=lambda: None if self._pulse is None else self._pulse.poke(),
        )
        self.has_ended = False
        """Whether `close` has released everything: False after it gave up on a disk that hangs."""
        with ExitStack() as undo:
            self._catalog = Catalog(state_dir.catalog, state_dir.read_store_uuid())
            undo.callback(self._catalog.close)
            self._store_uuid = self._catalog.store_uuid
            if state_dir.read_store_uuid() is None:
                state_dir.write_store_uuid(self._store_uuid)
            self._space, self.io, self.io_reason = open_space(state_dir, io)
            undo.callback(self.io.close)
            self._segments = Segments(self._space, self._store_uuid, self.io)
            undo.callback(self._segments.close)
            segment_bytes = self._space.segment_bytes or segment_bytes
            if segment_bytes is None:
                segment_bytes = max(_MIN_SEGMENT_BYTES, capacity_bytes // _SEGMENTS_PER_STORE)
            pool = SlotPool(capacity_bytes, segment_bytes, self._space.numbers)
            rows, self.notes = recover(self._catalog, self._segments, pool)
            self._index = FileIndex(pool, self._catalog.first_generation(), rows, evict=evict)
            self._commits = Commits(
                self._index,
                self._segments,
                self._catalog,
                self.presence,
                is_strict=durability == "strict",
                watermarks=watermarks,
            )
            self._room = self._commits.room
            self._room.shrink()
            undo.pop_all()
        self._writer = SpanWriter(
            index=self._index,
            room=self._room,
            segments=self._segments,
            header_of=self._header,
            presence=self.presence,
            check=state_dir.check,
        )
        self._drafts = FileDrafts(
            index=self._index,
            room=self._room,
            segments=self._segments,
            header_of=self._header,
            presence=self.presence,
            on_published=self._commit_soon,
        )
        self._device_readers = DeviceReaders(
            self.io,
            state_dir.path,
            lambda device: FileDeviceReader(device, self._index, self._segments, self._header, self._forget_damaged),
        )
        self._suspects = Suspects(self._index, self._segments, self._header)
        self._reader = SpanReader(
            index=self._index,
            segments=self._segments,
            header_of=self._header,
            presence=self.presence,
            suspects=self._suspects,
            forget=self._forget_damaged,
            num_threads=num_threads or self.io.num_threads,
        )
        self._directions = FileDirections(
            index=self._index,
            segments=self._segments,
            header_of=self._header,
            presence=self.presence,
            suspects=self._suspects,
            forget=self._forget_damaged,
        )
        self._workers = Workers(_MAX_PUTS, "hcache-file")
        """Do what may hang in the place of callers who must not."""
        self._pulse = None if flush_interval_s is None else Pulse(self.flush, flush_interval_s, "hcache-commit")

    def put(self, record: SpanRecord, chunks: Sequence[memoryview]) -> bool:
        record.check_chunks(chunks)
        views = [chunk.cast("B") for chunk in chunks]
        return self.put_checked(record, views, None)

    def put_checked(self, record: SpanRecord, chunks: Sequence[memoryview], crcs: Sequence[int] | None) -> bool:
        """`put` of byte views whose CRC32Cs were taken when the bytes were made: damage since then is found."""
        if not self.presence.is_here:
            self._index.count_drop(is_unavailable=True)
            return False
        if self._index.find(record.span_id) is not None:
            self._index.touch([record.span_id])
            return True
        is_wanted = threading.Event()
        is_wanted.set()
        is_kept = False
        try:
            is_kept = self._call(lambda: self._writer.write(record, chunks, crcs, is_wanted.is_set), 1) is True
        finally:
            is_wanted.clear()
            if not is_kept:
                self._index.count_drop(is_unavailable=not self.presence.is_here)
        if is_kept:
            self._commit_soon()
        return is_kept

    @property
    def drafts(self) -> FileDrafts | None:
        return self._drafts if self._space.takes_parts else None

    def directions(self, wanted: Sequence[ChunkWanted]) -> ReadDirections | None:
        if not self._space.takes_parts:  # a namespace: one process alone has it
            return None
        with self._index.operation() as is_open:
            if wanted and self.knows(wanted[0].span_id) and not self.presence.is_here:
                self._index.count_unavailable()
                return ReadDirections((), "unavailable")
            return self._directions.of(wanted) if is_open else ReadDirections((), "missing")

    def share_draft(self, record: SpanRecord, writer: Writer | None = None) -> SharedDraft | None:
        if not self._space.takes_parts:
            return None
        draft = self._call(lambda: begin_shared(self._drafts, record), 1)
        if draft is None:
            self._index.count_drop(is_unavailable=not self.presence.is_here)
        return draft

    def find(self, span_id: SpanId) -> SpanRecord | None:
        record = self._index.find(span_id)
        return record if record is not None and self.presence.is_here else None

    def knows(self, span_id: SpanId) -> bool:
        """Whether the span is here, readable now or not."""
        return self._index.find(span_id) is not None

    def why_missing(self, span_id: SpanId) -> str:
        is_away = self.knows(span_id) and not self.presence.is_here
        return "unavailable" if is_away else self._index.why_missing(span_id)

    def get_into(self, reads: Sequence[ChunkRead]) -> ReadOutcome:
        with self._index.operation() as is_open:
            if is_open and reads and self.knows(reads[0].span_id) and not self.presence.is_here:
                self._index.count_unavailable()
                return ReadOutcome(num_ok=0, reason="unavailable")
            with self.presence.operation():
                outcome = self._reader.read(reads if is_open else ())
            with self._index.lock:
                self._index.counters.read_bytes += sum(read.out.nbytes for read in reads[: outcome.num_ok])
        if outcome.reason is None and outcome.num_ok < len(reads):
            return ReadOutcome(num_ok=outcome.num_ok, reason="missing")
        return outcome

    def lend(self, buffer: memoryview) -> None:
        if self.presence.is_here:  # a ring whose thread hangs would not answer
            self.io.lend(buffer)

    def take_back(self, buffer: memoryview) -> None:
        self._call(lambda: self.io.take_back(buffer), 1)

    def weigh(self, loss: Callable[[int], float]) -> None:
        self._index.weigh(loss)

    def device_reader(self, gpu_idx: int) -> DeviceReader | None:
        with self._index.operation() as is_open:
            return self._device_readers.of(gpu_idx) if is_open else None

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
        self._commits.deletions_must_last()
        if self._pulse is not None:
            self._pulse.poke()
        return num_deleted

    def flush(self) -> None:
        if self.presence.is_stuck:  # it would wait for what hangs
            _log.warning("%s hangs: what was saved there lately is not durable yet", self._state_dir.path)
        else:
            self._call(self._flush, _PATIENCE)

    def _flush(self) -> None:
        with self._index.operation() as is_open:
            if is_open:
                with self.presence.operation():
                    self._commits.run(publish=True)
                    self._room.ease()

    def expire(self, since_s: float) -> list[SpanId]:
        return self._index.expire(since_s)

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
                unavailable=counters.unavailable,
                num_away=int(not self.presence.is_here),
                evicted_ahead_spans=counters.evicted_ahead_spans,
                put_waits=counters.put_waits,
            )

    @property
    def disk_bytes(self) -> int:
        """Bytes that the segment files occupy; never above the capacity."""
        with self._index.lock:
            return self._index.pool.disk_bytes

    def close(self) -> None:
        self._call(self._close, 0.1 if self.presence.is_stuck else _PATIENCE)
        self.presence.close()
        self._workers.close(0.0 if not self.has_ended else self.presence.deadline_s)

    def _close(self) -> None:
        if not self._index.close():
            return
        if self._pulse is not None:
            self._pulse.stop()
        self._commits.run(publish=True, is_last=True)
        self._index.clear()
        self._reader.close()
        self._device_readers.close()
        self._segments.close()
        self._catalog.close()
        self.has_ended = True

    def _commit_soon(self) -> None:
        if self._pulse is not None:
            self._pulse.poke(at_once=self._index.waiting_bytes() >= self._flush_bytes or self._room.is_tight)

    def _call(self, job: Callable[[], _T], patience: float) -> _T | None:
        """What `job` returns, on a thread that may hang: None after `patience` deadlines, or when all is closed."""
        if self.has_ended:
            return None
        try:
            return self._workers.call(job, patience * _SLACK * self.presence.deadline_s)
        except StalledError:
            self.presence.stalled()
        except RuntimeError:  # closed meanwhile
            if not self._workers.is_closed:
                raise
        return None

    def _probe(self) -> None:
        """Whether the disk reads and writes. Raises OSError."""
        self._state_dir.check()
        try_to_write(self._state_dir.path)
        self._space.probe()
        for span, chunk_idx in self._suspects.read_again():
            self._forget_damaged(span, chunk_idx, "corrupt")

    def _header(self, span: HeldSpan, chunk_idx: int) -> SlotHeader:
        return SlotHeader.of(
            span.record.layout,
            chunk_idx,
            store_uuid=self._store_uuid,
            span_id=span.record.span_id,
            generation=span.generation,
            crc=span.crcs[chunk_idx],
        )

    def _forget_damaged(self, span: HeldSpan, chunk_idx: int, reason: str) -> None:
        """Forget a span that a read found stale or damaged."""
        is_corrupt = reason == "corrupt"
        with self._index.lock:
            self._index.counters.corrupt_chunks += is_corrupt
        places = span.places  # which it may lose when it goes
        if self._index.remove_exactly(span, "corrupt" if is_corrupt else "evicted"):
            segment, slot = places[chunk_idx] if places else (0, 0)
            _log.warning(
                "file: chunk %d of span %s is %s (segment %d, slot %d); span forgotten",
                *(chunk_idx, span.record.span_id.hex()[:16], reason, segment, slot),
            )
            if self._pulse is not None:
                self._pulse.poke()
