"""Spans striped over file stores on several devices."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from mii_hcache.core.identity import SpanId
from mii_hcache.storage.base import ChunkRead, ChunkStore, ReadOutcome, SpanRecord, StoreStats
from mii_hcache.storage.file import FileStore
from mii_hcache.storage.lanes import Lanes

_REMEMBERED_REASON = "not_saved"


class StripedStore(ChunkStore):
    """Several FileStores as one; owns them. Safe from any thread.

    Consecutive spans of a context lie on consecutive devices, so the chunks of a layer are spread round robin, as in
    the paper (section 4.2). The first span's device is drawn from its id, so that short contexts and system prompts
    spread, too. Nothing on disk says so: a span is looked for on every device, and where it is put is policy. Each
    device has a catalog of its own and survives alone. When one is left out, each context is cut at its first span
    there and the rest is computed again; when it is back, so are its spans.

    Every device takes an equal share of the capacity and evicts by itself: a context's spans may go a little out of
    order between devices, which costs their use and nothing else. A device that fails a put hands it to the next one.
    """

    name = "file"

    def __init__(self, stores: Sequence[FileStore]) -> None:
        self.stores = tuple(stores)
        self._lanes = Lanes(len(self.stores), "hcache-stripe")
        self._placing: set[SpanId] = set()
        """Spans that are being put: two writers of one must not choose two devices."""
        self._placed = threading.Condition()
        """Guards `_placing` and what follows."""
        self._num_refusals = 0
        """Puts that one device dropped and another one took, or dropped as well: not to be counted again."""

    @property
    def notes(self) -> list[str]:
        """Sentences for people about what was found damaged on any device."""
        return [note for store in self.stores for note in store.notes]

    def put(self, record: SpanRecord, chunks: Sequence[memoryview]) -> bool:
        record.check_chunks(chunks)
        return self.put_checked(record, [chunk.cast("B") for chunk in chunks], None)

    def put_checked(self, record: SpanRecord, chunks: Sequence[memoryview], crcs: Sequence[int] | None) -> bool:
        """See `FileStore.put_checked`."""
        with self._alone(record.span_id):
            holder = self._holder_of(record.span_id)
            if holder is not None:
                return self.stores[holder].put_checked(record, chunks, crcs)
            for num_refused, store in enumerate(self._turn_of(record)):
                if store.put_checked(record, chunks, crcs):
                    self._count_refusals(num_refused)
                    return True
            self._count_refusals(len(self.stores) - 1)
            return False

    def find(self, span_id: SpanId) -> SpanRecord | None:
        holder = self._holder_of(span_id)
        return None if holder is None else self.stores[holder].find(span_id)

    def why_missing(self, span_id: SpanId) -> str:
        reasons = [store.why_missing(span_id) for store in self.stores]
        return next((reason for reason in reasons if reason != _REMEMBERED_REASON), _REMEMBERED_REASON)

    def get_into(self, reads: Sequence[ChunkRead]) -> ReadOutcome:
        parts: list[list[int]] = [[] for _ in self.stores]
        num_ok, reason = len(reads), None
        for idx, read in enumerate(reads):
            holder = self._holder_of(read.span_id)
            if holder is None:
                num_ok, reason = idx, "missing"
                break
            parts[holder].append(idx)
        busy = [holder for holder, part in enumerate(parts) if part]
        outcomes: dict[int, ReadOutcome] = {}

        def read_part(job: int) -> None:
            outcomes[busy[job]] = self.stores[busy[job]].get_into([reads[idx] for idx in parts[busy[job]]])

        self._lanes.run(len(busy), read_part)
        for holder, outcome in outcomes.items():
            if outcome.num_ok < len(parts[holder]) and parts[holder][outcome.num_ok] < num_ok:
                num_ok, reason = parts[holder][outcome.num_ok], outcome.reason
        return ReadOutcome(num_ok=num_ok, reason=reason)

    def lend(self, buffer: memoryview) -> None:
        for store in self.stores:
            store.lend(buffer)

    def take_back(self, buffer: memoryview) -> None:
        for store in self.stores:
            store.take_back(buffer)

    def touch(self, span_ids: Iterable[SpanId]) -> None:
        span_ids = list(span_ids)
        for store in self.stores:
            store.touch(span_ids)

    def pin(self, span_ids: Iterable[SpanId]) -> None:
        self.pin_always([span_id for span_id in span_ids if self._holder_of(span_id) is not None])

    def pin_always(self, span_ids: Iterable[SpanId]) -> None:
        """See `FileStore.pin_always`."""
        span_ids = list(span_ids)
        for store in self.stores:
            store.pin_always(span_ids)

    def unpin(self, span_ids: Iterable[SpanId]) -> None:
        span_ids = list(span_ids)
        for store in self.stores:
            store.unpin(span_ids)

    def delete(self, span_ids: Iterable[SpanId]) -> int:
        span_ids = list(span_ids)
        return sum(store.delete(span_ids) for store in self.stores)

    def flush(self) -> None:
        self._lanes.run(len(self.stores), lambda idx: self.stores[idx].flush())

    def stats(self) -> StoreStats:
        """Sums over the devices, each of them consistent."""
        every = [store.stats() for store in self.stores]
        return StoreStats(
            num_spans=sum(stats.num_spans for stats in every),
            num_bytes=sum(stats.num_bytes for stats in every),
            capacity_bytes=sum(stats.capacity_bytes for stats in every),
            put_bytes=sum(stats.put_bytes for stats in every),
            read_bytes=sum(stats.read_bytes for stats in every),
            evicted_spans=sum(stats.evicted_spans for stats in every),
            dropped_spans=sum(stats.dropped_spans for stats in every) - self._num_refusals,
            corrupt_chunks=sum(stats.corrupt_chunks for stats in every),
        )

    def close(self) -> None:
        with ExitStack() as stack:  # later ones are closed even if an earlier one raises
            stack.callback(self._lanes.close)
            for store in self.stores:
                stack.callback(store.close)

    def _holder_of(self, span_id: SpanId) -> int | None:
        for idx, store in enumerate(self.stores):
            if store.find(span_id) is not None:
                return idx
        return None

    def _turn_of(self, record: SpanRecord) -> Iterator[FileStore]:
        """The device whose turn it is, then the others."""
        before = None if record.parent_id is None else self._holder_of(record.parent_id)
        first = int.from_bytes(record.span_id[:8], "little") if before is None else before + 1
        for step in range(len(self.stores)):
            yield self.stores[(first + step) % len(self.stores)]

    def _count_refusals(self, num: int) -> None:
        with self._placed:
            self._num_refusals += num

    @contextmanager
    def _alone(self, span_id: SpanId) -> Iterator[None]:
        with self._placed:
            self._placed.wait_for(lambda: span_id not in self._placing)
            self._placing.add(span_id)
        try:
            yield
        finally:
            with self._placed:
                self._placing.discard(span_id)
                self._placed.notify_all()
