"""A throttled store gives the same bytes, not sooner than the bandwidth allows."""

from __future__ import annotations

import threading
import time

import pytest

from mii_hcache.errors import ConfigError
from mii_hcache.storage.memory import MemoryStore
from mii_hcache.storage.records import ChunkRead
from mii_hcache.storage.throttled import ThrottledStore
from tests.storage.storage_kit import CHUNK_BYTES, make_chunks, make_record, put


def _read(store: ThrottledStore, record, layer_idx: int) -> tuple[bytes, float]:
    out = memoryview(bytearray(CHUNK_BYTES))
    started_s = time.perf_counter()
    outcome = store.get_into([ChunkRead(span_id=record.span_id, layer_idx=layer_idx, out=out)])
    assert outcome.num_ok == 1
    return bytes(out), time.perf_counter() - started_s


def test_readers_share_the_bandwidth():
    store = ThrottledStore(MemoryStore(1 << 20), 20 * CHUNK_BYTES)  # a chunk takes 50 ms
    record = make_record("a")
    assert put(store, record)
    chunks = [bytes(chunk) for chunk in make_chunks(record)]
    started_s = time.perf_counter()
    found: dict[int, bytes] = {}

    def read(layer_idx: int) -> None:
        found[layer_idx] = _read(store, record, layer_idx)[0]

    threads = [threading.Thread(target=read, args=(layer_idx,)) for layer_idx in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.perf_counter() - started_s >= 0.15
    assert [found[layer_idx] for layer_idx in (1, 2, 3)] == chunks
    store.close()


def test_an_idle_device_saves_up_no_bandwidth():
    store = ThrottledStore(MemoryStore(1 << 20), 20 * CHUNK_BYTES, read_latency_s=0.02)
    record = make_record("a")
    assert put(store, record)
    _read(store, record, 1)
    time.sleep(0.2)
    assert _read(store, record, 2)[1] >= 0.07
    store.close()


def test_a_bandwidth_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="read_bytes_per_s must be > 0, got 0"):
        ThrottledStore(MemoryStore(1 << 20), 0)
