"""Which layers of a span are stored, and as what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from mii_hcache.core.geometry import ChunkKind, ModelGeometry

LayerKinds = tuple[ChunkKind | None, ...]
"""For each layer of the model, in order: the kind in which it is stored, None when it is not."""

MAX_KV_SHARDS = 64
"""Most ranks whose shares of K and V a layer may be stored in."""

_MAX_SHARED = 4096


def first_stored(kinds: LayerKinds) -> int:
    """The first layer from which on every layer is stored: no restore can do with fewer recomputed layers."""
    return max((layer_idx + 1 for layer_idx, kind in enumerate(kinds) if kind is None), default=0)


class LayoutChunk(NamedTuple):
    """One stored layer of a span, or one rank's share of it."""

    layer_idx: int
    kind: ChunkKind
    num_bytes: int
    offset: int
    """Where the chunk starts when all chunks of the span are joined."""
    shard: int = 0
    """Of a kv chunk: which of the layout's `kv_shards` ranks' heads it holds."""

    def cut(self, joined: memoryview) -> memoryview:
        """This chunk's part of all chunks joined, as a view."""
        return joined[self.offset : self.offset + self.num_bytes]


@dataclass(frozen=True, kw_only=True)
class SpanLayout:
    """Which layers of a span are stored, as what, and how long: one chunk per stored layer, in the order of layers.

    With tensor parallelism each rank has K and V of its own heads only, so a kv layer of a span that `kv_shards` ranks
    saved is as many chunks, in the order of ranks. Hidden rows are the same on all ranks, and are stored once.

    Immutable and pure; safe from any thread. Stores keep millions of records that have few layouts between them, so
    take layouts from `of`, `uniform` or `shared`, which give equal ones as the same object. Raises ValueError for a
    layout that stores nothing (but see `nothing`), or chunks of no bytes.
    """

    kinds: LayerKinds
    hidden_chunk_bytes: int
    """Bytes of a hidden chunk; of no meaning when there is none."""
    kv_chunk_bytes: int
    """Bytes of a kv chunk, which is one rank's; of no meaning when there is none."""
    kv_shards: int = 1
    """Chunks that a kv layer is stored in; 1 when there is none."""

    def __post_init__(self) -> None:
        used = {kind for kind in self.kinds if kind is not None}
        if not 1 <= self.kv_shards <= (MAX_KV_SHARDS if ChunkKind.KV in used else 1):
            raise ValueError(f"kv_shards must be 1 to {MAX_KV_SHARDS}, and 1 without kv layers, got {self.kv_shards}")
        if not used and (self.hidden_chunk_bytes or self.kv_chunk_bytes or not self.kinds):
            raise ValueError(f"a span must store one layer at least, got {len(self.kinds)} that are not stored")
        for kind in used:
            if self.bytes_of(kind) < 1:
                raise ValueError(f"{kind.value}_chunk_bytes must be > 0, got {self.bytes_of(kind)}")

    @classmethod
    def of(cls, geometry: ModelGeometry, kinds: Iterable[ChunkKind | None], kv_shards: int = 1) -> SpanLayout:
        """Layers of a model in these kinds, one for each of its layers, as `kv_shards` ranks save them. Raises
        ValueError, also when that many ranks cannot share the model's KV heads."""
        kinds = tuple(kinds)
        if len(kinds) != geometry.num_layers:
            raise ValueError(f"{len(kinds)} kinds for {geometry.num_layers} layers")
        if ChunkKind.KV not in kinds:
            kv_shards = 1
        kv_bytes = geometry.kv_shard_bytes(kv_shards)
        return cls.shared(kinds, geometry.chunk_bytes(ChunkKind.HIDDEN), kv_bytes, kv_shards)

    @classmethod
    def uniform(cls, geometry: ModelGeometry, kind: ChunkKind, kv_shards: int = 1) -> SpanLayout:
        """All layers that have a chunk of this kind (`ModelGeometry.saved_layers`)."""
        saved = geometry.saved_layers(kind)
        kinds = (kind if layer_idx in saved else None for layer_idx in range(geometry.num_layers))
        return cls.of(geometry, kinds, kv_shards)

    @classmethod
    def nothing(cls, num_layers: int) -> SpanLayout:
        """Of a span that no store has, between spans that one has: all its layers must be computed."""
        return cls.shared((None,) * num_layers, 0, 0)

    @classmethod
    def shared(cls, kinds: LayerKinds, hidden_chunk_bytes: int, kv_chunk_bytes: int, kv_shards: int = 1) -> SpanLayout:
        """The one object of this value."""
        return _shared(kinds, hidden_chunk_bytes, kv_chunk_bytes, kv_shards)

    def __hash__(self) -> int:
        """Of a few numbers: cheap, and the same in every process."""
        return hash((self.num_layers, self.num_chunks, self.num_bytes, self.first_stored))

    @property
    def num_layers(self) -> int:
        """Layers of the model, stored or not."""
        return len(self.kinds)

    @cached_property
    def chunks(self) -> tuple[LayoutChunk, ...]:
        """The stored layers, in order; a layer's shards in the order of ranks."""
        chunks: list[LayoutChunk] = []
        offset = 0
        for layer_idx, kind in enumerate(self.kinds):
            for shard in range(0 if kind is None else self.shards_of(kind)):
                assert kind is not None
                chunks.append(LayoutChunk(layer_idx, kind, self.bytes_of(kind), offset, shard))
                offset += chunks[-1].num_bytes
        return tuple(chunks)

    @property
    def num_chunks(self) -> int:
        """Stored layers, each shard of one counted."""
        return len(self.chunks)

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of all chunks."""
        return sum(chunk.num_bytes for chunk in self.chunks)

    @cached_property
    def first_stored(self) -> int:
        """The smallest layer from which on every layer is stored: the layers before it must be recomputed for a
        restore. `num_layers` when the last layer is not stored."""
        return first_stored(self.kinds)

    @cached_property
    def kind_counts(self) -> Mapping[ChunkKind, int]:
        """Stored layers of each kind that is used, hidden before kv. Not to be changed."""
        counts = Counter(self.kinds)
        return {kind: counts[kind] for kind in ChunkKind if kind in counts}

    @property
    def kind_names(self) -> tuple[str, ...]:
        """Names of the kinds that are used: `hidden`, `kv` or both."""
        return tuple(kind.value for kind in self.kind_counts)

    def bytes_of(self, kind: ChunkKind) -> int:
        """Bytes of a chunk of this kind."""
        return self.hidden_chunk_bytes if kind is ChunkKind.HIDDEN else self.kv_chunk_bytes

    def suits(self, num_ranks: int) -> bool:
        """Whether that many ranks can bring it back: hidden rows always, K and V only as they were cut."""
        return self.kv_shards == num_ranks or ChunkKind.KV not in self.kinds

    def shards_of(self, kind: ChunkKind) -> int:
        """Chunks of a layer of this kind."""
        return 1 if kind is ChunkKind.HIDDEN else self.kv_shards

    def chunk_of(self, layer_idx: int, shard: int = 0) -> int | None:
        """Index of a layer's chunk (of one rank's, where there are several), None when there is none."""
        return self._chunk_by_layer.get((layer_idx, shard))

    @cached_property
    def _chunk_by_layer(self) -> dict[tuple[int, int], int]:
        return {(chunk.layer_idx, chunk.shard): chunk_idx for chunk_idx, chunk in enumerate(self.chunks)}


@lru_cache(maxsize=_MAX_SHARED)
def _shared(kinds: LayerKinds, hidden_chunk_bytes: int, kv_chunk_bytes: int, kv_shards: int) -> SpanLayout:
    return SpanLayout(
        kinds=kinds,
        hidden_chunk_bytes=hidden_chunk_bytes,
        kv_chunk_bytes=kv_chunk_bytes,
        kv_shards=kv_shards,
    )
