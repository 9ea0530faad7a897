"""Spans that are written row by row while they come to be: for saving without a second stage (`--save direct`).

A draft is room in the files and nothing else: no catalog row and no header names what was written there, so a crash
leaves free slots. It becomes a span when all its bytes are there, by headers and the catalog, as any other.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from crc32c import crc32c

from mii_hcache.core.layout import SpanLayout
from mii_hcache.storage.directions import PayloadDirection
from mii_hcache.storage.format import BLOCK_BYTES, SlotHeader
from mii_hcache.storage.index import FileIndex, HeldSpan
from mii_hcache.storage.presence import AWAY_ERRNOS, Presence
from mii_hcache.storage.records import SpanRecord
from mii_hcache.storage.room import Room
from mii_hcache.storage.segments import Segments
from mii_hcache.storage.slots import Place, Places


@dataclass(frozen=True, eq=False, kw_only=True)
class SpanDraft:
    """Room for a span: a slot for each chunk of `layout`. Belongs to its writer until it is published or dropped."""

    layout: SpanLayout
    places: list[Place]


class RowWrite(NamedTuple):
    """Bytes of one chunk of a draft."""

    draft: SpanDraft
    chunk_idx: int
    start: int
    """Byte of the chunk where they go."""
    data: memoryview
    """Format `B`; aligned to 4 KiB, at such a `start` and of such a length they go around the page cache."""


class FileDrafts:
    """Drafts of a FileStore. Any thread, a draft by one at a time; methods block on I/O."""

    def __init__(
        self,
        *,
        index: FileIndex,
        room: Room,
        segments: Segments,
        header_of: Callable[[HeldSpan, int], SlotHeader],
        presence: Presence,
        on_published: Callable[[], None],
    ) -> None:
        self._index = index
        self._room = room
        self._segments = segments
        self._header_of = header_of
        self._presence = presence
        self._on_published = on_published

    def begin(self, layout: SpanLayout) -> SpanDraft | None:
        """Take room, evicting as `put` does. None when there is none, or the disk is away."""
        with self._index.operation() as is_open, self._presence.operation():
            places = self._room.reserve(layout) if is_open and self._presence.is_here else None
        return None if places is None else SpanDraft(layout=layout, places=places)

    def write(self, rows: Sequence[RowWrite]) -> None:
        """Write rows of any drafts as one batch; the same bytes may be written again. Raises OSError: then what any of
        them holds is unknown."""
        with self._index.operation() as is_open:
            if not is_open:
                raise OSError("the store is closed")
            if not self._presence.is_here:
                raise OSError("the disk is away")
            with self._presence.operation():
                self._segments.write_parts([(row.draft.places[row.chunk_idx], row.start, row.data) for row in rows])

    def publish(self, draft: SpanDraft, record: SpanRecord, chunks: Sequence[memoryview]) -> bool:
        """Make a span of a draft all of whose bytes were written: `chunks` are the same bytes, for their checksums. As
        `ChunkStore.put`; takes the draft over. Raises OSError, and then the draft is dropped."""
        record.check_chunks(chunks)
        return self.publish_written(draft, record, [crc32c(chunk) for chunk in chunks])

    def publish_written(self, draft: SpanDraft, record: SpanRecord, crcs: Sequence[int]) -> bool:
        """`publish`, with the checksums that were taken by who wrote."""
        with self._index.operation() as is_open:
            if not is_open:
                return False
            span = HeldSpan(
                record=record,
                generation=self._index.next_generation(),
                places=Places(draft.places),
                crcs=array("I", crcs),
            )
            try:
                headers = [self._header_of(span, chunk_idx) for chunk_idx in range(len(crcs))]
                with self._presence.operation():
                    self._segments.write_ends(list(zip(draft.places, headers, strict=True)))
            except BaseException:
                self._room.erase(draft.places)
                raise
            if not self._index.publish(span):  # somebody else was first
                self._room.give_back(draft.places)
        self._on_published()
        return True

    def payloads(self, draft: SpanDraft) -> tuple[PayloadDirection, ...]:
        """Where other processes may write it, in files that are made and grown for it. Of a store whose segments are
        files. Raises OSError."""
        with self._presence.operation():
            self._segments.make(draft.places)
        payloads = []
        for place, chunk in zip(draft.places, draft.layout.chunks, strict=True):
            address = self._segments.address(place)
            assert address is not None, "segments of this store are no files"
            path, offset = address
            payloads.append(PayloadDirection(path=path, offset=offset + BLOCK_BYTES, num_bytes=chunk.num_bytes))
        return tuple(payloads)

    def drop(self, draft: SpanDraft, error: OSError | None = None) -> None:
        """Give the room back, and the bytes to the disk. `error`: how writing failed elsewhere, if it did."""
        with self._index.operation() as is_open:
            if is_open:
                self._room.erase(draft.places)
        if error is not None and error.errno in (errno.ENOSPC, errno.EDQUOT):
            self._room.pause_growth()
        if error is not None and error.errno in AWAY_ERRNOS:
            self._presence.failed(error)
