"""Chunks where they lie in a store's memory, lent to whoever reads them there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from mii_hcache.storage.dram import new_buffer

if TYPE_CHECKING:
    from mii_hcache.storage.records import ReadOutcome


class BorrowedChunks:
    """Verified chunks, until they are given back. Any thread."""

    def __init__(
        self,
        chunks: Sequence[memoryview],
        outcome: ReadOutcome,
        give_back: Callable[[], None] = lambda: None,
        addresses: Sequence[int] | None = None,
    ) -> None:
        """`give_back` is called once, and does not block."""
        self.outcome = outcome
        """As of `ChunkStore.get_into`."""
        self.chunks = tuple(chunks)
        """The leading `outcome.num_ok` ones that were asked for: C-contiguous, format `B`, to be read and not to be
        written to. Nobody changes their bytes, or puts others in their place, until they are given back, whatever
        becomes of the span and the store."""
        self.addresses = addresses
        """Where each of them begins; None where the store does not know."""
        self._give_back: Callable[[], None] | None = give_back

    def give_back(self) -> None:
        """Nobody reads the chunks any more, no device either. Does not block; again, it does nothing."""
        give_back, self._give_back = self._give_back, None
        self.chunks = ()
        if give_back is not None:
            give_back()


class SpanMemory(Protocol):
    """Where a store in DRAM gets its memory from. Any thread."""

    def new_buffer(self, num_bytes: int) -> memoryview:
        """Writable bytes that hold anything, `[num_bytes]`; they go back with the last view of them. Raises OSError,
        MemoryError."""
        ...

    def is_pinned(self, buffer: memoryview) -> bool:
        """Whether a device copies from a buffer of `new_buffer` at full speed, and behind the caller's back."""
        ...


class PlainMemory(SpanMemory):
    """The system's."""

    def new_buffer(self, num_bytes: int) -> memoryview:
        return new_buffer(num_bytes)

    def is_pinned(self, buffer: memoryview) -> bool:
        return False
