"""Spans whose bytes follow from their key, so that any wrong byte shows, and stores to put them in."""

from __future__ import annotations

import errno
import hashlib
import os
import random
from pathlib import Path

from mii_hcache.core.geometry import ChunkKind
from mii_hcache.storage.base import ChunkRead, ChunkStore, SpanRecord
from mii_hcache.storage.file import FileStore
from mii_hcache.storage.memory import MemoryStore
from mii_hcache.storage.state_dir import StateDir
from mii_hcache.storage.tiered import TieredStore

CHUNK_BYTES = 5000
NUM_CHUNKS = 3
SPAN_BYTES = NUM_CHUNKS * CHUNK_BYTES
SLOT_BYTES = 4096 + 8192
"""Of a chunk of CHUNK_BYTES."""
SPAN_DISK_BYTES = NUM_CHUNKS * SLOT_BYTES


def make_id(name: object) -> bytes:
    return hashlib.blake2b(str(name).encode(), digest_size=32).digest()


def make_record(
    name: object,
    *,
    parent: object = None,
    span_idx: int = 0,
    kind: ChunkKind = ChunkKind.HIDDEN,
    num_chunks: int = NUM_CHUNKS,
    chunk_bytes: int = CHUNK_BYTES,
) -> SpanRecord:
    return SpanRecord(
        span_id=make_id(name),
        parent_id=None if parent is None else make_id(parent),
        span_idx=span_idx,
        kind=kind,
        token_ids=hashlib.blake2b(str(name).encode()).digest() * 4,
        first_layer=1,
        num_chunks=num_chunks,
        chunk_bytes=chunk_bytes,
    )


def make_chunks(record: SpanRecord, writer: int = 0) -> list[memoryview]:
    """What a writer puts for a record: follows from span, layer, size, kind and writer."""
    return [
        memoryview(
            random.Random(b"%b %d %b %d" % (record.span_id, chunk_idx, record.kind.encode(), writer)).randbytes(
                record.chunk_bytes
            )
        )
        for chunk_idx in range(record.num_chunks)
    ]


def put(store: ChunkStore, record: SpanRecord, writer: int = 0) -> bool:
    return store.put(record, make_chunks(record, writer))


def reads_of(record: SpanRecord) -> list[ChunkRead]:
    return [
        ChunkRead(
            span_id=record.span_id,
            layer_idx=record.first_layer + chunk_idx,
            out=memoryview(bytearray(record.chunk_bytes)),
            kind=record.kind,
        )
        for chunk_idx in range(record.num_chunks)
    ]


def read_span(store: ChunkStore, record: SpanRecord) -> tuple[list[memoryview], str | None]:
    """The chunks that arrived, and why the others did not."""
    reads = reads_of(record)
    outcome = store.get_into(reads)
    return [read.out for read in reads[: outcome.num_ok]], outcome.reason


def holds(store: ChunkStore, record: SpanRecord, writer: int = 0) -> bool:
    """Whether a span reads back whole. Fails the test on a wrong byte, or on another record."""
    found = store.find(record.span_id)
    chunks, reason = read_span(store, record)
    assert chunks == make_chunks(record, writer)[: len(chunks)], "wrong bytes"
    assert found is None or found == record
    assert (reason is None) == (len(chunks) == record.num_chunks)
    return reason is None


class StoreKit:
    """Stores of one kind in a directory, opened and closed as a test likes."""

    def __init__(self, kind: str, path: Path) -> None:
        self.kind, self.path = kind, path
        self._state_dir: StateDir | None = None
        self._store: ChunkStore | None = None

    def open(self, capacity_bytes: int = 100 * SPAN_DISK_BYTES) -> ChunkStore:
        """A store for `capacity_bytes`; closes the one before."""
        self.close()
        if self.kind == "memory":
            self._store = MemoryStore(capacity_bytes)
            return self._store
        self._state_dir = StateDir(self.path)
        file = FileStore(self._state_dir, capacity_bytes, segment_bytes=1 << 20)
        self._store = file if self.kind == "file" else TieredStore(MemoryStore(4 * SPAN_BYTES), file, put_wait_s=5.0)
        return self._store

    def open_for(self, num_spans: int) -> ChunkStore:
        """A store that holds `num_spans` spans and no more."""
        if self.kind == "memory":
            return self.open(num_spans * SPAN_BYTES)
        return self.open(num_spans * SPAN_DISK_BYTES + 4096)

    def close(self) -> None:
        if self._store is not None:
            self._store.close()
        if self._state_dir is not None:
            self._state_dir.close()
        self._store = self._state_dir = None


def disk_bytes(path: Path) -> int:
    """Bytes that are not holes in the segment files under a state directory."""
    return sum(_data_bytes(file) for file in (path / "segments").iterdir())


def _data_bytes(path: Path) -> int:
    total = stop = 0
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:  # unlinked by the store a moment ago
        return 0
    try:
        while True:
            start = os.lseek(fd, stop, os.SEEK_DATA)
            stop = os.lseek(fd, start, os.SEEK_HOLE)
            total += stop - start
    except OSError as error:
        assert error.errno == errno.ENXIO  # no data further on
        return total
    finally:
        os.close(fd)
