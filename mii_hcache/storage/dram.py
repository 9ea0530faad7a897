"""Host memory for spans, used again rather than asked for anew."""

from __future__ import annotations

import mmap

_PAGE_BYTES = mmap.PAGESIZE


def new_buffer(num_bytes: int) -> memoryview:
    """Zeroed memory whose pages are made when they are first written, which is outside the GIL in a large copy; a
    bytearray would write all of it at once, holding the GIL."""
    if num_bytes < _PAGE_BYTES:
        return memoryview(bytearray(num_bytes))
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(memory, "madvise") and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


class SpareBuffers:
    """Buffers that nobody uses now, by size. Not thread-safe: the owner's lock covers it."""

    def __init__(self) -> None:
        self._by_size: dict[int, list[memoryview]] = {}
        self.num_bytes = 0
        """Of all buffers here."""

    def give(self, buffer: memoryview) -> None:
        """Keep a buffer that nobody refers to any more."""
        self._by_size.setdefault(len(buffer), []).append(buffer)
        self.num_bytes += len(buffer)

    def take(self, num_bytes: int) -> memoryview | None:
        """A buffer of exactly this size, holding anything; None when there is none."""
        buffers = self._by_size.get(num_bytes)
        if not buffers:
            return None
        self.num_bytes -= num_bytes
        return buffers.pop()

    def shrink(self, max_bytes: int) -> None:
        """Let go of buffers until at most `max_bytes` are left."""
        for size in list(self._by_size):
            buffers = self._by_size[size]
            while buffers and self.num_bytes > max_bytes:
                buffers.pop()
                self.num_bytes -= size
            if not buffers:
                del self._by_size[size]
