"""A store to be measured, and what is put into it for that."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from mii_hcache.core.geometry import SPAN_TOKENS, ChunkKind
from mii_hcache.core.identity import SpanId, pack_tokens
from mii_hcache.core.layout import SpanLayout
from mii_hcache.runtime.buffers import as_bytes, host_empty
from mii_hcache.runtime.pieces import pieces_on
from mii_hcache.runtime.ports import EngineAdapter
from mii_hcache.storage.base import ChunkStore
from mii_hcache.storage.records import ChunkRead, SpanRecord


@dataclass(frozen=True, kw_only=True)
class ProfiledTier:
    """A store to be measured. Whatever is put into it is deleted again."""

    store: ChunkStore
    forget: Callable[[], None]
    """Drops what a cache may hold of it, so that a read is a read."""


class ProfiledSpans:
    """Random spans in a store, for the time of a `with` block."""

    def __init__(self, adapter: EngineAdapter, tier: ProfiledTier, io_bytes: int, max_spans: int) -> None:
        self._tier = tier
        self._geometry = adapter.geometry
        self._io_bytes = io_bytes
        self._records: dict[ChunkKind, list[SpanRecord]] = {}
        num_readers = pieces_on(adapter.device).num_readers
        self._max_spans = max_spans
        self._readers = ThreadPoolExecutor(num_readers, thread_name_prefix="hcache-profile")
        largest = max(adapter.geometry.chunk_bytes(kind) for kind in ChunkKind)
        self._buffers = [host_empty(max_spans * largest, dtype=torch.uint8) for _ in range(num_readers)]

    def __enter__(self) -> ProfiledSpans:
        for kind in ChunkKind:
            self._records[kind] = self._put(kind)
        self._tier.store.flush()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._readers.shutdown()
        self._tier.store.delete([record.span_id for records in self._records.values() for record in records])

    def _put(self, kind: ChunkKind) -> list[SpanRecord]:
        layout = SpanLayout.uniform(self._geometry, kind)
        joined = memoryview(bytearray(os.urandom(layout.num_bytes)))
        records: list[SpanRecord] = []
        for span_idx in range(max(1, min(self._max_spans, self._io_bytes // layout.num_bytes))):
            record = SpanRecord(
                span_id=SpanId(os.urandom(32)),
                parent_id=None,
                span_idx=span_idx,
                token_ids=pack_tokens([0] * SPAN_TOKENS),
                layout=layout,
                root_id=records[0].span_id if records else None,  # in turn on all disks, as a context is
            )
            if self._tier.store.put(record, [chunk.cut(joined) for chunk in layout.chunks]):
                records.append(record)
        return records

    @property
    def store(self) -> ChunkStore:
        """Where it is."""
        return self._tier.store

    def records(self, kind: ChunkKind) -> Sequence[SpanRecord]:
        """Its spans of a kind, which no cache holds."""
        self._tier.forget()
        return self._records[kind]

    def num_rows(self, kind: ChunkKind) -> int:
        """Token rows of one layer that `read` reads."""
        return SPAN_TOKENS * sum(record.layout.num_chunks for record in self._records[kind])

    def read(self, kind: ChunkKind, is_wanted: Callable[[], bool] = lambda: True) -> int:
        """Read all of it, tile by tile, as restores do. Returns rows read; stops early when not wanted any more."""
        self._tier.forget()

        def read_tile(tile: tuple[int, Sequence[SpanRecord]]) -> int:
            return self._read_tile(*tile) if is_wanted() else 0

        return sum(self._readers.map(read_tile, self._tiles(kind)))

    def _tiles(self, kind: ChunkKind) -> Iterator[tuple[int, Sequence[SpanRecord]]]:
        records = self._records[kind]
        for layer_idx in self._geometry.saved_layers(kind) if records else ():
            yield layer_idx, records

    def _read_tile(self, layer_idx: int, records: Sequence[SpanRecord]) -> int:
        buffer = self._buffers.pop()
        view, size = as_bytes(buffer), records[0].layout.chunks[0].num_bytes
        reads = [
            ChunkRead(span_id=record.span_id, layer_idx=layer_idx, out=view[idx * size : (idx + 1) * size])
            for idx, record in enumerate(records)
        ]
        outcome = self._tier.store.get_into(reads)
        self._buffers.append(buffer)
        return SPAN_TOKENS * outcome.num_ok
