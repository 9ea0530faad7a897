"""All segments of one store."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from itertools import accumulate

from mii_hcache.storage.disk_io import DiskFile, DiskIO
from mii_hcache.storage.format import SegmentHeader, SlotHeader
from mii_hcache.storage.segment_space import Segment, SegmentSpace
from mii_hcache.storage.slots import Place

_log = logging.getLogger(__name__)


class Segments:
    """Segments by number. Opening reads every header; what is not this store's is left alone.

    Any thread. Methods block on I/O; the owner sees to it that a place is written and read by nobody else meanwhile.
    """

    def __init__(self, space: SegmentSpace, store_uuid: bytes, io: DiskIO) -> None:
        """`io`, which reads and writes in `space`, is taken over."""
        self._io = io
        self._space = space
        self._store_uuid = store_uuid
        self._files = space.find(store_uuid)
        self.last_number = space.last_number
        """Highest number that any segment here bears, ours or not."""
        self.notes = space.notes
        """Sentences for people about segments that were left alone."""

    @property
    def files(self) -> dict[int, Segment]:
        """A copy of the segments by number."""
        return dict(self._files)

    def add(self, number: int, slot_bytes: int, num_slots: int) -> None:
        """Know a segment that is to be written; the first write makes it. Does not block."""
        header = SegmentHeader(store_uuid=self._store_uuid, slot_bytes=slot_bytes, num_slots=num_slots)
        self._files.setdefault(number, self._space.new(number, header))

    def write(self, slots: Iterable[tuple[Place, SlotHeader, memoryview]]) -> None:
        """Write slots whole, payloads being byte views. Raises OSError."""
        self._io.write(
            [self._files[place.segment].to_write(place.slot, header, payload) for place, header, payload in slots]
        )

    def write_parts(self, parts: Sequence[tuple[Place, int, memoryview]]) -> None:
        """Write bytes of payloads, each from a byte on. Raises OSError."""
        self._io.write_parts(
            [self._files[place.segment].to_write_part(place.slot, start, data) for place, start, data in parts]
        )

    def write_ends(self, slots: Sequence[tuple[Place, SlotHeader]]) -> None:
        """Write headers and padding of slots whose payloads are there. Raises OSError."""
        ends = [self._files[place.segment].to_write_ends(place.slot, header) for place, header in slots]
        self._io.write_parts([part for parts in ends for part in parts])

    def reading(self, slots: Sequence[tuple[Place, memoryview]]) -> SlotsArriving:
        """Begin to read payloads into buffers, for the time of a `with` block."""
        return SlotsArriving(self._io, self._files, slots)

    def where(self, place: Place) -> tuple[DiskFile, int] | None:
        """File of a slot, and where in it the payload begins; None when there is no file."""
        return self._files[place.segment].where(place.slot)

    def address(self, place: Place) -> tuple[str, int] | None:
        """See `Segment.address`."""
        return self._files[place.segment].address(place.slot)

    def make(self, places: Iterable[Place]) -> None:
        """Make the files of slots that others will write, and grow them if they must be. Raises OSError."""
        for place in places:
            self._files[place.segment].ready(place.slot)

    def punch(self, places: Iterable[Place]) -> bool:
        """Give the places' bytes back to the disk. False when that cannot be had. Raises OSError."""
        return all(self._files[number].punch(slot) for number, slot in places)

    def sync(self, numbers: Iterable[int]) -> dict[int, OSError]:
        """Make what was written to segments durable. Returns those that failed, and how: their new bytes may be
        anything."""
        failed = {}
        for number in numbers:
            try:
                self._files[number].sync()
            except OSError as error:
                _log.warning("segment %d cannot be made durable (%s); its new spans are dropped", number, error)
                failed[number] = error
        return failed

    def remove(self, numbers: Iterable[int]) -> None:
        """Delete segments."""
        for number in numbers:
            try:
                self._files.pop(number).unlink()
            except OSError as error:
                _log.warning("segment %d cannot be deleted (%s)", number, error)

    def close(self) -> None:
        """Close all files. Idempotent."""
        for file in self._files.values():
            file.close()
        self._io.close()


class SlotsArriving:
    """Slots that are being read. After the `with` block no buffer is written to any more."""

    def __init__(self, io: DiskIO, files: dict[int, Segment], slots: Sequence[tuple[Place, memoryview]]) -> None:
        self._slots = [(files[place.segment], place.slot) for place, _ in slots]
        reads = [file.to_read(slot, out) for (file, slot), (_, out) in zip(self._slots, slots, strict=True)]
        self._read_idx = list(accumulate((read is not None for read in reads[:-1]), initial=0))
        self._is_there = [read is not None for read in reads]
        self._arriving = io.read([read for read in reads if read is not None])

    def finish(self, idx: int, header: SlotHeader) -> None:
        """Wait for a slot and check that it carries exactly `header`; the payload's CRC is the caller's to check. Any
        thread, each slot once. Raises StaleSlotError, CorruptChunkError, OSError."""
        file, slot = self._slots[idx]
        file.check(slot, header, self._arriving.finish(self._read_idx[idx]) if self._is_there[idx] else None)

    def __enter__(self) -> SlotsArriving:
        return self

    def __exit__(self, *_: object) -> None:
        self._arriving.close()
