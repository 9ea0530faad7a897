"""A store whose reads are slowed down to a bandwidth: for emulating devices that this machine does not have."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from mii_hcache.errors import ConfigError
from mii_hcache.storage.base import ChunkStore
from mii_hcache.storage.passing import PassingStore
from mii_hcache.storage.records import ChunkRead, ReadOutcome


class Throttle:
    """When bytes arrive from a device that serves all reads in turn, at `bytes_per_s`. Any thread."""

    def __init__(self, bytes_per_s: float, *, latency_s: float = 0.0) -> None:
        """`latency_s` is added to each batch of reads."""
        if bytes_per_s <= 0:
            raise ConfigError(f"read_bytes_per_s must be > 0, got {bytes_per_s}")
        self._bytes_per_s = bytes_per_s
        self._latency_s = latency_s
        self._lock = threading.Lock()
        self._free_at_s = 0.0

    def book(self, num_bytes: int) -> float:
        """A read begins: when it is over. Whoever else asks meanwhile waits behind."""
        with self._lock:
            self._free_at_s = max(time.perf_counter(), self._free_at_s) + num_bytes / self._bytes_per_s
            return self._free_at_s + self._latency_s

    def wait(self, done_s: float) -> None:
        """Until then."""
        left_s = done_s - time.perf_counter()
        if left_s > 0:
            time.sleep(left_s)


class ThrottledStore(PassingStore):
    """Wraps a store; all reads together arrive no faster than `read_bytes_per_s`, as from one device that serves them
    in turn. Results are emulated, and must be called so. Writing is not slowed down. Who follows `directions` throttles
    itself: each process has a device of its own."""

    def __init__(self, inner: ChunkStore, read_bytes_per_s: float, *, read_latency_s: float = 0.0) -> None:
        """Takes `inner` over. `read_latency_s` is added to each batch of reads."""
        super().__init__(inner)
        self._throttle = Throttle(read_bytes_per_s, latency_s=read_latency_s)
        self.read_bytes_per_s = read_bytes_per_s

    def get_into(self, reads: Sequence[ChunkRead]) -> ReadOutcome:
        done_s = self._throttle.book(sum(read.out.nbytes for read in reads))
        outcome = self._inner.get_into(reads)
        self._throttle.wait(done_s)
        return outcome
