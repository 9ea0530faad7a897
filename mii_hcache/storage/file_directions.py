"""Directions to the slots of a FileStore, and drafts that others write."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping, Sequence

from crc32c import crc32c

from mii_hcache.storage.directions import ChunkWanted, ReadDirections, SharedDraft, SlotDirection
from mii_hcache.storage.drafts import FileDrafts, RowWrite, SpanDraft
from mii_hcache.storage.dram import new_buffer
from mii_hcache.storage.format import SlotHeader
from mii_hcache.storage.index import FileIndex, HeldSpan
from mii_hcache.storage.presence import Presence
from mii_hcache.storage.records import ReadOutcome, SpanRecord
from mii_hcache.storage.segments import Segments
from mii_hcache.storage.suspects import Suspects


class FileDirections:
    """Of a FileStore whose segments are files. Any thread; does not block on I/O."""

    def __init__(
        self,
        *,
        index: FileIndex,
        segments: Segments,
        header_of: Callable[[HeldSpan, int], SlotHeader],
        presence: Presence,
        suspects: Suspects,
        forget: Callable[[HeldSpan, int, str], None],
    ) -> None:
        """`suspects` and `forget` as in `SpanReader`."""
        self._index = index
        self._segments = segments
        self._header_of = header_of
        self._presence = presence
        self._suspects = suspects
        self._forget = forget

    def of(self, wanted: Sequence[ChunkWanted]) -> ReadDirections:
        """See `ChunkStore.directions`."""
        found = self._index.begin_reads(wanted)
        slots: list[SlotDirection] = []
        try:
            for span, chunk_idx in found:
                address = self._segments.address(span.places[chunk_idx])
                assert address is not None, "segments of this store are no files"
                path, offset = address
                slots.append(SlotDirection(path=path, offset=offset, header=self._header_of(span, chunk_idx)))
        except BaseException:
            self._index.end_reads(found)
            raise
        reason = None if len(found) == len(wanted) else "missing"
        return ReadDirections(slots, reason, lambda outcome: self._end(found, outcome))

    def _end(self, found: list[tuple[HeldSpan, int]], outcome: ReadOutcome) -> None:
        try:
            sizes = [span.record.layout.chunks[chunk_idx].num_bytes for span, chunk_idx in found]
            with self._index.lock:
                self._index.counters.read_bytes += sum(sizes[: outcome.num_ok])
            if outcome.num_ok >= len(found) or outcome.reason is None:
                return
            span, chunk_idx = found[outcome.num_ok]
            if outcome.reason == "unavailable":
                self._index.count_unavailable()
                self._suspects.add(span.record.read_of(chunk_idx, new_buffer(sizes[outcome.num_ok])))
                self._presence.failed(OSError(errno.EIO, os.strerror(errno.EIO)))
            else:
                self._forget(span, chunk_idx, outcome.reason)
        finally:
            self._index.end_reads(found)


class FileSharedDraft(SharedDraft):
    """A draft of a FileStore."""

    def __init__(self, drafts: FileDrafts, draft: SpanDraft, record: SpanRecord) -> None:
        """Takes the draft over. Raises OSError; then the draft is still the caller's."""
        self.payloads = drafts.payloads(draft)
        self._drafts = drafts
        self._draft = draft
        self._record = record

    def write(self, chunks: Mapping[int, memoryview]) -> list[int]:
        self._drafts.write([RowWrite(self._draft, idx, 0, chunk) for idx, chunk in chunks.items()])
        return [crc32c(chunk) for chunk in chunks.values()]

    def publish(self, crcs: Sequence[int]) -> bool:
        return self._drafts.publish_written(self._draft, self._record, crcs)

    def drop(self, error: OSError | None = None) -> None:
        self._drafts.drop(self._draft, error)

    def abandon(self) -> None:
        pass  # its slots count as taken, and no row names them


def begin_shared(drafts: FileDrafts, record: SpanRecord) -> FileSharedDraft | None:
    """See `ChunkStore.share_draft`."""
    draft = drafts.begin(record.layout)
    if draft is None:
        return None
    try:
        return FileSharedDraft(drafts, draft, record)
    except OSError as error:
        drafts.drop(draft, error)
        return None
    except BaseException:
        drafts.drop(draft)
        raise
