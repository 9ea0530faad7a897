"""Writes spans whole: room, slots, and only then a place in the index."""

from __future__ import annotations

import errno
import logging
from array import array
from collections.abc import Callable, Sequence

from crc32c import crc32c

from mii_hcache.storage.format import SlotHeader
from mii_hcache.storage.index import FileIndex, HeldSpan
from mii_hcache.storage.presence import AWAY_ERRNOS, Presence
from mii_hcache.storage.records import SpanRecord
from mii_hcache.storage.room import Room
from mii_hcache.storage.segments import Segments
from mii_hcache.storage.slots import Places
from mii_hcache.storage.trouble import Trouble

_log = logging.getLogger(__name__)


class SpanWriter:
    """Of a FileStore. Any thread; blocks on I/O. A disk that fails or hangs is away from then on."""

    def __init__(
        self,
        *,
        index: FileIndex,
        room: Room,
        segments: Segments,
        header_of: Callable[[HeldSpan, int], SlotHeader],
        presence: Presence,
        check: Callable[[], None],
    ) -> None:
        """`check` raises OSError when nothing may be written."""
        self._index = index
        self._room = room
        self._segments = segments
        self._header_of = header_of
        self._presence = presence
        self._check = check
        self._trouble = Trouble(_log)

    def write(
        self,
        record: SpanRecord,
        chunks: Sequence[memoryview],
        crcs: Sequence[int] | None,
        is_wanted: Callable[[], bool],
    ) -> bool:
        """Write a span and publish it, if it is still wanted: the chunks may be others' memory when it is not. `crcs`:
        None to take them now. False when no room could be made, the disk failed, or the store is closed."""
        with self._index.operation() as is_open, self._presence.operation():
            return is_open and self._write_and_publish(record, chunks, crcs, is_wanted)

    def _write_and_publish(
        self,
        record: SpanRecord,
        chunks: Sequence[memoryview],
        crcs: Sequence[int] | None,
        is_wanted: Callable[[], bool],
    ) -> bool:
        if crcs is None:
            crcs = [crc32c(chunk) for chunk in chunks]
        for _ in range(2):
            places = self._room.reserve(record.layout)
            if places is None:
                return False
            generation = self._index.next_generation()
            span = HeldSpan(record=record, generation=generation, places=Places(places), crcs=array("I", crcs))
            try:
                self._check()
                headers = [self._header_of(span, chunk_idx) for chunk_idx in range(len(chunks))]
                self._segments.write(zip(places, headers, chunks, strict=True))
            except OSError as error:
                self._trouble.tell("spans cannot be written to files (%s): evicting, else dropping them", error)
                self._room.erase(places)
                if error.errno in AWAY_ERRNOS:
                    self._presence.failed(error)
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    return False
                self._room.pause_growth()
                continue
            except BaseException:
                self._room.erase(places)
                raise
            if not is_wanted():
                self._room.erase(places)
                return False
            if not self._index.publish(span):
                self._room.give_back(places)
            return True
        return False
