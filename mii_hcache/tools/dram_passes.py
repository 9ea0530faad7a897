"""Copies in memory: by plain memcpy, by the copies that the DRAM tier makes, and by the DRAM tier itself."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor

from mii_hcache.storage.copying import Copying
from mii_hcache.storage.memory import MemoryStore
from mii_hcache.tools.cost import Cost, aligned, measured
from mii_hcache.tools.store_passes import Spans

BUFFER_BYTES = 256 << 20
"""Copied from one buffer of this size into another: no CPU's caches hold it."""


def memcpy(num_bytes: int, num_threads: int, *, buffer_bytes: int = BUFFER_BYTES) -> Cost:
    """The yardstick: each thread copies its share of the buffer by one call of memcpy. `num_bytes` at least."""
    share = buffer_bytes // num_threads
    source, target = aligned(share * num_threads, 1), aligned(share * num_threads, 2)
    array = ctypes.c_char * share
    ends = [
        (array.from_buffer(target, idx * share), array.from_buffer(source, idx * share)) for idx in range(num_threads)
    ]
    num_rounds = max(1, num_bytes // buffer_bytes)
    with ThreadPoolExecutor(num_threads) as pool:

        def work() -> int:
            for _ in range(num_rounds):
                list(pool.map(lambda end: ctypes.memmove(end[0], end[1], share), ends))
            return num_rounds * share * num_threads

        return measured(work)


def copies(num_bytes: int, chunk_bytes: int, num_threads: int, *, buffer_bytes: int = BUFFER_BYTES) -> Cost:
    """What the DRAM tier copies with: the chunks of a buffer in one batch."""
    num_chunks = max(1, buffer_bytes // chunk_bytes)
    source, target = aligned(num_chunks * chunk_bytes, 1), aligned(num_chunks * chunk_bytes, 2)
    starts = range(0, num_chunks * chunk_bytes, chunk_bytes)
    pairs = [(target[start : start + chunk_bytes], source[start : start + chunk_bytes]) for start in starts]
    num_rounds = max(1, num_bytes // (num_chunks * chunk_bytes))
    copying = Copying(num_threads)
    copying.copy(pairs[:1])  # its threads are there

    def work() -> int:
        for _ in range(num_rounds):
            copying.copy(pairs)
        return num_rounds * num_chunks * chunk_bytes

    return measured(work)


def memory_store(num_bytes: int, chunk_bytes: int) -> tuple[Cost, Cost]:
    """The DRAM tier itself, its own threads and checksums included: `(write, read)`. What is written replaces other
    spans, as in a store that has run for a while: the memory is there."""
    earlier, spans = Spans(num_bytes, chunk_bytes, b"earlier"), Spans(num_bytes, chunk_bytes)
    store = MemoryStore(spans.num_bytes)
    try:
        earlier.put(store)
        return measured(lambda: spans.put(store)), measured(lambda: spans.get(store))
    finally:
        store.close()
