"""Where a state directory's segments lie, and what reads and writes them there."""

from __future__ import annotations

import logging

from mii_hcache.storage.disk_io import DiskIO
from mii_hcache.storage.open_io import open_io
from mii_hcache.storage.segment_files import SegmentFiles
from mii_hcache.storage.segment_space import SegmentSpace
from mii_hcache.storage.state_dir import StateDir

_log = logging.getLogger(__name__)


def open_space(state_dir: StateDir, io: str) -> tuple[SegmentSpace, DiskIO, str]:
    """The directory's own `segments`, read and written as `io` says (`open_io`), or the NVMe namespace that was
    formatted for it (`pyspdk format`), which SPDK alone reads and writes. With the reason for people. Raises
    ConfigError."""
    address = state_dir.read_namespace()
    if address is None:
        disk_io, reason = open_io(io)
        return SegmentFiles(state_dir.segments, disk_io), disk_io, reason
    from mii_hcache.storage.regions import Regions
    from mii_hcache.storage.spdk import SpdkIO

    if io != "auto":
        _log.warning(
            "%s keeps its segments on an NVMe namespace, which SPDK alone reads and writes: io %s is not used",
            state_dir.path,
            io,
        )
    spdk_io = SpdkIO(address)
    try:
        return Regions(spdk_io), spdk_io, f"the state directory keeps its segments on {address} (experimental)"
    except BaseException:
        spdk_io.close()
        raise
