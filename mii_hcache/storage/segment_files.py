"""Segments as files in a directory."""

from __future__ import annotations

import logging
from pathlib import Path

from mii_hcache.errors import CorruptChunkError
from mii_hcache.storage.disk_io import DiskIO
from mii_hcache.storage.format import SegmentHeader
from mii_hcache.storage.segment import UNFINISHED_SUFFIX, SegmentFile
from mii_hcache.storage.segment_space import Segment, SegmentSpace
from mii_hcache.storage.slots import MAX_SEGMENT

_log = logging.getLogger(__name__)


class SegmentFiles(SegmentSpace):
    """Files NUMBER.seg. Those that are not the store's are left alone, and their numbers are not used."""

    def __init__(self, directory: Path, io: DiskIO) -> None:
        super().__init__()
        self._directory = directory
        self._io = io

    def find(self, store_uuid: bytes) -> dict[int, Segment]:
        for path in self._directory.glob("*" + UNFINISHED_SUFFIX):
            if _number_of(path) is not None:
                path.unlink()
        found: dict[int, Segment] = {}
        for path in sorted(self._directory.glob("*.seg")):
            number = _number_of(path)
            if number is None:
                continue
            self.last_number = max(self.last_number, number)
            try:
                file = SegmentFile.open(path, self._io)
            except (CorruptChunkError, OSError) as error:
                self._leave(path, str(error))
                continue
            if file.header.store_uuid != store_uuid:
                file.close()
                self._leave(path, "it belongs to another store")
            else:
                found[number] = file
        return found

    def new(self, number: int, header: SegmentHeader) -> Segment:
        return SegmentFile(self._directory / _name_of(number), header, self._io)

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
