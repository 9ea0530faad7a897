"""Tries whether a state directory can be written."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from mii_hcache.storage.disk_io import write_all
from mii_hcache.storage.format import BLOCK_BYTES
from mii_hcache.storage.state_dir import open_private

PROBE_FILE = "probe"
_NOT_THE_DEVICE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""A disk that is full, or may only be read, answers."""


def try_to_write(directory: Path) -> None:
    """Write and sync a small file. Blocks. Raises OSError when the device fails."""
    block: Sequence[memoryview] = [memoryview(bytes(BLOCK_BYTES))]
    try:
        fd = open_private(directory / PROBE_FILE, os.O_WRONLY | os.O_CREAT)
        try:
            write_all(fd, block, 0)
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno not in _NOT_THE_DEVICE:
            raise
