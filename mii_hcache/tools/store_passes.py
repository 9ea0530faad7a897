"""One pass through a whole store, checksums and catalog included; and the checksum alone."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from crc32c import crc32c

from mii_hcache.core.geometry import ChunkKind
from mii_hcache.core.layout import SpanLayout
from mii_hcache.errors import HCacheError
from mii_hcache.storage.base import ChunkStore
from mii_hcache.storage.file import FileStore
from mii_hcache.storage.open_striped import open_striped
from mii_hcache.storage.records import ChunkRead, SpanRecord
from mii_hcache.storage.state_dir import StateDir
from mii_hcache.storage.stripe_set import StripeSet
from mii_hcache.tools.cost import Cost, aligned, measured
from mii_hcache.tools.device_passes import WINDOW_BYTES, drop_pages

NUM_LAYERS = 8


class Spans:
    """Spans of NUM_LAYERS chunks, about `num_bytes` in all, and memory to put them from and read them into."""

    def __init__(self, num_bytes: int, chunk_bytes: int, salt: bytes = b"") -> None:
        """Another `salt` makes other spans."""
        layout = SpanLayout.shared((ChunkKind.HIDDEN,) * NUM_LAYERS, chunk_bytes, chunk_bytes)
        num_spans = max(1, num_bytes // layout.num_bytes)
        self.num_bytes = num_spans * layout.num_bytes
        span_ids = [hashlib.blake2b(b"%d" % idx, digest_size=32, salt=salt).digest() for idx in range(num_spans)]
        self.records: Sequence[SpanRecord] = [
            SpanRecord(
                span_id=span_id,
                parent_id=None,
                span_idx=idx,
                token_ids=bytes(256),
                layout=layout,
                root_id=span_ids[0],  # in turn on all disks, as a context is
            )
            for idx, span_id in enumerate(span_ids)
        ]
        num_chunks = max(num_spans, NUM_LAYERS)
        self.window = aligned(num_chunks * chunk_bytes, 3)
        self._chunks = [self.window[idx * chunk_bytes : (idx + 1) * chunk_bytes] for idx in range(num_chunks)]

    def put(self, store: ChunkStore) -> int:
        """Put and flush. Returns bytes. Raises HCacheError."""
        for record in self.records:
            if not store.put(record, self._chunks[:NUM_LAYERS]):
                raise HCacheError("the store dropped a span; is the disk full?")
        store.flush()
        return self.num_bytes

    def get(self, store: ChunkStore) -> int:
        """Read all, layer by layer, as a restore does. Returns bytes. Raises HCacheError."""
        for layer_idx in range(NUM_LAYERS):
            reads = [
                ChunkRead(span_id=record.span_id, layer_idx=layer_idx, out=self._chunks[idx])
                for idx, record in enumerate(self.records)
            ]
            if (outcome := store.get_into(reads)).num_ok != len(reads):
                raise HCacheError(f"a chunk could not be read back: {outcome.reason}")
        return self.num_bytes


def file_store(folders: Sequence[Path], num_bytes: int, chunk_bytes: int, io: str) -> tuple[Cost, Cost]:
    """Put and flush, then read back, the page cache dropped and the memory lent: `(write, read)`. Several folders are
    striped over; they are made and removed."""
    spans = Spans(num_bytes, chunk_bytes)
    capacity_bytes = 4 * num_bytes + (64 << 20) * len(folders)
    with ExitStack() as undo:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
        store: ChunkStore
        if len(folders) > 1:
            store = open_striped(StripeSet.of(folders), capacity_bytes, io=io, flush_interval_s=None)
        else:
            state_dir = StateDir(folders[0])
            undo.callback(state_dir.close)
            store = FileStore(state_dir, capacity_bytes, io=io, flush_interval_s=None)
        undo.callback(store.close)
        if io == "threads":
            for folder in folders:
                _warm_page_cache(folder, spans.num_bytes // len(folders), chunk_bytes)
        written = measured(lambda: spans.put(store))
        for folder in folders:
            drop_pages(folder.rglob("*.seg"))
        store.lend(spans.window)
        undo.callback(store.take_back, spans.window)
        return written, measured(lambda: spans.get(store))


def _warm_page_cache(folder: Path, num_bytes: int, chunk_bytes: int) -> None:
    """Have the page cache use and give back so much memory, in the same pieces; nothing gets to the disk. See
    `device_passes.threads`."""
    path, block = folder / "warm", bytes(chunk_bytes)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        path.unlink()
        for start in range(0, num_bytes, chunk_bytes):
            os.pwrite(fd, block, start)
    finally:
        os.close(fd)


def checksum(num_bytes: int, chunk_bytes: int) -> Cost:
    """Verification alone, by one thread, on memory that is not in the CPU's caches."""
    window = aligned(max(WINDOW_BYTES, chunk_bytes), 5)
    num_chunks = len(window) // chunk_bytes
    chunks = [window[idx * chunk_bytes : (idx + 1) * chunk_bytes] for idx in range(num_chunks)]
    num_rounds = max(1, num_bytes // (num_chunks * chunk_bytes))

    def work() -> int:
        for _ in range(num_rounds):
            for chunk in chunks:
                crc32c(chunk)
        return num_rounds * num_chunks * chunk_bytes

    return measured(work)
