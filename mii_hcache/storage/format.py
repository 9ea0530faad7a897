"""The on-disk format of saved chunks, version 2. This text is the specification.

A store's bytes lie in *segment files*, cut into *slots* of one size: chunks of one span that differ in length lie in
different segments. All integers are little-endian; all blocks are 4096 bytes, so that headers and payloads may be read
and written with O_DIRECT.

    segment file  =  segment header (1 block)  +  num_slots slots, slot i at 4096 + i * slot_bytes
    slot          =  slot header (1 block)  +  payload, zero-padded to whole blocks
    slot_bytes    =  4096 + round_up(chunk_bytes, 4096)

    segment header:  8s magic "HCACHESG" | I version | 16s store uuid | Q slot_bytes | Q num_slots | zeros | I crc
    slot header:     8s magic "HCACHESL" | I version | 16s store uuid | 32s span id | I layer | B kind | B shard
                     | 2x | Q generation | Q payload bytes | I payload crc | zeros | I crc

`crc` is the last field of a block: CRC32C of the 4092 bytes before it. The payload's CRC32C covers the payload without
its padding. Kinds: 1 hidden, 2 kv. K and V that N ranks of a tensor-parallel engine saved are N chunks a layer, each
with the heads of one rank: their kind is 2 + 4 * (N - 1), and `shard` says whose a chunk is. A segment file may be
shorter than its slots and have holes; what is missing was never written, or was given back. A file gets its name,
NUMBER.seg, when its header is durable; it is NUMBER.new before.

What makes a chunk readable is a row of the catalog, not a slot. The row says as what each layer of the model is stored
(a byte a layer: its kind, or 0 for not at all), how long chunks of either kind are, the span's generation, and for each
stored layer, in order (and of its shards in theirs), where its chunk lies and its CRC; a CRC of its own covers it all.
A reader accepts a payload only if the slot's header is, byte for byte, the one that the row implies, and the payload's
CRC is the row's. A valid header of something else means that the slot was reused: a miss.

Order of writing (each step is done before the next one starts):

    put      slots that no committed row names → header and payload → the span is readable in this process
    flush    strict: fdatasync of the segments → one catalog transaction with the rows of all waiting spans
    forget   delete the row, commit → wait for readers → the slots may be written again, or given back to the disk

Two modes of durability differ in what `flush` waits for, and so in what a power cut may cost. A crash of the process
alone costs neither mode anything that was flushed: the kernel has it all.

    strict    payloads are synced before the transaction, and the transaction is (SQLite's synchronous=FULL): what was
              flushed is there after a power cut
    relaxed   payloads are not synced, the transaction is synced when SQLite's log is checkpointed (NORMAL): what was
              flushed lately may be a miss after a power cut. A row may then name a slot whose bytes never arrived, or
              one that was reused under it; header and CRC tell, so never are wrong bytes served

In both modes a segment's header and name are synced before anything is written into it, and a transaction that deletes
what somebody asked to be deleted (or what expired) is synced: no power cut brings it back.

Forbidden, and why:

* to trust a slot without a row: its span may be half written, deleted, or of another tenant's forgotten history;
* to write a slot while a committed row names it: a crash would leave that row over foreign bytes;
* to use a generation twice in one store, also after the catalog was lost: a stale row must never fit a newer slot;
* to change a payload in place: rows, memory copies and readers in flight rely on its CRC;
* to touch files whose header names another store uuid: they are not ours to reuse or to delete;
* to add a field without a new version: readers refuse every version but their own, and nothing is lost but a cache.
  (A new kind needs none: who does not know it refuses the row and the slot, and keeps what it knows. That is how shards
  came in: what one rank saved is as it always was, byte for byte.)

All this is of one directory, whole in itself. Several that are striped over know of each other by a small file that is
described in stripe_set.py, and nothing of what lies in one names another.

Version 1 had spans of one kind only, their layers without a gap.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

from crc32c import crc32c

from mii_hcache.core.geometry import ChunkKind
from mii_hcache.core.identity import SpanId
from mii_hcache.core.layout import MAX_KV_SHARDS, LayerKinds, SpanLayout
from mii_hcache.errors import CorruptChunkError

FORMAT_VERSION = 2
BLOCK_BYTES = 4096
UUID_BYTES = 16

_SEGMENT_MAGIC = b"HCACHESG"
_SLOT_MAGIC = b"HCACHESL"
_SEGMENT = struct.Struct("<8sI16sQQ")
_SLOT = struct.Struct("<8sI16s32sIBB2xQQI")
_CRC = struct.Struct("<I")
_CRC_OFFSET = BLOCK_BYTES - _CRC.size

KIND_CODES = {ChunkKind.HIDDEN: 1, ChunkKind.KV: 2}
"""What stands for a kind on disk, where one rank saved it."""
KINDS_BY_CODE = {code: kind for kind, code in KIND_CODES.items()}
_NOT_STORED = 0
_SHARD_STEP = 4

SlotCounts = Mapping[int, int]
"""How many slots of each size, by `slot_bytes`."""


def slot_bytes(chunk_bytes: int) -> int:
    """Bytes of the slot that holds one chunk."""
    return BLOCK_BYTES + padded_bytes(chunk_bytes)


def padded_bytes(num_bytes: int) -> int:
    """`num_bytes`, rounded up to whole blocks."""
    return -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES


@lru_cache(maxsize=1024)
def slot_sizes(layout: SpanLayout) -> tuple[int, ...]:
    """Bytes of the slot of each chunk of a span."""
    return tuple(slot_bytes(chunk.num_bytes) for chunk in layout.chunks)


@lru_cache(maxsize=1024)
def slot_counts(layout: SpanLayout) -> SlotCounts:
    """The slots that a span takes: of one size, or of two."""
    return MappingProxyType(Counter(slot_sizes(layout)))


def pack_kinds(kinds: LayerKinds, kv_shards: int = 1) -> bytes:
    """A byte per layer."""
    return bytes(_NOT_STORED if kind is None else _pack_kind(kind, kv_shards) for kind in kinds)


def parse_kinds(codes: bytes) -> tuple[LayerKinds, int]:
    """Inverse of `pack_kinds`. Raises CorruptChunkError."""
    kinds: list[ChunkKind | None] = []
    shards = set()
    for code in codes:
        kind, num_shards = (None, 1) if code == _NOT_STORED else _parse_kind(code)
        kinds.append(kind)
        if kind is ChunkKind.KV:
            shards.add(num_shards)
    if len(shards) > 1:
        raise CorruptChunkError(f"kv layers of {sorted(shards)} shards in one span")
    return tuple(kinds), max(shards, default=1)


def _pack_kind(kind: ChunkKind, kv_shards: int) -> int:
    return KIND_CODES[kind] + (_SHARD_STEP * (kv_shards - 1) if kind is ChunkKind.KV else 0)


def _parse_kind(code: int) -> tuple[ChunkKind, int]:
    """A kind and its shards. Raises CorruptChunkError."""
    kind, num_shards = KINDS_BY_CODE.get(code % _SHARD_STEP), 1 + code // _SHARD_STEP
    if kind is None or (num_shards > 1 and kind is not ChunkKind.KV) or num_shards > MAX_KV_SHARDS:
        raise CorruptChunkError(f"unknown kind {code}")
    return kind, num_shards


@dataclass(frozen=True, kw_only=True)
class SegmentHeader:
    """First block of a segment file."""

    store_uuid: bytes
    slot_bytes: int
    num_slots: int

    def pack(self) -> bytes:
        """The block."""
        fields = _SEGMENT.pack(_SEGMENT_MAGIC, FORMAT_VERSION, self.store_uuid, self.slot_bytes, self.num_slots)
        return seal(fields)

    @staticmethod
    def parse(block: bytes | bytearray | memoryview) -> SegmentHeader:
        """Inverse of `pack`. Raises CorruptChunkError for anything but a sound header of this version."""
        check_seal(block, _SEGMENT_MAGIC, "segment header")
        _, _, store_uuid, slot_size, num_slots = _SEGMENT.unpack_from(block)
        if slot_size < 2 * BLOCK_BYTES or slot_size % BLOCK_BYTES or num_slots < 1:
            raise CorruptChunkError(f"segment header: impossible sizes {slot_size} x {num_slots}")
        return SegmentHeader(store_uuid=store_uuid, slot_bytes=slot_size, num_slots=num_slots)


def older_segment_version(block: bytes | bytearray | memoryview, store_uuid: bytes | None) -> int | None:
    """Version of a sound segment header of this store that an older program wrote, None for anything else. All versions
    begin alike and are sealed alike."""
    view = memoryview(block)
    if len(view) != BLOCK_BYTES or view[: len(_SEGMENT_MAGIC)] != _SEGMENT_MAGIC:
        return None
    if crc32c(view[:_CRC_OFFSET]) != _CRC.unpack_from(view, _CRC_OFFSET)[0]:
        return None
    _, version, found_uuid, _, _ = _SEGMENT.unpack_from(view)
    return version if version < FORMAT_VERSION and found_uuid == store_uuid else None


@dataclass(frozen=True, kw_only=True)
class SlotHeader:
    """First block of a slot: whose bytes follow."""

    store_uuid: bytes
    span_id: SpanId
    layer_idx: int
    kind: ChunkKind
    generation: int
    """Number of the put that wrote the span; never used twice in a store."""
    num_bytes: int
    """Of the payload, without padding."""
    crc: int
    """CRC32C of the payload."""
    shard: int = 0
    """Whose heads a kv chunk holds,"""
    num_shards: int = 1
    """of how many ranks."""

    def pack(self) -> bytes:
        """The block."""
        return seal(
            _SLOT.pack(
                _SLOT_MAGIC,
                FORMAT_VERSION,
                self.store_uuid,
                self.span_id,
                self.layer_idx,
                _pack_kind(self.kind, self.num_shards),
                self.shard,
                self.generation,
                self.num_bytes,
                self.crc,
            )
        )

    @staticmethod
    def parse(block: bytes | bytearray | memoryview) -> SlotHeader:
        """Inverse of `pack`. Raises CorruptChunkError for anything but a sound header of this version."""
        check_seal(block, _SLOT_MAGIC, "slot header")
        _, _, store_uuid, span_id, layer_idx, code, shard, generation, num_bytes, crc = _SLOT.unpack_from(block)
        kind, num_shards = _parse_kind(code)
        if shard >= num_shards:
            raise CorruptChunkError(f"slot header: shard {shard} of {num_shards}")
        return SlotHeader(
            store_uuid=store_uuid,
            span_id=span_id,
            layer_idx=layer_idx,
            kind=kind,
            generation=generation,
            num_bytes=num_bytes,
            crc=crc,
            shard=shard,
            num_shards=num_shards,
        )

    @staticmethod
    def of(
        layout: SpanLayout, chunk_idx: int, *, store_uuid: bytes, span_id: SpanId, generation: int, crc: int
    ) -> SlotHeader:
        """Of one chunk of a span."""
        chunk = layout.chunks[chunk_idx]
        return SlotHeader(
            store_uuid=store_uuid,
            span_id=span_id,
            layer_idx=chunk.layer_idx,
            kind=chunk.kind,
            generation=generation,
            num_bytes=chunk.num_bytes,
            crc=crc,
            shard=chunk.shard,
            num_shards=layout.shards_of(chunk.kind),
        )


def seal(fields: bytes) -> bytes:
    """A block of `fields`, zeros and their CRC."""
    body = fields.ljust(_CRC_OFFSET, b"\0")
    return body + _CRC.pack(crc32c(body))


def check_seal(block: bytes | bytearray | memoryview, magic: bytes, what: str, version: int = FORMAT_VERSION) -> None:
    """Raise CorruptChunkError unless a block is whole, begins with `magic` and is of `version`."""
    if len(block) != BLOCK_BYTES:
        raise CorruptChunkError(f"{what}: {len(block)} bytes instead of {BLOCK_BYTES}")
    view = memoryview(block)
    if view[: len(magic)] != magic:
        raise CorruptChunkError(f"{what}: wrong magic {bytes(view[: len(magic)])!r}")
    if crc32c(view[:_CRC_OFFSET]) != _CRC.unpack_from(block, _CRC_OFFSET)[0]:
        raise CorruptChunkError(f"{what}: wrong checksum")
    found = int.from_bytes(view[8:12], "little")
    if found != version:
        raise CorruptChunkError(f"{what}: format version {found}, this is {version}")
