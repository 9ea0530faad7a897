"""Chunks that a device did not give: is it the chunk, or the device?"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

from mii_hcache.core.identity import SpanId
from mii_hcache.errors import CorruptChunkError
from mii_hcache.storage.dram import new_buffer
from mii_hcache.storage.format import SlotHeader
from mii_hcache.storage.index import FileIndex, HeldSpan
from mii_hcache.storage.records import ChunkRead, SpanRecord
from mii_hcache.storage.segments import Segments

_MAX_SUSPECTS = 64
_NUM_OTHERS = 3
"""Chunks that are read besides those that are suspected."""


class Suspects:
    """Remembers chunks whose reads failed, to read them again when the device answers. Any thread."""

    def __init__(self, index: FileIndex, segments: Segments, header_of: Callable[[HeldSpan, int], SlotHeader]) -> None:
        self._index = index
        self._segments = segments
        self._header_of = header_of
        self._lock = threading.Lock()
        self._reads: dict[SpanId, ChunkRead] = {}

    def add(self, read: ChunkRead) -> None:
        """A read failed. What is too many is found again when it is wanted."""
        with self._lock:
            if len(self._reads) < _MAX_SUSPECTS and read.span_id not in self._reads:
                self._reads[read.span_id] = replace(read, out=new_buffer(read.out.nbytes))

    def read_again(self) -> list[tuple[HeldSpan, int]]:
        """The chunks that fail although others can be read: these are damaged. Blocks on I/O. Raises OSError when
        nothing can be read: then it is the device, and the suspects remain."""
        with self._lock:
            suspects, self._reads = self._reads, {}
        others = [_first_chunk(one) for one in self._index.some(_NUM_OTHERS) if one.span_id not in suspects]
        errors = [error for read in others for _, _, error in self._failures_of(read)]
        if others and len(errors) == len(others):
            with self._lock:
                self._reads = suspects | self._reads
            raise errors[0]
        return [(span, chunk_idx) for read in suspects.values() for span, chunk_idx, _ in self._failures_of(read)]

    def _failures_of(self, read: ChunkRead) -> list[tuple[HeldSpan, int, OSError]]:
        """How a chunk fails to be read, in a list; empty when it does not, or is not there any more."""
        with self._index.operation() as is_open:
            found = self._index.begin_reads([read]) if is_open else []
            try:
                for span, chunk_idx in found:
                    with self._segments.reading([(span.places[chunk_idx], read.out)]) as arriving:
                        arriving.finish(0, self._header_of(span, chunk_idx))
            except CorruptChunkError:
                return []  # the device gave something: whether that is right is seen when it is wanted
            except OSError as error:
                return [(*found[0], error)]
            finally:
                self._index.end_reads(found)
        return []


def _first_chunk(record: SpanRecord) -> ChunkRead:
    chunk = record.layout.chunks[0]
    out = new_buffer(chunk.num_bytes)
    return record.read_of(0, out)
