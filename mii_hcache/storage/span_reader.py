"""Reads chunks of spans into host memory, verified."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from crc32c import crc32c

from mii_hcache.errors import CorruptChunkError
from mii_hcache.storage.format import SlotHeader
from mii_hcache.storage.index import FileIndex, HeldSpan
from mii_hcache.storage.lanes import Lanes
from mii_hcache.storage.presence import Presence
from mii_hcache.storage.records import ChunkRead, ReadOutcome
from mii_hcache.storage.segment_space import StaleSlotError
from mii_hcache.storage.segments import Segments, SlotsArriving
from mii_hcache.storage.suspects import Suspects


class SpanReader:
    """Of a FileStore. Any thread; blocks on I/O. A disk that fails is away from then on."""

    def __init__(
        self,
        *,
        index: FileIndex,
        segments: Segments,
        header_of: Callable[[HeldSpan, int], SlotHeader],
        presence: Presence,
        suspects: Suspects,
        forget: Callable[[HeldSpan, int, str], None],
        num_threads: int,
    ) -> None:
        """`suspects` are told of what the disk does not give, `forget` of a span whose chunk is `missing` or `corrupt`.
        `num_threads` wait for one batch and verify it."""
        self._index = index
        self._segments = segments
        self._header_of = header_of
        self._presence = presence
        self._suspects = suspects
        self._forget = forget
        self._lanes = Lanes(num_threads, "hcache-read")

    def read(self, reads: Sequence[ChunkRead]) -> ReadOutcome:
        """Read what of the leading reads is here; `reason` is None when that is all that was asked for."""
        found = self._index.begin_reads(reads)
        try:
            slots = [(span.places[idx], read.out) for (span, idx), read in zip(found, reads, strict=False)]
            with self._segments.reading(slots) as arriving:
                num_ok, reason = self._lanes.run(
                    len(found), lambda idx: self._finish(arriving, idx, *found[idx], reads[idx])
                )
            if reason == "unavailable":
                self._index.count_unavailable()
            elif reason is not None:
                self._forget(*found[num_ok], reason)
        finally:
            self._index.end_reads(found)
        return ReadOutcome(num_ok=num_ok, reason=reason)

    def close(self) -> None:
        """End the threads; no read is running. Idempotent."""
        self._lanes.close()

    def _finish(self, arriving: SlotsArriving, idx: int, span: HeldSpan, chunk_idx: int, read: ChunkRead) -> str | None:
        try:
            arriving.finish(idx, self._header_of(span, chunk_idx))
            if crc32c(read.out) != span.crcs[chunk_idx]:
                raise CorruptChunkError("wrong checksum")
        except StaleSlotError:
            return "missing"
        except CorruptChunkError:
            return "corrupt"
        except OSError as error:
            self._suspects.add(read)
            self._presence.failed(error)
            return "unavailable"
        return None
