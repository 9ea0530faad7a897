"""A store whose reads are slowed down to a bandwidth: for emulating devices that this machine does not have."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from mii_hcache.core.identity import SpanId
from mii_hcache.errors import ConfigError
from mii_hcache.storage.base import ChunkRead, ChunkStore, ReadOutcome, SpanRecord, StoreStats

if TYPE_CHECKING:
    from mii_hcache.storage.directions import ChunkWanted, ReadDirections, SharedDraft
    from mii_hcache.storage.drafts import FileDrafts


class Throttle:
    """When bytes arrive from a device that serves all reads in turn, at `bytes_per_s`. Any thread."""

    def __init__(self, bytes_per_s: float, *, latency_s: float = 0.0) -> None:
        """`latency_s` is added to each batch of reads."""
        if bytes_per_s <= 0:
            raise ConfigError(f"read_bytes_per_s must be > 0, got {bytes_per_s}")
        self._bytes_per_s = bytes_per_s
        self._latency_s = latency_s
        self._lock = threading.Lock()
        self._free_at_s = 0.0

    def book(self, num_bytes: int) -> float:
        """A read begins: when it is over. Whoever else asks meanwhile waits behind."""
        with self._lock:
            self._free_at_s = max(time.perf_counter(), self._free_at_s) + num_bytes / self._bytes_per_s
            return self._free_at_s + self._latency_s

    def wait(self, done_s: float) -> None:
        """Until then."""
        left_s = done_s - time.perf_counter()
        if left_s > 0:
            time.sleep(left_s)


class ThrottledStore(ChunkStore):
    """Wraps a store; all reads together arrive no faster than `read_bytes_per_s`, as from one device that serves them
    in turn. Results are emulated, and must be called so. Writing is not slowed down."""

    def __init__(self, inner: ChunkStore, read_bytes_per_s: float, *, read_latency_s: float = 0.0) -> None:
        """Takes `inner` over. `read_latency_s` is added to each batch of reads."""
        self._throttle = Throttle(read_bytes_per_s, latency_s=read_latency_s)
        self.name = inner.name
        self.read_bytes_per_s = read_bytes_per_s
        self._inner = inner

    def get_into(self, reads: Sequence[ChunkRead]) -> ReadOutcome:
        done_s = self._throttle.book(sum(read.out.nbytes for read in reads))
        outcome = self._inner.get_into(reads)
        self._throttle.wait(done_s)
        return outcome

    def put(self, record: SpanRecord, chunks: Sequence[memoryview]) -> bool:
        return self._inner.put(record, chunks)

    def put_through(self, record: SpanRecord, chunks: Sequence[memoryview]) -> bool:
        return self._inner.put_through(record, chunks)

    @property
    def drafts(self) -> FileDrafts | None:
        return self._inner.drafts

    def directions(self, wanted: Sequence[ChunkWanted]) -> ReadDirections | None:
        """Who follows them throttles itself: each process has a device of its own."""
        return self._inner.directions(wanted)

    def share_draft(self, record: SpanRecord) -> SharedDraft | None:
        return self._inner.share_draft(record)

    def find(self, span_id: SpanId) -> SpanRecord | None:
        return self._inner.find(span_id)

    def tier_of(self, span_id: SpanId) -> str | None:
        return self._inner.tier_of(span_id)

    def why_missing(self, span_id: SpanId) -> str:
        return self._inner.why_missing(span_id)

    def lend(self, buffer: memoryview) -> None:
        self._inner.lend(buffer)

    def take_back(self, buffer: memoryview) -> None:
        self._inner.take_back(buffer)

    def weigh(self, loss: Callable[[int], float]) -> None:
        self._inner.weigh(loss)

    def touch(self, span_ids: Iterable[SpanId]) -> None:
        self._inner.touch(span_ids)

    def pin(self, span_ids: Iterable[SpanId]) -> None:
        self._inner.pin(span_ids)

    def unpin(self, span_ids: Iterable[SpanId]) -> None:
        self._inner.unpin(span_ids)

    def delete(self, span_ids: Iterable[SpanId]) -> int:
        return self._inner.delete(span_ids)

    def expire(self, since_s: float) -> list[SpanId]:
        return self._inner.expire(since_s)

    def flush(self) -> None:
        self._inner.flush()

    def stats(self) -> StoreStats:
        return self._inner.stats()

    def close(self) -> None:
        self._inner.close()
