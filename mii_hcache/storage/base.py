"""The ChunkStore contract: spans of chunks, put whole, read in pieces, verified on every read.

All methods may be called from any thread. Buffers are C-contiguous and belong to the caller; a store has copied or
written them when a call returns, and keeps no reference.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mii_hcache.core.identity import SpanId
from mii_hcache.storage.records import ChunkRead, DeviceRead, ReadOutcome, SpanRecord

if TYPE_CHECKING:
    from mii_hcache.storage.borrowing import BorrowedChunks
    from mii_hcache.storage.directions import ChunkWanted, ReadDirections, SharedDraft, Writer
    from mii_hcache.storage.drafts import FileDrafts


@dataclass(frozen=True, kw_only=True)
class StoreStats:
    """A store at one moment. Counters count since the store was opened."""

    num_spans: int
    num_bytes: int
    """Payload bytes held."""
    capacity_bytes: int
    put_bytes: int
    read_bytes: int
    evicted_spans: int
    """Includes those of `evicted_ahead_spans`."""
    dropped_spans: int
    """Puts refused for want of room or because of an I/O error."""
    corrupt_chunks: int
    unavailable: int = 0
    """Batches of reads and puts that failed because a device did, or was away."""
    num_away: int = 0
    """Devices that are missing or away now."""
    evicted_ahead_spans: int = 0
    """Evicted in the background, to have room for puts to come."""
    put_waits: int = 0
    """Times that a put had to evict something itself, and waited for it."""


class DeviceReader(ABC):
    """A store's chunks, straight into the memory of one GPU. Any thread, until the store is closed."""

    @abstractmethod
    def get_into(self, reads: Sequence[DeviceRead]) -> ReadOutcome:
        """`ChunkStore.get_into` for device memory. Blocks. Raises ValueError when places overlap, for the bytes of one
        chunk over another's would look like damage.

        The leading `num_ok` chunks are in place and were verified there when this returns: for whatever is launched
        from now on, on any stream. Before the call, nothing on the GPU may still use the memory; that is for the caller
        to wait for (an event). Memory of later reads holds anything, and nothing writes to it any more.

        One more reason: `unavailable`, when the GPU failed and not the chunk; the span stays, for other ways to read.
        """

    @abstractmethod
    def lend(self, address: int, num_bytes: int) -> bool:
        """Tell of device memory that many reads will go to, which spares them a copy on the GPU. False when it could
        not be registered (a GPU's window for that is bounded): reads work all the same."""

    @abstractmethod
    def take_back(self, address: int, num_bytes: int) -> None:
        """Undo `lend`, before the memory is freed; no read into it is running. What was not lent is ignored."""


