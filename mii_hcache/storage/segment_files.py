"""Segments as files in a directory."""

from __future__ import annotations

import logging
from pathlib import Path

from mii_hcache.errors import CorruptChunkError
from mii_hcache.storage.disk_io import DiskIO
from mii_hcache.storage.format import SegmentHeader
from mii_hcache.storage.segment import UNFINISHED_SUFFIX, SegmentFile
from mii_hcache.storage.segment_space import Segment, SegmentSpace

_log = logging.getLogger(__name__)


class SegmentFiles(SegmentSpace):
    """Files NUMBER.seg. Those that are not the store's are left alone, and their numbers are not used."""

    def __init__(self, directory: Path, io: DiskIO) -> None:
        super().__init__()
        self._directory = directory
        self._io = io

    def find(self, store_uuid: bytes) -> dict[int, Segment]:
        for path in self._directory.glob("*" + UNFINISHED_SUFFIX):
            if path.stem.isdecimal():
                path.unlink()
        found: dict[int, Segment] = {}
        for path in sorted(self._directory.glob("*.seg")):
            if not path.stem.isdecimal():
                continue
            self.last_number = max(self.last_number, int(path.stem))
            try:
                file = SegmentFile.open(path, self._io)
            except (CorruptChunkError, OSError) as error:
                self._leave(path, str(error))
                continue
            if file.header.store_uuid != store_uuid:
                file.close()
                self._leave(path, "it belongs to another store")
            else:
                found[int(path.stem)] = file
        return found

    def new(self, number: int, header: SegmentHeader) -> Segment:
        return SegmentFile(self._directory / f"{number:08d}.seg", header, self._io)

    def _leave(self, path: Path, why: str) -> None:
        self.notes.append(f"segment file {path.name} was left alone ({why}); its spans cannot be restored")
        _log.warning("%s", self.notes[-1])
