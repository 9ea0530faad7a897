"""One segment file: slots at fixed offsets."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from mii_hcache.errors import CorruptChunkError
from mii_hcache.storage.format import BLOCK_BYTES, SegmentHeader, SlotHeader, padded_bytes
from mii_hcache.storage.state_dir import open_private, sync_dir

UNFINISHED_SUFFIX = ".new"
"""Of segment files that are not yet what their name will say."""

_ZEROS = memoryview(bytes(BLOCK_BYTES))
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)
_per_thread = threading.local()


class StaleSlotError(CorruptChunkError):
    """A slot holds a sound chunk, but another one than asked for: the slot was reused."""


class SegmentFile:
    """A segment on disk. Methods may be called from any thread and block on I/O; each raises OSError as it comes.

    A new segment's file is made by the first write. The owner sees to it that no slot is written and read at once, and
    that nothing is in progress when it calls `unlink` or `close`.
    """

    def __init__(self, path: Path, header: SegmentHeader, fd: int = -1) -> None:
        """`fd`: of the open file, -1 for a segment that does not exist yet."""
        self.path = path
        self.header = header
        self._fd = fd
        self._making = threading.Lock()

    @staticmethod
    def open(path: Path) -> SegmentFile:
        """Open an existing file. Raises CorruptChunkError when its header is not one of this format."""
        fd = open_private(path, os.O_RDWR)
        try:
            header = SegmentHeader.parse(os.pread(fd, BLOCK_BYTES, 0))
        except BaseException:
            os.close(fd)
            raise
        return SegmentFile(path, header, fd)

    @property
    def num_written(self) -> int:
        """Slots that begin before the file's end."""
        num_bytes = os.fstat(self._fd).st_size - BLOCK_BYTES
        return min(self.header.num_slots, -(-num_bytes // self.header.slot_bytes)) if num_bytes > 0 else 0

    def write(self, slot: int, header: SlotHeader, payload: memoryview) -> None:
        """Write a slot whole: header, payload (a byte view), padding."""
        self._make()
        padding = _ZEROS[: padded_bytes(len(payload)) - len(payload)]
        _write_all(self._fd, [memoryview(header.pack()), payload, padding], self._offset(slot))

    def read_into(self, slot: int, header: SlotHeader, out: memoryview) -> None:
        """Read a slot's payload into `out` and check that the slot carries exactly `header`. The payload's CRC is the
        caller's to check. Raises StaleSlotError or CorruptChunkError."""
        block = _header_block()
        if self._fd < 0 or not _read_all(self._fd, [block, out], self._offset(slot)):
            raise CorruptChunkError(f"{self.path}: slot {slot} ends early")
        if block != header.pack():
            found = SlotHeader.parse(block)
            raise StaleSlotError(f"{self.path}: slot {slot} holds generation {found.generation}")

    def sync(self) -> None:
        """Make what was written durable."""
        if self._fd >= 0:
            os.fdatasync(self._fd)

    def punch(self, slot: int) -> bool:
        """Give a slot's bytes back to the disk; it reads as zeros. False when the file system cannot."""
        if self._fd < 0:
            return True
        offset, length = ctypes.c_longlong(self._offset(slot)), ctypes.c_longlong(self.header.slot_bytes)
        while _libc.fallocate(self._fd, _KEEP_SIZE | _PUNCH_HOLE, offset, length) != 0:
            if ctypes.get_errno() != errno.EINTR:
                return False
        return True

    def unlink(self) -> None:
        """Delete the file."""
        self.close()
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _offset(self, slot: int) -> int:
        return BLOCK_BYTES + slot * self.header.slot_bytes

    def _make(self) -> None:
        with self._making:
            if self._fd >= 0:
                return
            if self.path.exists():
                raise FileExistsError(errno.EEXIST, "a segment file appeared", str(self.path))
            new = self.path.with_suffix(UNFINISHED_SUFFIX)  # a crash must not leave a file without a header
            fd = open_private(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            try:
                _write_all(fd, [memoryview(self.header.pack())], 0)
                os.fsync(fd)
                new.rename(self.path)
                sync_dir(self.path.parent)
            except BaseException:
                os.close(fd)
                new.unlink(missing_ok=True)
                raise
            self._fd = fd


def _header_block() -> memoryview:
    """This thread's block for reading headers."""
    block: memoryview | None = getattr(_per_thread, "block", None)
    if block is None:
        block = _per_thread.block = memoryview(bytearray(BLOCK_BYTES))
    return block


def _write_all(fd: int, buffers: Sequence[memoryview], offset: int) -> None:
    rest = list(buffers)
    while rest:
        num_bytes = os.pwritev(fd, rest, offset)
        if num_bytes <= 0:
            raise OSError(errno.EIO, "a write made no progress")
        offset += num_bytes
        rest = _after(rest, num_bytes)


def _read_all(fd: int, buffers: Sequence[memoryview], offset: int) -> bool:
    """False at the end of the file."""
    rest = list(buffers)
    while rest:
        num_bytes = os.preadv(fd, rest, offset)
        if num_bytes == 0:
            return False
        offset += num_bytes
        rest = _after(rest, num_bytes)
    return True


def _after(buffers: list[memoryview], num_bytes: int) -> list[memoryview]:
    """What is left of `buffers` after their first `num_bytes`."""
    for idx, buffer in enumerate(buffers):
        if num_bytes < len(buffer):
            return [buffer[num_bytes:], *buffers[idx + 1 :]]
        num_bytes -= len(buffer)
    return []
