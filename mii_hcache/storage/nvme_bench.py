"""How fast a namespace is."""

from __future__ import annotations

import os
import random
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mii_hcache.errors import ConfigError
from mii_hcache.storage.dram import new_buffer
from mii_hcache.storage.nvme import NvmeFile

if TYPE_CHECKING:
    from mii_hcache import _io

_PER_BATCH = 8
"""Requests of a batch: Python wakes up once for so many."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Requests that ended, and what they cost."""

    num_requests: int
    num_bytes: int
    duration_s: float
    cpu_s: float
    """Of all threads of this process; polling counts."""

    def facts(self) -> dict[str, float]:
        """For JSON."""
        return {
            "bytes_per_s": self.num_bytes / self.duration_s,
            "requests_per_s": self.num_requests / self.duration_s,
            "cpu_s_per_gb": self.cpu_s / (self.num_bytes / 1e9),
            "duration_s": self.duration_s,
        }

    def __str__(self) -> str:
        facts = self.facts()
        return (
            f"{facts['bytes_per_s'] / 1e9:6.2f} GB/s  {facts['requests_per_s']:9.0f} requests/s  "
            f"{facts['cpu_s_per_gb']:.3f} CPU seconds a GB"
        )


def measure(namespace: NvmeFile, is_write: bool, size_bytes: int, depth: int, duration_s: float) -> Measured:
    """Random reads or writes, about `depth` in flight, in places that are multiples of their size. Blocks. Raises
    OSError, ConfigError for a namespace that is too small."""
    num_places = namespace.num_bytes // size_bytes
    if num_places < 1:
        raise ConfigError(f"the namespace has {namespace.num_bytes} bytes: less than a request of {size_bytes}")
    per_batch = min(_PER_BATCH, depth)
    num_batches = -(-depth // per_batch)
    rng = random.Random(1)
    batches = deque([memoryview(new_buffer(size_bytes)) for _ in range(per_batch)] for _ in range(num_batches))
    for buffers in batches:
        for buffer in buffers:
            buffer[:] = rng.randbytes(size_bytes) if is_write else bytes(size_bytes)
            namespace.device.lend(buffer)
    flying: deque[tuple[list[memoryview], _io.Batch]] = deque()
    num_requests = 0
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    try:
        while batches or flying:
            while batches:
                buffers = batches.popleft()
                requests = [
                    (is_write, namespace.native, rng.randrange(num_places) * size_bytes, buffer) for buffer in buffers
                ]
                flying.append((buffers, namespace.device.submit(requests)))
            buffers, batch = flying.popleft()
            results = batch.wait_all()
            batch.close()
            for result in results:
                if result != size_bytes:
                    raise OSError(-result, os.strerror(-result)) if result < 0 else OSError("a short transfer")
            num_requests += len(results)
            if time.perf_counter() - start_s < duration_s:
                batches.append(buffers)
        stop_s, stop_cpu_s = time.perf_counter(), time.process_time()
    finally:
        for _, batch in flying:
            batch.close()
    return Measured(
        num_requests=num_requests,
        num_bytes=num_requests * size_bytes,
        duration_s=stop_s - start_s,
        cpu_s=stop_cpu_s - start_cpu_s,
    )