class ChunkStore(ABC):
    """Spans under their ids. Bounded; `storage.eviction` says which spans go first."""

    name: str
    """What `restored_from` says: `memory`, `file`, ..."""

    @abstractmethod
    def put(self, record: SpanRecord, chunks: Sequence[memoryview]) -> bool:
        """Accept a span. True: it can be found and read from now on (also if another writer was first: the first one
        stays, these bytes are dropped). False: no room could be made or the device failed; counted, never raised.

        `chunks[i]`: what `record.layout.chunks[i]` says. May block on I/O.
        """

    def put_through(self, record: SpanRecord, chunks: Sequence[memoryview]) -> bool:
        """`put` past any tier in memory: returns once the device has taken the bytes (as far as the backend goes around
        the page cache)."""
        return self.put(record, chunks)

    @property
    def drafts(self) -> FileDrafts | None:
        """Where spans may be written row by row, straight to the device; None when only whole spans are taken."""
        return None

    @abstractmethod
    def find(self, span_id: SpanId) -> SpanRecord | None:
        """The record of a span that can be read now, else None. Does not block on I/O, does not count as use."""

    def tier_of(self, span_id: SpanId) -> str | None:
        """Name of the tier that would serve the span now (what `restored_from` reports), None when unknown."""
        return self.name if self.find(span_id) is not None else None

    def why_missing(self, span_id: SpanId) -> str:
        """Best known reason why `find` is None: `evicted`, `corrupt`, `deleted`, `expired`, `unavailable` while its
        device is away, or `not_saved` when never seen (or forgotten: a bounded number of reasons is remembered, for as
        long as the process lives)."""
        return "not_saved"

    @abstractmethod
    def get_into(self, reads: Sequence[ChunkRead]) -> ReadOutcome:
        """Read chunks, in order of importance: the outcome says how many leading ones arrived verified. Counts as use.

        A span found damaged is forgotten at once (counted in `corrupt_chunks`), so that it can be saved anew. One that
        the device does not give is not.
        """

    def borrow(self, wanted: Sequence[ChunkWanted], *, must_be_pinned: bool = False) -> BorrowedChunks | None:
        """`get_into` without the copy: chunks where they lie in memory, verified there. Give them back. None where they
        do not lie in memory, or not all of them, or not in pinned memory and `must_be_pinned`: then `get_into` may
        bring them. Counts as use; does not block on I/O, but takes the time of a look at every byte.

        What is lent is not evicted, counts against the capacity also after it was deleted, and outlives the store.
        """
        return None

    def directions(self, wanted: Sequence[ChunkWanted]) -> ReadDirections | None:
        """To chunks that another process of this machine reads, in order of importance; counts as use. Call `end` on
        them. None where only this process can read. Does not block on I/O."""
        return None

    def share_draft(self, record: SpanRecord, writer: Writer | None = None) -> SharedDraft | None:
        """Room for a span whose chunks several processes write; as `put`, it may evict, and block on I/O. `writer`
        writes most of it, None: all write as much; a store on several devices gives each writer devices of its own, as
        far as there are enough. None when no room could be made, the device is away, or only this process can write."""
        return None

    def lend(self, buffer: memoryview) -> None:  # noqa: B027, a hint may be ignored
        """Tell of memory that many reads will go to: a hint, which may make them cheaper. The store may keep it alive
        and in RAM until `take_back`. Writable, C-contiguous; may block briefly."""

    def take_back(self, buffer: memoryview) -> None:  # noqa: B027, a hint may be ignored
        """Undo `lend`; no read into the memory is running. What was not lent is ignored."""

    def weigh(self, loss: Callable[[int], float]) -> None:  # noqa: B027, a hint may be ignored
        """Tell how many seconds a restore loses when the span at a position of its history is not there but others
        are: a hint for eviction, to be given where a missing span can be filled in. Any unit: only ratios count."""

    def device_reader(self, gpu_idx: int) -> DeviceReader | None:
        """Reads into the memory of GPU `gpu_idx` (as CUDA numbers them in this process) that do not pass through this
        program's; None where that cannot be had, as in most stores. The first call for a GPU opens and tries the path,
        which blocks and makes the GPU's primary context; the answer does not change while the store is open."""
        return None

    @abstractmethod
    def touch(self, span_ids: Iterable[SpanId]) -> None:
        """Mark as just used; unknown ids are ignored."""

    @abstractmethod
    def pin(self, span_ids: Iterable[SpanId]) -> None:
        """Keep from eviction until `unpin`; counted, unknown ids are ignored. Deletion overrides pins safely: a read
        of a deleted span is `missing`, never another span's bytes."""

    @abstractmethod
    def unpin(self, span_ids: Iterable[SpanId]) -> None:
        """Undo one `pin` of each id."""

    @contextmanager
    def pinned(self, span_ids: Sequence[SpanId]) -> Iterator[None]:
        """`pin` for the time of a `with` block."""
        self.pin(span_ids)
        try:
            yield
        finally:
            self.unpin(span_ids)

    @abstractmethod
    def delete(self, span_ids: Iterable[SpanId]) -> int:
        """Forget spans; how many were there. Unreadable at once; once flushed gone for good, after a power cut, too."""

    def expire(self, since_s: float) -> list[SpanId]:
        """Delete what was last used before `since_s` (seconds since 1970) and is not pinned. Returns what went; a store
        that keeps no times deletes nothing."""
        return []

    @abstractmethod
    def flush(self) -> None:
        """Return when everything accepted before the call outlives the process (no-op for stores that never do). What
        outlives a power cut is a store's own to say; deletions do. A device that hangs is not waited for: what lies
        there is durable only once it answers."""

    @abstractmethod
    def stats(self) -> StoreStats:
        """A consistent snapshot of sizes and counters."""

    @abstractmethod
    def close(self) -> None:
        """Flush, then release files and threads; in bounded time, leaving behind what hangs. Idempotent."""
