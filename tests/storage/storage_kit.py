"""Spans whose bytes follow from their key, so that any wrong byte shows, and stores to put them in."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from mii_hcache.core.geometry import ChunkKind
from mii_hcache.core.layout import SpanLayout
from mii_hcache.storage.base import ChunkStore
from mii_hcache.storage.directions import ChunkWanted
from mii_hcache.storage.file import FileStore
from mii_hcache.storage.format import slot_sizes
from mii_hcache.storage.memory import MemoryStore
from mii_hcache.storage.nvme import NvmeAddress, NvmeFile
from mii_hcache.storage.open_striped import open_striped
from mii_hcache.storage.records import ChunkRead, SpanRecord
from mii_hcache.storage.regions import format_namespace
from mii_hcache.storage.state_dir import StateDir, new_store_uuid
from mii_hcache.storage.stripe_set import StripeSet
from mii_hcache.storage.tiered import TieredStore

IO = os.environ.get("MII_HCACHE_IO", "auto")
"""Backend of all file stores here, so that the suite can be run with each."""
PAUSE_S = 0.01
"""Before a disk that failed is tried again."""
CHUNK_BYTES = 5000
NUM_CHUNKS = 3
SPAN_BYTES = NUM_CHUNKS * CHUNK_BYTES
SLOT_BYTES = 4096 + 8192
"""Of a chunk of CHUNK_BYTES."""
SPAN_DISK_BYTES = NUM_CHUNKS * SLOT_BYTES
MIXED = SpanLayout.shared((None, ChunkKind.HIDDEN, ChunkKind.KV, None, ChunkKind.HIDDEN), 1000, 13_000)
"""NUM_CHUNKS chunks, SPAN_BYTES and SPAN_DISK_BYTES like other spans here, but in two sizes, and not of every layer."""
SHARDED = SpanLayout.shared((None, ChunkKind.HIDDEN, None, ChunkKind.KV), 13_000, 1000, 2)
"""The same with K and V of two ranks."""
NAMESPACE_BYTES = 65 << 20
LAYOUTS = {"uniform": None, "mixed": MIXED, "sharded": SHARDED}
"""What spans of a test may be: None leaves it to `make_record`."""

some_kinds = st.lists(st.sampled_from([None, *ChunkKind]), min_size=1, max_size=6).map(tuple).filter(any)
layouts = st.builds(
    lambda kinds, hidden_bytes, kv_bytes, shards: SpanLayout.shared(
        kinds, hidden_bytes, kv_bytes, shards if ChunkKind.KV in kinds else 1
    ),
    some_kinds,
    st.sampled_from([1, 900, 4096, 5000]),
    st.sampled_from([1, 900, 4097, 13_000]),
    st.sampled_from([1, 1, 2, 4]),
)
"""Hypothesis: any layout; lengths that need equal slots and different ones."""


def make_id(name: object) -> bytes:
    return hashlib.blake2b(str(name).encode(), digest_size=32).digest()


def make_record(
    name: object,
    *,
    parent: object = None,
    root: object = None,
    span_idx: int = 0,
    kind: ChunkKind = ChunkKind.HIDDEN,
    num_chunks: int = NUM_CHUNKS,
    chunk_bytes: int = CHUNK_BYTES,
    layout: SpanLayout | None = None,
) -> SpanRecord:
    """Chunks of layer 1 and those above it, all of one kind and size; or what `layout` says."""
    return SpanRecord(
        span_id=make_id(name),
        parent_id=None if parent is None else make_id(parent),
        span_idx=span_idx,
        token_ids=hashlib.blake2b(str(name).encode()).digest() * 4,
        layout=layout or SpanLayout.shared((None,) + (kind,) * num_chunks, chunk_bytes, chunk_bytes),
        root_id=None if root is None else make_id(root),
    )


def make_chunks(record: SpanRecord, writer: int = 0) -> list[memoryview]:
    """What a writer puts for a record: follows from span, layer, size, kind and writer."""
    return [
        memoryview(
            random.Random(b"%b %d %b %d" % (record.span_id, chunk_idx, chunk.kind.encode(), writer)).randbytes(
                chunk.num_bytes
            )
        )
        for chunk_idx, chunk in enumerate(record.layout.chunks)
    ]


def put(store: ChunkStore, record: SpanRecord, writer: int = 0) -> bool:
    return store.put(record, make_chunks(record, writer))


def reads_of(record: SpanRecord) -> list[ChunkRead]:
    return [
        record.read_of(chunk_idx, memoryview(bytearray(chunk.num_bytes)))
        for chunk_idx, chunk in enumerate(record.layout.chunks)
    ]


def wanted_of(record: SpanRecord) -> list[ChunkWanted]:
    """All its chunks, to be borrowed."""
    return [
        ChunkWanted(
            span_id=read.span_id,
            layer_idx=read.layer_idx,
            num_bytes=read.out.nbytes,
            kind=read.kind,
            shard=read.shard,
            num_shards=read.num_shards,
        )
        for read in reads_of(record)
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
    assert (reason is None) == (len(chunks) == record.layout.num_chunks)
    return reason is None


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Fails the test when it does not come: a bound for what hangs, not for what is slow on a busy machine."""
    stop_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < stop_s, "it did not come"
        time.sleep(0.002)


