"""Memory for the DRAM tier that a GPU copies from where the spans lie. Never run on a GPU."""

from __future__ import annotations

import ctypes

from mii_hcache.runtime.buffers import as_bytes
from mii_hcache.runtime.pinned import PinnedMemory, pinned_memory
from mii_hcache.storage.borrowing import SpanMemory

SLAB_BYTES = 256 << 20
"""About as much is pinned at a time, which takes tens of milliseconds on a thread that nobody waits for: the DRAM tier
takes that much more than its capacity at most, but for what spans of other sizes leave in between."""
_PAGE_BYTES = 4096


class PinnedSpans(SpanMemory):
    """Pieces of pinned slabs, into which spans fit without a rest. Where memory cannot be pinned it is plain, and is
    not lent to devices: reads go through the restorer's own buffers, of which a few suffice."""

    def __init__(self, memory: PinnedMemory, *, slab_bytes: int = SLAB_BYTES) -> None:
        self._memory = memory
        self._slab_bytes = slab_bytes

    def new_buffer(self, num_bytes: int) -> memoryview:
        piece_bytes = -(-num_bytes // _PAGE_BYTES) * _PAGE_BYTES
        num_pieces = max(1, self._slab_bytes // piece_bytes)
        return as_bytes(self._memory.empty(num_bytes, slab_bytes=num_pieces * piece_bytes))

    def is_pinned(self, buffer: memoryview) -> bool:
        return self._memory.is_pinned(ctypes.addressof(ctypes.c_char.from_buffer(buffer)))


def span_memory() -> SpanMemory | None:
    """For this process's DRAM tier; None for the system's, where there is no GPU to copy to."""
    memory = pinned_memory()
    return None if memory is None else PinnedSpans(memory)
