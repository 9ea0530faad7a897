"""All segment files of one store."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from mii_hcache.errors import CorruptChunkError
from mii_hcache.storage.format import SegmentHeader, SlotHeader
from mii_hcache.storage.segment import UNFINISHED_SUFFIX, SegmentFile
from mii_hcache.storage.slots import Place

_log = logging.getLogger(__name__)


class Segments:
    """Segment files by number. Opening reads every header; files that are not this store's are left alone.

    Any thread. Methods block on I/O; the owner sees to it that a place is written and read by nobody else meanwhile.
    """

    def __init__(self, directory: Path, store_uuid: bytes) -> None:
        self._directory = directory
        self._store_uuid = store_uuid
        self._files: dict[int, SegmentFile] = {}
        self.last_number = 0
        """Highest number that any file here bears, ours or not."""
        self.notes: list[str] = []
        """Sentences for people about files that were left alone."""
        for path in directory.glob("*" + UNFINISHED_SUFFIX):
            if path.stem.isdecimal():
                path.unlink()
        for path in sorted(directory.glob("*.seg")):
            if path.stem.isdecimal():
                self.last_number = max(self.last_number, int(path.stem))
                self._adopt(path)

    @property
    def files(self) -> dict[int, SegmentFile]:
        """A copy of the files by number."""
        return dict(self._files)

    def add(self, number: int, slot_bytes: int, num_slots: int) -> None:
        """Know a segment that is to be written; its file is made by the first write. Does not block."""
        header = SegmentHeader(store_uuid=self._store_uuid, slot_bytes=slot_bytes, num_slots=num_slots)
        self._files.setdefault(number, SegmentFile(self._directory / f"{number:08d}.seg", header))

    def write(self, place: Place, header: SlotHeader, payload: memoryview) -> None:
        """Write a slot whole. Raises OSError."""
        self._files[place.segment].write(place.slot, header, payload)

    def read_into(self, place: Place, header: SlotHeader, out: memoryview) -> None:
        """Read a payload and check its header. Raises CorruptChunkError, OSError."""
        self._files[place.segment].read_into(place.slot, header, out)

    def punch(self, places: Iterable[Place]) -> bool:
        """Give the places' bytes back to the disk. False when the file system cannot."""
        return all(self._files[number].punch(slot) for number, slot in places)

    def sync(self, numbers: Iterable[int]) -> set[int]:
        """Make what was written to segments durable. Returns those that failed: their new bytes may be anything."""
        failed = set()
        for number in numbers:
            try:
                self._files[number].sync()
            except OSError as error:
                _log.warning("segment %d cannot be made durable (%s); its new spans are dropped", number, error)
                failed.add(number)
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

    def _adopt(self, path: Path) -> None:
        try:
            file = SegmentFile.open(path)
        except (CorruptChunkError, OSError) as error:
            self._leave(path, str(error))
            return
        if file.header.store_uuid != self._store_uuid:
            file.close()
            self._leave(path, "it belongs to another store")
        else:
            self._files[int(path.stem)] = file

    def _leave(self, path: Path, why: str) -> None:
        self.notes.append(f"segment file {path.name} was left alone ({why}); its spans cannot be restored")
        _log.warning("%s", self.notes[-1])
