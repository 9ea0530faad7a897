"""What a file store knows without looking at the disk: spans, slots, and what waits for the catalog."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

from mii_hcache.core.identity import SpanId
from mii_hcache.storage.catalog import SpanRow
from mii_hcache.storage.directions import ChunkWanted
from mii_hcache.storage.eviction import Loss, order_named
from mii_hcache.storage.format import SlotCounts, slot_counts
from mii_hcache.storage.reasons import Reasons
from mii_hcache.storage.records import ChunkRead, DeviceRead, SpanRecord
from mii_hcache.storage.slots import Place, Places, SlotPool

_ANY_SIZE = 0
"""In place of a slot size: bytes of slots of whatever sizes."""


@dataclass(kw_only=True, eq=False)
class HeldSpan:
    """A span in segment files."""

    record: SpanRecord
    generation: int
    places: Places
    crcs: Sequence[int]
    num_readers: int = 0
    has_row: bool = False
    """Whether the catalog has, or may soon have, a row of it: then its slots wait for the row's deletion."""
    alive: bool = True
    erase: bool = False
    """Whether its bytes are to leave the disk, not only to be overwritten some day."""

    @property
    def disk_bytes(self) -> int:
        """Bytes of its slots, which it has from being written until they are free again."""
        return sum(size * num for size, num in slot_counts(self.record.layout).items())


@dataclass(frozen=True, kw_only=True)
class CatalogWork:
    """What one transaction is to do."""

    add: list[HeldSpan]
    drop: list[HeldSpan]
    used: list[tuple[SpanId, int]]


@dataclass(kw_only=True)
class IndexCounters:
    """Counted since opening; under the index's lock."""

    put_bytes: int = 0
    read_bytes: int = 0
    evicted_spans: int = 0
    evicted_ahead_spans: int = 0
    put_waits: int = 0
    dropped_spans: int = 0
    corrupt_chunks: int = 0
    unavailable: int = 0
    num_bytes: int = 0
    """Payload bytes held."""


