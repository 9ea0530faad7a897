"""What a disk has left for saved state, next to what saved state may take of it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from mii_hcache.core.amounts import format_size
from mii_hcache.storage.state_dir import NAMESPACE_FILE


@dataclass(frozen=True, kw_only=True)
class DiskSpace:
    """The file system of one directory."""

    free_bytes: int
    """What a user without privileges may still write."""
    total_bytes: int
    held_bytes: int
    """What segment files of the directory take of it by now."""

    @property
    def usable_bytes(self) -> int:
        """The most that saved state in the directory can come to, if nobody else writes."""
        return self.free_bytes + self.held_bytes


def disk_space_of(directory: Path) -> DiskSpace:
    """Blocks on I/O. Raises OSError, also when the directory is not there; one without segments holds nothing."""
    usage = shutil.disk_usage(directory)
    held_bytes = sum(path.stat().st_blocks * 512 for path in (directory / "segments").glob("*.seg"))
    return DiskSpace(free_bytes=usage.free, total_bytes=usage.total, held_bytes=held_bytes)


def why_scarce(directory: Path, capacity_bytes: int) -> str | None:
    """A sentence where the disk has not the room that saved state may take in `directory`; None where it has, where the
    file system is not what bounds it, and where nobody can tell. Directories that share a disk are not added up."""
    try:
        if (directory / NAMESPACE_FILE).exists():
            return None
        usable_bytes = disk_space_of(directory).usable_bytes
    except OSError:
        return None
    if usable_bytes >= capacity_bytes:
        return None
    return (
        f"The disk of {directory} has room for {format_size(usable_bytes)} of saved state, not for the "
        f"{format_size(capacity_bytes)} that it may take there: older state goes sooner."
    )
