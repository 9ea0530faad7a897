"""Aligned memory for the length of one batch."""

from __future__ import annotations

import threading
from collections.abc import Callable

from mii_hcache.storage.dram import new_buffer

ARENA_BYTES = 1 << 20
_MAX_KEPT = 4
"""Arenas kept and registered: 4 MiB, half of the locked memory that a plain user may have."""


class Arena:
    """Pieces of page-aligned memory, all given back together. Not thread-safe."""

    def __init__(self, pool: ArenaPool) -> None:
        self._pool = pool
        self.pages: list[memoryview] = []
        self._used_bytes = ARENA_BYTES

    def take(self, num_bytes: int) -> memoryview:
        """Memory holding anything; `num_bytes` is a multiple of a page and at most ARENA_BYTES."""
        if self._used_bytes + num_bytes > ARENA_BYTES:
            self.pages.append(self._pool.take())
            self._used_bytes = 0
        start, self._used_bytes = self._used_bytes, self._used_bytes + num_bytes
        return self.pages[-1][start : start + num_bytes]


class ArenaPool:
    """A few buffers of ARENA_BYTES that are used again and again. Any thread."""

    def __init__(self, lend: Callable[[memoryview], object]) -> None:
        """`lend` is told of buffers that will be kept."""
        self._lend = lend
        self._lock = threading.Lock()
        self._kept: list[memoryview] = []
        self._num_kept = 0

    def give_back(self, arena: Arena) -> None:
        """Nobody uses an arena's pieces any more. An arena that is not given back is only lost to others."""
        with self._lock:
            self._kept += arena.pages[: _MAX_KEPT - len(self._kept)]
        arena.pages = []

    def take(self) -> memoryview:
        """For an arena: one buffer."""
        with self._lock:
            if self._kept:
                return self._kept.pop()
            is_new = self._num_kept < _MAX_KEPT
            self._num_kept += is_new
        buffer = new_buffer(ARENA_BYTES)
        if is_new:
            self._lend(buffer)
        return buffer
