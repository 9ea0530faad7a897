"""What lies in a directory of segment files, ours and not: seen from outside, nothing is changed."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from mii_hcache.errors import CorruptChunkError
from mii_hcache.storage.format import BLOCK_BYTES, SegmentHeader, older_segment_version
from mii_hcache.storage.segment import UNFINISHED_SUFFIX, SegmentFile
from mii_hcache.storage.state_dir import open_private

OURS = "ours"
OLD = "old"
"""This store's, of a format version that nobody reads any more."""
UNFINISHED = "unfinished"
"""This store's way to make a file, cut short by a crash."""
FOREIGN = "foreign"
"""Of another store, or under a name that no segment has: not ours to touch."""
DAMAGED = "damaged"
"""Named like a segment, with a header that is none. Whose it was cannot be known."""


@dataclass(frozen=True, kw_only=True)
class FoundFile:
    """A file in the directory of segment files."""

    path: Path
    state: str
    """OURS, OLD, UNFINISHED, FOREIGN or DAMAGED."""
    why: str
    """Why it is not ours, for people; empty when it is."""
    disk_bytes: int
    """What it takes on disk, holes left out."""
    header: SegmentHeader | None = None
    """Of OURS."""
    num_written: int = 0
    """Of OURS: slots that begin before its end."""

    @property
    def number(self) -> int:
        """Of OURS: the segment's."""
        return int(self.path.stem)


def survey(directory: Path, store_uuid: bytes | None) -> list[FoundFile]:
    """Every file of the directory, by name; those that vanish meanwhile are left out. Blocks on I/O. Raises OSError."""
    found = []
    for path in sorted(directory.iterdir()) if directory.is_dir() else []:
        try:
            found.append(_look_at(path, store_uuid))
        except FileNotFoundError:
            continue
    return found


def _look_at(path: Path, store_uuid: bytes | None) -> FoundFile:
    info = path.lstat()
    disk_bytes = 512 * info.st_blocks
    if path.suffix == UNFINISHED_SUFFIX and path.stem.isdecimal():
        return FoundFile(path=path, state=UNFINISHED, why="it was never finished", disk_bytes=disk_bytes)
    if path.suffix != ".seg" or not path.stem.isdecimal():
        return FoundFile(path=path, state=FOREIGN, why="no segment file has such a name", disk_bytes=disk_bytes)
    try:
        with closing(SegmentFile.open_to_read(path)) as file:
            header, num_written = file.header, file.num_written
    except FileNotFoundError:
        raise
    except (CorruptChunkError, OSError) as error:
        version = None if isinstance(error, OSError) else _older_version(path, store_uuid)
        if version is None:
            return FoundFile(path=path, state=DAMAGED, why=str(error), disk_bytes=disk_bytes)
        why = f"it is of format version {version}, which is read no more"
        return FoundFile(path=path, state=OLD, why=why, disk_bytes=disk_bytes)
    if header.store_uuid != store_uuid:
        return FoundFile(path=path, state=FOREIGN, why="it belongs to another store", disk_bytes=disk_bytes)
    return FoundFile(path=path, state=OURS, why="", disk_bytes=disk_bytes, header=header, num_written=num_written)


def _older_version(path: Path, store_uuid: bytes | None) -> int | None:
    fd = open_private(path, os.O_RDONLY)
    try:
        return older_segment_version(os.pread(fd, BLOCK_BYTES, 0), store_uuid)
    finally:
        os.close(fd)
