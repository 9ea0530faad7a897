"""What a span is apart from its bytes, and what is asked of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mii_hcache.core.geometry import ChunkKind
from mii_hcache.core.identity import SpanId
from mii_hcache.core.layout import SpanLayout


@dataclass(frozen=True, kw_only=True)
class SpanRecord:
    """What a span is, apart from its bytes."""

    span_id: SpanId
    parent_id: SpanId | None
    """The span before it on the chain; None for a first span."""
    span_idx: int
    """Position on the chain: the span holds tokens `[64 * span_idx, 64 * (span_idx + 1))`."""
    token_ids: bytes
    """The span's token ids, packed (`core.identity.pack_tokens`); compared on every hit."""
    layout: SpanLayout
    """Which layers are stored, and as what: chunk `i` is `layout.chunks[i]`."""
    root_id: SpanId | None = field(default=None, compare=False)
    """The chain's first span, for who puts this one; None where nobody knows, as after it was read from a disk."""

    @property
    def num_bytes(self) -> int:
        """Payload bytes of all chunks."""
        return self.layout.num_bytes

    def chunk_of(
        self, layer_idx: int, num_bytes: int, kind: ChunkKind | None, shard: int = 0, num_shards: int = 1
    ) -> int | None:
        """Index of a layer's chunk, None when there is none of that length and kind (None for any), or none that is
        this one of so many shards."""
        chunk_idx = self.layout.chunk_of(layer_idx, shard)
        if chunk_idx is None:
            return None
        chunk = self.layout.chunks[chunk_idx]
        is_it = chunk.num_bytes == num_bytes and self.layout.shards_of(chunk.kind) == num_shards
        return chunk_idx if is_it and kind in (None, chunk.kind) else None

    def read_of(self, chunk_idx: int, out: memoryview) -> ChunkRead:
        """A read of one of its chunks."""
        chunk = self.layout.chunks[chunk_idx]
        return ChunkRead(
            span_id=self.span_id,
            layer_idx=chunk.layer_idx,
            out=out,
            kind=chunk.kind,
            shard=chunk.shard,
            num_shards=self.layout.shards_of(chunk.kind),
        )

    def check_chunks(self, chunks: Sequence[memoryview]) -> None:
        """Raise ValueError unless `chunks` are what this record describes: for a store's own use in `put`."""
        if self.span_idx < 0 or not self.layout.num_chunks:
            raise ValueError(f"impossible span record: {self}")
        if len(chunks) != self.layout.num_chunks:
            raise ValueError(f"a span of {self.layout.num_chunks} chunks was put with {len(chunks)}")
        for chunk_idx, (chunk, planned) in enumerate(zip(chunks, self.layout.chunks, strict=True)):
            if chunk.nbytes != planned.num_bytes or not chunk.c_contiguous:
                raise ValueError(f"chunk {chunk_idx}: {chunk.nbytes} bytes, expected {planned.num_bytes}, contiguous")


@dataclass(frozen=True, kw_only=True)
class ChunkRead:
    """One chunk to read into the caller's buffer."""

    span_id: SpanId
    layer_idx: int
    out: memoryview
    """Writable, C-contiguous, format `B`, exactly as long as the layer's chunk."""
    kind: ChunkKind | None = None
    """Kind that the reader expects of this layer, None for any. A span may be deleted and saved anew in another layout
    between `find` and the read, and both kinds' chunks may be equally long: then the read is `missing`."""
    shard: int = 0
    """Of K and V that ranks saved: whose heads to read,"""
    num_shards: int = 1
    """of how many ranks; a span that other numbers of ranks saved is `missing`."""

    def chunk_of(self, record: SpanRecord) -> int | None:
        """Index of the chunk to read, None when the span is not the one that the reader planned for."""
        return record.chunk_of(self.layer_idx, self.out.nbytes, self.kind, self.shard, self.num_shards)


@dataclass(frozen=True, kw_only=True)
class DeviceRead:
    """One chunk to read into a GPU's memory."""

    span_id: SpanId
    layer_idx: int
    address: int
    """Where it goes. On a multiple of 4096 (with a length that is one, too) it takes the shortest way."""
    num_bytes: int
    """Exactly the length of the layer's chunk."""
    kind: ChunkKind | None = None
    """As in `ChunkRead`."""

    def chunk_of(self, record: SpanRecord) -> int | None:
        """As in `ChunkRead`."""
        return record.chunk_of(self.layer_idx, self.num_bytes, self.kind)


@dataclass(frozen=True, kw_only=True)
class ReadOutcome:
    """How far a batch of reads got."""

    num_ok: int
    """Leading reads whose bytes arrived and were verified. Buffers of later reads hold anything."""
    reason: str | None = None
    """Why read `num_ok` failed: `missing` (deleted, evicted, stale slot), `corrupt`, or `unavailable` (the device did
    not give it, and may do so later); None when all arrived."""
