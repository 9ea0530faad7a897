"""Spans striped over file stores on several devices."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from mii_hcache.core.identity import SpanId
from mii_hcache.storage.base import ChunkStore, StoreStats
from mii_hcache.storage.directions import ChunkWanted, JoinedDirections, ReadDirections, SharedDraft, Writer
from mii_hcache.storage.file import FileStore
from mii_hcache.storage.lanes import Lanes
from mii_hcache.storage.records import ChunkRead, ReadOutcome, SpanRecord
from mii_hcache.storage.stripe_path import StripePath
from mii_hcache.storage.turns import turns_of

_MAX_DELETED = 1 << 20
"""Spans deleted while a path was missing that are remembered until it is back."""
_NUM_BATCHES = 8
"""Batches of reads that are read side by side at a time: those of the restorer, and some that hang."""


class StripedStore(ChunkStore):
    """Several FileStores as one; owns them. Safe from any thread.

    Consecutive spans of a context lie on consecutive paths, so the chunks of a layer are spread round robin, as in the
    paper (section 4.2); those that several processes write lie on paths of their writers' own, as far as there are
    enough (`turns.py`). Nothing on disk says so: a span is looked for on every path, and where it is put is policy.
    Each path has a catalog of its own and survives alone. While one is missing or away, each context is cut at its
    first span there and the rest is computed again, and saved elsewhere; when it is back, so are its spans.

    Every path has an equal share of the capacity and evicts by itself: a context's spans may go a little out of order
    between paths, which costs their use and nothing else. A path that fails a put, or is full of what is pinned, hands
    it on to another one. `delete` reaches a missing path when it is back, if that is in this process's life.
    """

    name = "file"

    def __init__(self, paths: Sequence[StripePath]) -> None:
        """`paths` in the order of their ordinals; those that open later tell `path_opens`."""
        self.paths = tuple(paths)
        self._lanes = Lanes(len(self.paths), "hcache-stripe", num_batches=_NUM_BATCHES)
        self._placing: set[SpanId] = set()
        """Spans that are being put: two writers of one must not choose two paths."""
        self._placed = threading.Condition()
        """Guards `_placing` and what follows."""
        self._num_refusals = 0
        """Puts that one path dropped and another one took, or dropped as well: not to be counted again."""
        self._num_dropped = 0
        """Puts for which there was no path at all."""
        self._deleted: OrderedDict[SpanId, None] = OrderedDict()
        self._loss: Callable[[int], float] | None = None
        self._pins: Counter[SpanId] = Counter()
        self._told = set(self.stores)
        """Stores that know of all pins; one that opens later is told of them then."""

    @property
    def stores(self) -> list[FileStore]:
        """The stores of the paths that are not missing."""
        return [path.store for path in self.paths if path.store is not None]

    @property
    def notes(self) -> list[str]:
        """Sentences for people about what is missing or was found damaged."""
        missing = [
            f"{path.path} is missing ({path.why_missing}): what lies there cannot be restored until it is back, which "
            "is noticed"
            for path in self.paths
            if path.why_missing is not None
        ]
        return [*missing, *(note for store in self.stores for note in store.notes)]

    def path_opens(self, store: FileStore) -> None:
        """A path's store is there, maybe long after the others: tell it what it missed."""
        with self._placed:
            deleted, loss = list(self._deleted), self._loss
            if store not in self._told:
                self._told.add(store)
                store.pin_always(self._pins.elements())
        store.delete(deleted)
        if loss is not None:
            store.weigh(loss)

    def put(self, record: SpanRecord, chunks: Sequence[memoryview]) -> bool:
        record.check_chunks(chunks)
        return self.put_checked(record, [chunk.cast("B") for chunk in chunks], None)

    def put_checked(self, record: SpanRecord, chunks: Sequence[memoryview], crcs: Sequence[int] | None) -> bool:
        """See `FileStore.put_checked`."""
        with self._alone(record.span_id):
            holder = self._holder_of(record.span_id)
            if holder is not None:
                return holder.put_checked(record, chunks, crcs)
            num_refused = 0
            for store in self._turn_of(record):
                if store.put_checked(record, chunks, crcs):
                    self._count(num_refusals=num_refused)
                    return True
                num_refused += 1
            self._count(num_refusals=max(0, num_refused - 1), num_dropped=num_refused == 0)
            return False

    def find(self, span_id: SpanId) -> SpanRecord | None:
        for path in self.paths:
            found = None if path.store is None else path.store.find(span_id)
            if found is not None:
                return found
        return None

    def why_missing(self, span_id: SpanId) -> str:
        reasons = {store.why_missing(span_id) for store in self.stores} - {"not_saved"}
        return "unavailable" if "unavailable" in reasons else min(reasons, default="not_saved")

    def get_into(self, reads: Sequence[ChunkRead]) -> ReadOutcome:
        parts: dict[FileStore, list[int]] = {}
        num_ok, reason = len(reads), None
        for idx, read in enumerate(reads):
            holder = self._holder_of(read.span_id)
            if holder is None:
                is_away = self.why_missing(read.span_id) == "unavailable"
                num_ok, reason = idx, "unavailable" if is_away else "missing"
                break
            parts.setdefault(holder, []).append(idx)
        jobs = list(parts.items())
        outcomes: dict[int, ReadOutcome] = {}

        def read_part(job: int) -> None:
            store, part = jobs[job]
            outcomes[job] = store.get_into([reads[idx] for idx in part])

        self._lanes.run(len(jobs), read_part)
        for job, outcome in outcomes.items():
            part = jobs[job][1]
            if outcome.num_ok < len(part) and part[outcome.num_ok] < num_ok:
                num_ok, reason = part[outcome.num_ok], outcome.reason
        return ReadOutcome(num_ok=num_ok, reason=reason)

    def directions(self, wanted: Sequence[ChunkWanted]) -> ReadDirections | None:
        parts: dict[FileStore, list[int]] = {}
        reason = None
        for idx, one in enumerate(wanted):
            holder = self._holder_of(one.span_id)
            if holder is None:
                is_away = self.why_missing(one.span_id) == "unavailable"
                reason = "unavailable" if is_away else "missing"
                break
            parts.setdefault(holder, []).append(idx)
        joined = JoinedDirections(reason)
        for store, idxs in parts.items():
            directions = store.directions([wanted[idx] for idx in idxs])
            if directions is None:
                joined.end(ReadOutcome(num_ok=0))
                return None
            joined.add(idxs, directions)
        return joined.join()

    def share_draft(self, record: SpanRecord, writer: Writer | None = None) -> SharedDraft | None:
        num_refused = 0
        for store in self._turn_of(record, writer):
            draft = store.share_draft(record)
            if draft is not None:
                self._count(num_refusals=num_refused)
                return draft
            num_refused += 1
        self._count(num_refusals=max(0, num_refused - 1), num_dropped=num_refused == 0)
        return None

    def lend(self, buffer: memoryview) -> None:
        for store in self.stores:
            store.lend(buffer)

    def take_back(self, buffer: memoryview) -> None:
        for store in self.stores:
            store.take_back(buffer)

    def weigh(self, loss: Callable[[int], float]) -> None:
        with self._placed:
            self._loss = loss
        for store in self.stores:
            store.weigh(loss)

    def expire(self, since_s: float) -> list[SpanId]:
        return [span_id for store in self.stores for span_id in store.expire(since_s)]

    def touch(self, span_ids: Iterable[SpanId]) -> None:
        span_ids = list(span_ids)
        for store in self.stores:
            store.touch(span_ids)

    def pin(self, span_ids: Iterable[SpanId]) -> None:
        self.pin_always(span_ids)  # a path that is away now may be back when they are unpinned

    def pin_always(self, span_ids: Iterable[SpanId]) -> None:
        """See `FileStore.pin_always`."""
        span_ids = list(span_ids)
        with self._placed:
            self._pins.update(span_ids)
            for store in self._told:
                store.pin_always(span_ids)

    def unpin(self, span_ids: Iterable[SpanId]) -> None:
        span_ids = list(span_ids)
        with self._placed:
            for span_id in span_ids:
                self._pins[span_id] -= 1
                if self._pins[span_id] <= 0:
                    del self._pins[span_id]
            for store in self._told:
                store.unpin(span_ids)

    def delete(self, span_ids: Iterable[SpanId]) -> int:
        span_ids = list(span_ids)
        with self._placed:
            if any(path.store is None for path in self.paths):
                self._deleted.update(dict.fromkeys(span_ids))
                while len(self._deleted) > _MAX_DELETED:
                    self._deleted.popitem(last=False)
        known = {span_id for span_id in span_ids if any(store.knows(span_id) for store in self.stores)}
        for store in self.stores:
            store.delete(span_ids)
        return len(known)

    def flush(self) -> None:
        stores = self.stores
        self._lanes.run(len(stores), lambda idx: stores[idx].flush())

    def stats(self) -> StoreStats:
        """Sums over the paths that are not missing, each of them consistent."""
        every = [store.stats() for store in self.stores]

        def total(name: str) -> int:
            return sum(getattr(stats, name) for stats in every)

        return StoreStats(
            num_spans=total("num_spans"),
            num_bytes=total("num_bytes"),
            capacity_bytes=total("capacity_bytes"),
            put_bytes=total("put_bytes"),
            read_bytes=total("read_bytes"),
            evicted_spans=total("evicted_spans"),
            dropped_spans=total("dropped_spans") + self._num_dropped - self._num_refusals,
            corrupt_chunks=total("corrupt_chunks"),
            evicted_ahead_spans=total("evicted_ahead_spans"),
            put_waits=total("put_waits"),
            unavailable=total("unavailable"),
            num_away=total("num_away") + sum(path.store is None for path in self.paths),
        )

    def close(self) -> None:
        closing = Lanes(len(self.paths), "hcache-close")  # side by side: one that hangs holds up no other
        with ExitStack() as stack:
            stack.callback(closing.close, 1.0)
            stack.callback(self._lanes.close, 1.0)
            closing.run(len(self.paths), lambda idx: self.paths[idx].close())

    def _holder_of(self, span_id: SpanId) -> FileStore | None:
        """A store that can be asked for the span now."""
        stores = (path.store for path in self.paths)
        return next((store for store in stores if store is not None and store.find(span_id) is not None), None)

    def _turn_of(self, record: SpanRecord, writer: Writer | None = None) -> Iterator[FileStore]:
        """The store whose turn it is, then the others; those that are missing are passed over."""
        for idx in turns_of(record, len(self.paths), writer):
            store = self.paths[idx].store
            if store is not None:
                yield store

    def _count(self, *, num_refusals: int = 0, num_dropped: int = 0) -> None:
        with self._placed:
            self._num_refusals += num_refusals
            self._num_dropped += num_dropped

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
