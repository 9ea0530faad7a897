"""Spans whose layout and bytes follow from a name and a version, so that any wrong byte shows."""

from __future__ import annotations

import hashlib
import random

from mii_hcache.core.geometry import ChunkKind
from mii_hcache.core.layout import LayoutChunk, SpanLayout
from mii_hcache.storage.records import ChunkRead, SpanRecord

_POOL = random.Random(7).randbytes(4 << 20)
_HEAD_BYTES = 16
_SIZES = {
    "small": ((17, 900, 4096, 5000), (16, 1024, 4097, 13_000)),
    "large": ((65_536, 100_001, 524_288), (70_000, 131_072, 262_144)),
}
SCALES = tuple(_SIZES)
"""How long chunks are: bytes to a few KiB, or up to the 512 KiB of a real model."""


def make_record(name: int, version: int, scale: str) -> SpanRecord:
    """Version `version` of span `name`: every version has a layout of its own, hidden, kv or mixed, of one rank or
    several."""
    rng = random.Random(f"{name} {version} {scale}")
    kinds = [rng.choice([None, *ChunkKind]) for _ in range(rng.randint(1, 4))] + [rng.choice(list(ChunkKind))]
    hidden_sizes, kv_sizes = _SIZES[scale]
    return SpanRecord(
        span_id=hashlib.blake2b(b"%d" % name, digest_size=32).digest(),
        parent_id=hashlib.blake2b(b"%d" % (name - 1), digest_size=32).digest() if name % 4 else None,
        span_idx=name % 4,
        token_ids=name.to_bytes(4, "little") + version.to_bytes(4, "little") + bytes(248),
        layout=SpanLayout.shared(
            tuple(kinds),
            rng.choice(hidden_sizes),
            rng.choice(kv_sizes),
            rng.choice([1, 1, 2]) if ChunkKind.KV in kinds else 1,
        ),
    )


def version_of(record: SpanRecord) -> int:
    """The version that a record says it is."""
    return int.from_bytes(record.token_ids[4:8], "little")


def chunk_bytes(record: SpanRecord, chunk: LayoutChunk) -> memoryview:
    """What was written for a chunk: no two chunks share a sector, or even a shift."""
    name = b"%d %b %d" % (chunk.layer_idx, chunk.kind.encode(), chunk.shard)
    key = b"%b %b %b" % (record.span_id, record.token_ids[:8], name)
    digest = hashlib.blake2b(key, digest_size=_HEAD_BYTES).digest()
    start = int.from_bytes(digest, "little") % (len(_POOL) - chunk.num_bytes)
    head = digest[: chunk.num_bytes]
    return memoryview(head + _POOL[start : start + chunk.num_bytes - len(head)])


def make_chunks(record: SpanRecord) -> list[memoryview]:
    """All chunks of a span."""
    return [chunk_bytes(record, chunk) for chunk in record.layout.chunks]


def reads_of(record: SpanRecord) -> list[ChunkRead]:
    """Reads of all chunks, into buffers that hold none of their bytes."""
    return [
        record.read_of(chunk_idx, memoryview(bytearray(b"\xa5" * chunk.num_bytes)))
        for chunk_idx, chunk in enumerate(record.layout.chunks)
    ]


def text_of(number: int) -> str:
    """A rendered conversation: eight numbers in a row are the turns of one."""
    return f"conversation {number // 8}: " + "".join(f"turn {turn} said something. " for turn in range(number % 8 + 1))


def ids_of(number: int) -> list[int]:
    """The token ids of `text_of`: those of an earlier turn are a prefix."""
    return random.Random(number // 8).choices(range(50_000), k=20 * (number % 8 + 1))
