"""All segment files of one store."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path

from mii_hcache.errors import CorruptChunkError
from mii_hcache.storage.disk_io import DiskFile, DiskIO
from mii_hcache.storage.format import SegmentHeader, SlotHeader
from mii_hcache.storage.segment import UNFINISHED_SUFFIX, SegmentFile
from mii_hcache.storage.slots import MAX_SEGMENT, Place

_log = logging.getLogger(__name__)


class Segments:
    """Segment files by number. Opening reads every header; files that are not this store's are left alone.

    Any thread. Methods block on I/O; the owner sees to it that a place is written and read by nobody else meanwhile.
    """

    def __init__(self, directory: Path, store_uuid: bytes, io: DiskIO) -> None:
        """`io` is taken over."""
        self._io = io
        self._directory = directory
        self._store_uuid = store_uuid
        self._files: dict[int, SegmentFile] = {}
        self.last_number = 0
        """Highest number that any file here bears in our spelling, ours or not."""
        self.notes: list[str] = []
        """Sentences for people about files that were left alone."""
        for path in directory.glob("*" + UNFINISHED_SUFFIX):
            if _number_of(path) is not None:
                path.unlink()
        for path in sorted(directory.glob("*.seg")):
            number = _number_of(path)
            if number is not None:
                self.last_number = max(self.last_number, number)
                self._adopt(path, number)

    @property
    def files(self) -> dict[int, SegmentFile]:
        """A copy of the files by number."""
        return dict(self._files)

    def add(self, number: int, slot_bytes: int, num_slots: int) -> None:
        """Know a segment that is to be written; its file is made by the first write. Does not block."""
        header = SegmentHeader(store_uuid=self._store_uuid, slot_bytes=slot_bytes, num_slots=num_slots)
        self._files.setdefault(number, SegmentFile(self._directory / _name_of(number), header, self._io))

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

    def punch(self, places: Iterable[Place]) -> bool:
        """Give the places' bytes back to the disk. False when the file system cannot."""
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
        """Delete segments' files."""
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

    def _adopt(self, path: Path, number: int) -> None:
        try:
            file = SegmentFile.open(path, self._io)
        except (CorruptChunkError, OSError) as error:
            self._leave(path, str(error))
            return
        if file.header.store_uuid != self._store_uuid:
            file.close()
            self._leave(path, "it belongs to another store")
        else:
            self._files[number] = file

    def _leave(self, path: Path, why: str) -> None:
        self.notes.append(f"segment file {path.name} was left alone ({why}); its spans cannot be restored")
        _log.warning("%s", self.notes[-1])


def _name_of(number: int) -> str:
    return f"{number:08d}.seg"


def _number_of(path: Path) -> int | None:
    """Number of a segment file, None for a name that we would not give: somebody's copy must not stand in for the file
    of that number, and a number that slots cannot be told by must not be the last one."""
    number = int(path.stem) if path.stem.isdecimal() and len(path.stem) < 11 else 0
    return number if 0 < number <= MAX_SEGMENT and path.with_suffix(".seg").name == _name_of(number) else None


class SlotsArriving:
    """Slots that are being read. After the `with` block no buffer is written to any more."""

    def __init__(self, io: DiskIO, files: dict[int, SegmentFile], slots: Sequence[tuple[Place, memoryview]]) -> None:
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
