"""A store that passes everything on to another one: for those that change a little of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from mii_hcache.core.identity import SpanId
from mii_hcache.storage.base import ChunkStore, StoreStats
from mii_hcache.storage.records import ChunkRead, ReadOutcome, SpanRecord

if TYPE_CHECKING:
    from mii_hcache.storage.directions import ChunkWanted, ReadDirections, SharedDraft, Writer
    from mii_hcache.storage.drafts import FileDrafts


class PassingStore(ChunkStore):
    """Owns the store that it passes on to. Reads straight into a GPU are not passed on, nor is what is borrowed: who
    changes how bytes come changes `get_into` alone."""

    def __init__(self, inner: ChunkStore) -> None:
        self.name = inner.name
        self._inner = inner

    def get_into(self, reads: Sequence[ChunkRead]) -> ReadOutcome:
        return self._inner.get_into(reads)

    def put(self, record: SpanRecord, chunks: Sequence[memoryview]) -> bool:
        return self._inner.put(record, chunks)

    def put_through(self, record: SpanRecord, chunks: Sequence[memoryview]) -> bool:
        return self._inner.put_through(record, chunks)

    @property
    def drafts(self) -> FileDrafts | None:
        return self._inner.drafts

    def directions(self, wanted: Sequence[ChunkWanted]) -> ReadDirections | None:
        return self._inner.directions(wanted)

    def share_draft(self, record: SpanRecord, writer: Writer | None = None) -> SharedDraft | None:
        return self._inner.share_draft(record, writer)

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