def wait_until_here(store: FileStore) -> None:
    """The disk answers again."""
    wait_until(lambda: store.presence.is_here)


class StoreKit:
    """Stores of one kind in a directory, opened and closed as a test likes, and the layout of the spans in them."""

    def __init__(self, kind: str, path: Path, layout: SpanLayout | None = None) -> None:
        self.kind, self.path, self.layout = kind, path, layout
        self.num_paths = int(kind[len("striped") :]) if kind.startswith("striped") else 1
        self._state_dir: StateDir | None = None
        self._store: ChunkStore | None = None

    def open(self, capacity_bytes: int = 100 * SPAN_DISK_BYTES, **settings: Any) -> Any:
        """A store for `capacity_bytes`; closes the one before. `settings` of its FileStore, or MemoryStore."""
        self.close()
        if self.kind == "memory":
            self._store = MemoryStore(capacity_bytes, **settings)
            return self._store
        if self.num_paths > 1:
            stripes = StripeSet.of([self.path / f"path{idx}" for idx in range(self.num_paths)])
            self._store = open_striped(
                stripes, capacity_bytes, segment_bytes=1 << 20, io=IO, first_look_s=PAUSE_S, **settings
            )
            return self._store
        self._state_dir = StateDir(self.path)
        if self.kind == "namespace" and self._state_dir.read_namespace() is None:
            make_namespace(self._state_dir)
        file = FileStore(
            self._state_dir, capacity_bytes, segment_bytes=1 << 20, io=IO, first_pause_s=PAUSE_S, **settings
        )
        self._store = file if self.kind != "tiered" else TieredStore(MemoryStore(4 * SPAN_BYTES), file, put_wait_s=60.0)
        return self._store

    def record(self, name: object, **what: Any) -> SpanRecord:
        """`make_record` in the kit's layout, unless `what` says a kind or size."""
        says_layout = what.keys() & {"kind", "num_chunks", "chunk_bytes", "layout"}
        return make_record(name, **what, **({} if says_layout else {"layout": self.layout}))

    def capacity_for(self, num_spans: int) -> int:
        """What `num_spans` spans take: on disk a segment for each size, in DRAM payload."""
        if self.kind == "memory":
            return num_spans * SPAN_BYTES
        share = -(-num_spans // self.num_paths)
        return self.num_paths * (share * SPAN_DISK_BYTES + 4096 * len(set(slot_sizes(self.record("any").layout))))

    def open_for(self, num_spans: int) -> ChunkStore:
        """A store that holds `num_spans` spans and no more."""
        return self.open(self.capacity_for(num_spans))

    def close(self) -> None:
        if self._store is not None:
            self._store.close()
        if self._state_dir is not None:
            self._state_dir.close()
        self._store = self._state_dir = None


def make_namespace(state_dir: StateDir) -> None:
    """Keep a state directory's segments on a namespace of its own: a file behind the fake SPDK, or the real one that
    $MII_HCACHE_TEST_SPDK_TRID names, which is formatted anew."""
    image = state_dir.path / "namespace.img"
    with image.open("wb") as file:
        file.truncate(NAMESPACE_BYTES)
    address = os.environ.get("MII_HCACHE_TEST_SPDK_TRID") or f"trtype:FAKE traddr:{image}"
    namespace = NvmeFile(NvmeAddress.parse(address))
    try:
        store_uuid = state_dir.read_store_uuid() or new_store_uuid()
        format_namespace(namespace, store_uuid, region_bytes=1 << 20)
    finally:
        namespace.close()
    state_dir.write_store_uuid(store_uuid)
    state_dir.write_namespace(address)


def disk_bytes(path: Path) -> int:
    """Bytes that are not holes in the segment files under a state directory, or several in one folder."""
    return sum(_data_bytes(file) for file in path.rglob("segments/*"))


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