class FileIndex:
    """The in-memory truth of a file store. Thread-safe under one short lock; no method does I/O.

    Life of a span: its slots are taken → `publish` (readable, waiting) → in a `CatalogWork` (has a row) → removed
    (evicted, deleted, damaged: unreadable at once) → its row's deletion is committed → the last reader ends → its slots
    are free. A span that never had a row skips the wait for the commit.
    """

    def __init__(
        self, pool: SlotPool, first_generation: int, rows: Sequence[SpanRow] = (), *, evict: str = "lru"
    ) -> None:
        """`rows` of the catalog; `pool` knows their slots as taken."""
        self.pool = pool
        self.lock = threading.Lock()
        """Covers `pool`, `counters` and all that follows."""
        self.counters = IndexCounters()
        self._spans: dict[SpanId, HeldSpan] = {}
        self._order = order_named(evict, lambda span_id: self._spans[span_id].disk_bytes)
        self._reasons = Reasons()
        self._generation = first_generation
        self._waiting: dict[SpanId, HeldSpan] = {}
        self._dead: list[HeldSpan] = []
        """Removed, their rows not yet deleted."""
        self._erasable: list[Place] = []
        """Taken slots that nobody uses, to be punched."""
        self._closing = False
        self._num_active = 0
        self._idle = threading.Condition(self.lock)
        for row in rows:
            span = HeldSpan(
                record=row.record, generation=row.generation, places=row.places, crcs=row.crcs, has_row=True
            )
            self._spans[row.record.span_id] = span
            self.counters.num_bytes += row.record.num_bytes
        self._order.load((row.record.span_id, row.record.parent_id, row.record.span_idx, row.last_used) for row in rows)

    @contextmanager
    def operation(self) -> Iterator[bool]:
        """Around everything that uses files: `close` waits for it. Yields False when it came too late."""
        with self.lock:
            is_open = not self._closing
            self._num_active += 1
        try:
            yield is_open
        finally:
            with self.lock:
                self._num_active -= 1
                self._idle.notify_all()

    def close(self) -> bool:
        """Refuse new operations, wait for those in progress. False when it was closed already."""
        with self.lock:
            was_open = not self._closing
            self._closing = True
            self._idle.wait_for(lambda: self._num_active == 0)
        return was_open

    def clear(self) -> None:
        """Know nothing any more; the catalog has it all."""
        with self.lock:
            self._spans.clear()
            self.counters.num_bytes = 0

    def find(self, span_id: SpanId) -> SpanRecord | None:
        """The record of a readable span."""
        span = self._spans.get(span_id)
        return None if span is None else span.record

    def __len__(self) -> int:
        return len(self._spans)

    def some(self, num_spans: int) -> list[SpanRecord]:
        """The records of a few spans, whichever."""
        with self.lock:
            return [span.record for span in islice(self._spans.values(), num_spans)]

    def next_generation(self) -> int:
        """A number that no put had before."""
        with self.lock:
            self._generation += 1
            return self._generation - 1

    def publish(self, span: HeldSpan) -> bool:
        """Make a written span readable. False when another writer was first; the slots are then still the caller's."""
        record = span.record
        with self.lock:
            if record.span_id in self._spans:
                return False
            self._spans[record.span_id] = self._waiting[record.span_id] = span
            self._order.add(record.span_id, record.parent_id, record.span_idx)
            self._reasons.clear(record.span_id)
            self.counters.put_bytes += record.num_bytes
            self.counters.num_bytes += record.num_bytes
        return True

    def waiting_bytes(self) -> int:
        """Bytes of spans that no transaction has taken up yet."""
        with self.lock:
            return sum(span.record.num_bytes for span in self._waiting.values())

    def begin_reads(self, reads: Sequence[ChunkRead | DeviceRead | ChunkWanted]) -> list[tuple[HeldSpan, int]]:
        """Span and chunk of the leading reads that can be served; their slots stay until `end_reads`. Counts as use."""
        found: list[tuple[HeldSpan, int]] = []
        with self.lock:
            for read in reads:
                span = self._spans.get(read.span_id)
                chunk_idx = None if span is None else read.chunk_of(span.record)
                if span is None or chunk_idx is None:
                    break
                span.num_readers += 1
                found.append((span, chunk_idx))
            self._order.use({span.record.span_id for span, _ in found})
        return found

    def end_reads(self, found: Iterable[tuple[HeldSpan, int]]) -> None:
        """Undo `begin_reads`."""
        with self.lock:
            for span, _ in found:
                span.num_readers -= 1
                self._free_when_unused(span)

    def remove(self, span_ids: Iterable[SpanId], reason: str) -> int:
        """Make spans unreadable; how many were there."""
        with self.lock:
            span_ids = set(span_ids)
            if reason == "deleted":  # what was evicted a moment ago is to leave the disk, too
                for span in self._dead:
                    span.erase |= span.record.span_id in span_ids
            return sum(self._remove(self._spans[span_id], reason) for span_id in span_ids if span_id in self._spans)

    def remove_exactly(self, span: HeldSpan, reason: str) -> bool:
        """Make this very span unreadable, not another one that took its name since. False when it was gone."""
        with self.lock:
            return self._spans.get(span.record.span_id) is span and self._remove(span, reason)

    def expire(self, since_s: float) -> list[SpanId]:
        """Make unreadable what was last used before `since_s`, and is neither pinned nor being read."""
        with self.lock:
            unused = [key for key in self._order.unused_since(since_s) if not self._spans[SpanId(key)].num_readers]
            for span_id in unused:
                self._remove(self._spans[span_id], "expired")
            return unused

    def evict(self, num_bytes: int, *, ahead: bool = False) -> bool:
        """Evict spans of at least `num_bytes` of slots in all, unless that many are not to be had: then evict nothing
        and return False. Those being removed already count. `ahead`: nobody waits for it."""
        with self.lock:
            num_bytes -= sum(self.pool.shape(number)[0] for number, _ in self._erasable)
            before = self.counters.evicted_spans
            is_done = self._evict({_ANY_SIZE: num_bytes}, lambda span: {_ANY_SIZE: span.disk_bytes})
            self.counters.evicted_ahead_spans += (self.counters.evicted_spans - before) * ahead
            return is_done

    def evict_slots(self, missing: SlotCounts) -> bool:
        """`evict` of at least so many slots of each size: spans that have none of a size still missing stay."""
        with self.lock:
            return self._evict(dict(missing), lambda span: slot_counts(span.record.layout))

    def dead_places(self) -> list[Place]:
        """Slots of removed spans that nobody reads, but that rows still name."""
        with self.lock:
            return [place for span in self._dead if not span.num_readers for place in span.places]

    def take_work(self, *, publish: bool, ticks: bool) -> CatalogWork:
        """What the next transaction is to do: deletions, new spans if `publish`, last uses if `ticks`. One taker at a
        time, who then calls `work_done` or `work_failed`."""
        with self.lock:
            drop, self._dead = self._dead, []
            add = list(self._waiting.values()) if publish else []
            for span in add:
                span.has_row = True
                del self._waiting[span.record.span_id]
            return CatalogWork(add=add, drop=drop, used=self._order.take_moved() if ticks else [])

    def rows_of(self, work: CatalogWork) -> list[SpanRow]:
        """The rows to insert."""
        with self.lock:
            return [
                SpanRow(
                    record=span.record,
                    generation=span.generation,
                    places=span.places,
                    crcs=span.crcs,
                    last_used=self._order.tick_of(span.record.span_id),
                )
                for span in work.add
                if span.alive
            ]

    def work_done(self, work: CatalogWork) -> None:
        """The transaction is committed: slots of deleted rows become free."""
        with self.lock:
            for span in work.drop:
                span.has_row = False
                self._free_when_unused(span)

    def take_erasable(self) -> list[Place]:
        """Slots of deleted spans: the caller punches them, then gives them to the pool."""
        with self.lock:
            places, self._erasable = self._erasable, []
            return places

    def work_failed(self, work: CatalogWork) -> None:
        """The transaction changed nothing: do it with the next one."""
        with self.lock:
            self._dead = work.drop + self._dead
            for span in work.add:
                if span.alive:
                    self._waiting[span.record.span_id] = span
            self._order.note_moved(key for key, _ in work.used)

    def count_drop(self, *, is_unavailable: bool = False) -> None:
        """Count a put that was dropped; `is_unavailable`: because the device failed or was away."""
        with self.lock:
            self.counters.dropped_spans += 1
            self.counters.unavailable += is_unavailable

    def count_unavailable(self) -> None:
        """Count a batch of reads that the device did not serve."""
        with self.lock:
            self.counters.unavailable += 1

    def touch(self, span_ids: Iterable[SpanId]) -> None:
        """Count as use."""
        with self.lock:
            self._order.use(span_ids)

    def weigh(self, loss: Loss) -> None:
        """See `ChunkStore.weigh`."""
        with self.lock:
            self._order.weigh(loss)

    def pin(self, span_ids: Iterable[SpanId], *, always: bool) -> None:
        """Keep from eviction; only spans that are here unless `always`."""
        with self.lock:
            self._order.pin(span_id for span_id in span_ids if always or span_id in self._spans)

    def unpin(self, span_ids: Iterable[SpanId]) -> None:
        """Undo one `pin` of each."""
        with self.lock:
            self._order.unpin(span_ids)

    def why_missing(self, span_id: SpanId) -> str:
        """See `ChunkStore.why_missing`."""
        with self.lock:
            return self._reasons.of(span_id)

    def _evict(self, missing: dict[int, int], given_by: Callable[[HeldSpan], Mapping[int, int]]) -> bool:
        """Evict until nothing is missing, or not at all; spans that are being removed already count. Lock held."""

        def give(span: HeldSpan) -> None:
            for what, num in given_by(span).items():
                if what in missing:
                    missing[what] -= num

        for span in self._dead:
            if not span.num_readers:
                give(span)
        victims: list[HeldSpan] = []
        for span_id in self._order.victims():
            if all(num <= 0 for num in missing.values()):
                break
            span = self._spans[span_id]
            if not span.num_readers and any(missing.get(what, 0) > 0 for what in given_by(span)):
                victims.append(span)
                give(span)
        if any(num > 0 for num in missing.values()):
            return False
        for span in victims:
            self._remove(span, "evicted")
        self.counters.evicted_spans += len(victims)
        return True

    def _remove(self, span: HeldSpan, reason: str) -> bool:
        """Lock held."""
        span_id = span.record.span_id
        del self._spans[span_id]
        self._waiting.pop(span_id, None)
        self._order.remove(span_id)
        self._reasons.note([span_id], reason)
        self.counters.num_bytes -= span.record.num_bytes
        span.alive = False
        span.erase = reason in ("deleted", "expired")
        if span.has_row:
            self._dead.append(span)
        self._free_when_unused(span)
        return True

    def _free_when_unused(self, span: HeldSpan) -> None:
        """Lock held."""
        if not span.alive and not span.has_row and not span.num_readers and span.places:
            if span.erase:
                self._erasable.extend(span.places)
            else:
                self.pool.give(span.places)
            span.places = Places()
